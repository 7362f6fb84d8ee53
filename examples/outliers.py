"""Outliers in a table, by the exact likelihood of a flow.

scikit-learn's breast cancer table: 569 tumours, 30 measurements of each. An unsupervised IIN learns the density of benign
ones; a tumour with a low likelihood is an outlier. Held-out benign and all malignant tumours are told apart by that score
alone: the labels of malignant ones are used for nothing but the evaluation. Beside it: Gaussian likelihood (Mahalanobis
distance), isolation forest, local outlier factor, one-class SVM, each at scikit-learn's defaults.

    python examples/outliers.py        # under a minute
"""

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, write_results
from sklearn.covariance import EmpiricalCovariance
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import IsolationForest
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import LocalOutlierFactor
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

import iin_fast


def fit_density(train: torch.Tensor, held: torch.Tensor, *, steps: int, seed: int) -> tuple[iin_fast.IIN, float]:
    """An unsupervised IIN by maximum likelihood, as it was when held-out rows were likeliest.

    Returns:
        the model, and the held-out likelihood in nats per row
    """
    random = torch.Generator().manual_seed(seed)
    model = iin_fast.IIN(train.shape[1], n_flows=4, hidden_dim=32, hidden_depth=1, generator=random)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-3)
    best, kept = -float("inf"), None
    for step in range(steps):
        rows = train[torch.randint(len(train), (128,), generator=random)]
        rows = rows + 0.1 * torch.randn(rows.shape, generator=random)
        loss = -model.log_prob(rows).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        if step % 20 == 19:
            with torch.no_grad():
                likelihood = model.log_prob(held).mean().item()
            if likelihood > best:
                best, kept = likelihood, copy.deepcopy(model.state_dict())
    assert kept is not None
    model.load_state_dict(kept)
    return model, best


def main(out: Path, *, quick: bool = False, seed: int = 0, repeats: int = 5) -> dict[str, Any]:
    started = time.perf_counter()
    table, benign = load_breast_cancer(return_X_y=True)
    repeats = 1 if quick else repeats
    found: dict[str, list[tuple[float, float]]] = {}
    nats = []
    for repeat in range(repeats):
        good, bad = table[benign == 1], table[benign == 0]
        fitted, test = train_test_split(good, test_size=0.4, random_state=seed + repeat)
        train, held = train_test_split(fitted, test_size=0.2, random_state=seed + repeat)
        scaler = StandardScaler().fit(train)
        train, held, test, bad = (scaler.transform(part) for part in (train, held, test, bad))
        everything = np.concatenate([test, bad])
        outlier = np.r_[np.zeros(len(test)), np.ones(len(bad))]

        train_t, held_t = (torch.tensor(part, dtype=torch.float32) for part in (train, held))
        model, likelihood = fit_density(train_t, held_t, steps=40 if quick else 1000, seed=seed + repeat)
        nats.append(likelihood)
        with torch.no_grad():
            flow = -model.log_prob(torch.tensor(everything, dtype=torch.float32)).numpy()
        scores = {
            "flow likelihood": flow,
            "Mahalanobis distance": EmpiricalCovariance().fit(train).mahalanobis(everything),
            "isolation forest": -IsolationForest(random_state=seed + repeat).fit(train).score_samples(everything),
            "local outlier factor": -LocalOutlierFactor(novelty=True).fit(train).score_samples(everything),
            "one-class SVM": -OneClassSVM().fit(train).score_samples(everything),
        }
        for name, score in scores.items():
            pair = roc_auc_score(outlier, score), average_precision_score(outlier, score)
            found.setdefault(name, []).append((float(pair[0]), float(pair[1])))
    results = {
        "rows": {"train": len(train), "held out": len(held), "benign test": len(test), "malignant": len(bad)},
        "repeats": repeats,
        "held-out nats": {"mean": float(np.mean(nats)), "std": float(np.std(nats))},
        "systems": {
            name: {
                "AUROC": {"mean": float(np.mean(v, 0)[0]), "std": float(np.std(v, 0)[0])},
                "average precision": {"mean": float(np.mean(v, 0)[1]), "std": float(np.std(v, 0)[1])},
            }
            for name, v in found.items()
        },
    }
    write_results(out, results, started)
    return results


if __name__ == "__main__":
    given = arguments("outliers", __doc__)
    main(given.out, quick=given.quick, seed=given.seed)
