"""Every op once, forward and backward, on odd shapes: what compute-sanitizer watches. Arguments: device [backend ...]

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of its own, so that memcheck sees its ends.
"""

import sys

import torch

from iin_fast.backends import NAMES, available, backend
from iin_fast.testing.backends import CASES, _run

BATCHES = 3  # cases of each op and type


def main(device: str, names: list[str]) -> None:
    ran = 0
    for op, (cases, dtypes, _) in CASES.items():
        for name in names:
            if name not in available(op, device):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                if dtype not in dtypes:
                    continue
                for number, (_, call, inputs) in enumerate(cases(dtype, device)):
                    # the sanitizer is slow: small cases with odd sizes
                    if inputs[0].numel() > 20000 or number % 5 not in (0, 3):
                        continue
                    with backend(name):
                        _run(call, inputs, {})
                    ran += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} cases")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(NAMES[1:]))
