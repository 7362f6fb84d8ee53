"""Benchmarks of the flow: systems that compute the same kind of flow, workloads, and one run that compares them."""

from .run import run_bench
from .systems import PUBLISHED, SMALL, SYSTEMS, FlowSize, System
from .workloads import WORKLOADS, Workload

__all__ = ["PUBLISHED", "SMALL", "SYSTEMS", "WORKLOADS", "FlowSize", "System", "Workload", "run_bench"]
