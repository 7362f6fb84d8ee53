"""The Invertible Interpretation Network: model, factors, loss, factor dimensions, pairs."""

from .dims import estimate_factor_dims
from .factors import Factors
from .losses import FactorLoss
from .model import IIN
from .pairs import PairBatches, Pairs, PairSampler

__all__ = ["IIN", "FactorLoss", "Factors", "PairBatches", "PairSampler", "Pairs", "estimate_factor_dims"]
