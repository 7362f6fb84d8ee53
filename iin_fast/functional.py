"""The ops as functions, as torch.nn.functional has them."""

from .ops.affine_coupling import affine_coupling
from .ops.pair_nll import pair_nll

__all__ = ["affine_coupling", "pair_nll"]
