"""An IIN on top of a model that is already there: separate what a latent says of the digit from everything else.

The "pretrained model" here is a PCA of scikit-learn's handwritten digits, the smallest encoder with a decoder. Any model
takes its place: all the IIN needs is z = encode(x), and for pictures x = decode(z).

    python examples/latent_factors.py        # ten seconds; needs scikit-learn
"""

import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

import iin_fast


def main(steps: int = 600) -> dict[str, float]:
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    train, test = slice(0, 1400), slice(1400, None)

    # the model that is already there
    model = PCA(16, random_state=0).fit(images[train])
    z = torch.tensor(model.transform(images), dtype=torch.float32)
    scale = z.std()
    z = z / scale

    # pairs that share the digit, and an IIN with one named factor
    sampler = iin_fast.PairSampler({"digit": digits[train]}, seed=0)
    iin = iin_fast.IIN(16, {"digit": 9}, n_flows=6, hidden_dim=128, generator=torch.Generator().manual_seed(0))
    loss_of = iin_fast.FactorLoss(rho=0.99)
    iin(z[train][:512])  # ActNorm starts from data
    optimizer = torch.optim.Adam(iin.parameters(), lr=2e-3, betas=(0.5, 0.9), fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    noise = torch.Generator().manual_seed(0)  # 1400 digits are few: a little noise keeps the flow from overfitting them
    for _ in range(steps):
        pairs = sampler.sample(128)
        za, zb = (z[train][rows] + 0.2 * torch.randn(128, 16, generator=noise) for rows in (pairs.a, pairs.b))
        loss = loss_of(iin, za, zb, pairs.shared)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    # give every held-out digit the digit factor of another one, and ask a judge that saw only pictures
    judge = KNeighborsClassifier(3).fit(images[train], digits[train])
    donors = torch.randperm(len(z[test]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        swapped = iin.swap(z[test], z[test][donors], "digit")
    found = judge.predict(model.inverse_transform((scale * swapped).numpy()))
    restored = judge.predict(model.inverse_transform((scale * z[test]).numpy()))
    return {
        "loss": loss.item(),
        "judge reads the digit of the decoded latent": float((restored == digits[test]).mean()),
        "judge reads the donor's digit after the swap": float((found == digits[test][donors.numpy()]).mean()),
        "judge still reads the old digit": float((found == digits[test]).mean()),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.3f}")
