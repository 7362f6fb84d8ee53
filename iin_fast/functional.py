"""The ops as functions, as torch.nn.functional has them."""

from .ops.affine_coupling import affine_coupling
from .ops.flow_program import flow_program
from .ops.pair_nll import pair_nll
from .ops.spline_coupling import rational_quadratic_spline, spline_coupling

__all__ = ["affine_coupling", "flow_program", "pair_nll", "rational_quadratic_spline", "spline_coupling"]
