"""Tests of the Triton kernels in Triton's interpreter. It must be chosen before Triton is imported, and would change the
rest of the suite, so tests/backends/test_triton.py runs this folder in a process of its own."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
