"""The main job from one command: an IIN that swaps digit and color of handwritten digits, trained and judged here."""

from .run import run_demo

__all__ = ["run_demo"]
