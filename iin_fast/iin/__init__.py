"""The Invertible Interpretation Network: model, factors, loss, factor dimensions, pairs."""

from .concepts import ConceptPairs, concept_pairs
from .dims import estimate_factor_dims
from .factors import Factors
from .losses import FactorLoss
from .model import IIN
from .pairs import PairBatches, Pairs, PairSampler

__all__ = [
    "IIN",
    "ConceptPairs",
    "FactorLoss",
    "Factors",
    "PairBatches",
    "PairSampler",
    "Pairs",
    "concept_pairs",
    "estimate_factor_dims",
]
