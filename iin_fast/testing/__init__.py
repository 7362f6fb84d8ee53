"""Helpers for tests and benchmarks: gradients under published names, the eager baseline."""

from iin_fast.testing.gradients import published_grads

__all__ = ["published_grads"]
