"""Helpers for tests and benchmarks: gradients under published names, the eager baseline."""

from .eager import eager_flow
from .gradients import published_grads

__all__ = ["eager_flow", "published_grads"]
