"""Ops: each in its folder, with the definition in reference.py."""
