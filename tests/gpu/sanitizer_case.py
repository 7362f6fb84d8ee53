"""Every op, forward and backward, on odd shapes: what compute-sanitizer watches. Arguments: device [backend ...]

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of its own, so that memcheck sees its ends.
"""

import sys
from collections import Counter

import torch

from iin_fast.backends import NAMES, available, backend
from iin_fast.testing.backends import CASES, _run, dtypes_of


def main(device: str, names: list[str]) -> None:
    ran: Counter[str] = Counter()
    flows = sys.modules["iin_fast.ops.flow"]
    flows.WALKED = {}  # type: ignore[attr-defined]  # the op's own kernels; programs are an op of their own
    for op, (cases, _) in CASES.items():
        for name in names:
            if name not in available(op, device):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                if dtype not in dtypes_of(op, device):
                    continue
                # The sanitizer is slow: small cases with odd sizes. The flow has 4 for each batch, of which the first runs
                # the map and the last its inverse: with CUDA C++ 25 rows in one cooperative launch, 300 layer by layer.
                chosen = {"flow": (4, 0, 3), "affine_coupling": (10, 0, 3)}.get(op, (5, 0, 3))
                for number, (label, call, inputs) in enumerate(cases(dtype, device)):
                    if inputs[0].numel() > 20000 or number % chosen[0] not in chosen[1:]:
                        continue
                    print(f"{op} {name} {dtype} {label}", flush=True)  # the log shows where an error comes from
                    with backend(name):
                        _run(call, inputs, {})
                    if device == "cuda":
                        torch.cuda.synchronize()
                    ran[f"{op} {name} {str(dtype).removeprefix('torch.')}"] += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{sum(ran.values())} cases: {', '.join(f'{count} {what}' for what, count in ran.items())}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(NAMES[1:]))
