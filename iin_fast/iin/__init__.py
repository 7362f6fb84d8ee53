"""The Invertible Interpretation Network: model, its linear rival, factors, loss, factor dimensions, pairs."""

from .concepts import ConceptPairs, concept_pairs
from .dims import estimate_factor_dims
from .factors import Factors
from .inputs import Inputs
from .linear import LinearIIN
from .losses import FactorLoss
from .model import IIN
from .pairs import PairBatches, Pairs, PairSampler

__all__ = [
    "IIN",
    "ConceptPairs",
    "FactorLoss",
    "Factors",
    "Inputs",
    "LinearIIN",
    "PairBatches",
    "PairSampler",
    "Pairs",
    "concept_pairs",
    "estimate_factor_dims",
]
