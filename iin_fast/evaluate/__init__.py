"""Metrics of disentanglement, each with its baseline: swaps, information, DCI, MIG, SAP, leaks, likelihood."""

from .baselines import LinearFactors, MeanShift
from .correlation import pair_correlation, shared_correlation
from .dci import dci, dci_from_importances
from .frechet import frechet_distance, sample_quality
from .information import factor_label_information, label_entropy
from .likelihood import gaussian_nats_per_dim, invertibility_error, nats_per_dim, normal_nats_per_dim
from .mig import mig
from .probe import leak
from .run import evaluate, evaluate_unlabelled, write_evaluation
from .sap import sap
from .swaps import judge_accuracy, latent_judge, swap_success
from .values import value_correlation
from .verdict import pair_verdict, swap_verdict

__all__ = [
    "LinearFactors",
    "MeanShift",
    "dci",
    "dci_from_importances",
    "evaluate",
    "evaluate_unlabelled",
    "factor_label_information",
    "frechet_distance",
    "gaussian_nats_per_dim",
    "invertibility_error",
    "judge_accuracy",
    "label_entropy",
    "latent_judge",
    "leak",
    "mig",
    "nats_per_dim",
    "normal_nats_per_dim",
    "pair_correlation",
    "pair_verdict",
    "sample_quality",
    "sap",
    "shared_correlation",
    "swap_success",
    "swap_verdict",
    "value_correlation",
    "write_evaluation",
]
