"""Helpers for tests and benchmarks: backends compared, gradients under published names, the eager baseline."""

from .backends import Comparison, check_ops, compare_backends
from .eager import eager_flow
from .gradients import published_grads

__all__ = ["Comparison", "check_ops", "compare_backends", "eager_flow", "published_grads"]
