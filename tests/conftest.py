"""One torch thread for each process of the tests: most tensors are tiny, and several processes share the cores (make test).
Threads are tested where a test sets their number (tests/ops)."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for torch, imported next, and for the processes that tests start

import torch  # noqa: E402

torch.set_num_threads(1)

collect_ignore = ["conftest.py"]  # the search for doctests would import it a second time, under the name of another one
