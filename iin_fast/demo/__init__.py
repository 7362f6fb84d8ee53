"""The main job from one command: an IIN that swaps digit and color of handwritten digits, trained and judged here."""

from .run import Plan, run_demo

__all__ = ["Plan", "run_demo"]
