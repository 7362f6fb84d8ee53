"""Is the installed package whole beside the torch of this environment? python tests/packaging/load_check.py

For an environment with a CUDA build of torch (`make cuda-load-check`); a GPU is not needed.
"""

import sys

import torch

import iin_fast
from iin_fast._library import libraries
from iin_fast.ops.registry import gpu_ops


def main() -> int:
    print(f"iin-fast {iin_fast.__version__} from {iin_fast.__file__}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, GPUs: {torch.cuda.device_count()}")
    assert "cuda" in libraries, "the package has no CUDA library: it was built without nvcc"
    print(f"CUDA library loaded, code for {torch.ops.iin_fast.cuda_targets()}")
    namespace = torch._C._dispatch_get_all_op_names()
    ops = sorted({name.split("::")[1].split(".")[0] for name in namespace if name.startswith("iin_fast::")})
    on_cuda = [op for op in ops if torch._C._dispatch_has_kernel_for_dispatch_key(f"iin_fast::{op}", "CUDA")]
    print(f"registered for CUDA tensors: {', '.join(on_cuda)}")
    assert {op + end for op in gpu_ops() for end in ("", "_backward")} <= set(on_cuda)

    # Past the dispatcher with tensors of the CPU: the kernels look for torch's stream first, then at the tensors.
    x = torch.randn(2, 3)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        torch.ops.iin_fast.affine_coupling.default.redispatch(key, x, x, x, 1, 1.0, False)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
    else:
        message = "no error"
    wanted = "expected tensors on a CUDA device" if torch.version.cuda else "built without CUDA"
    print(f"a call with tensors that are not on a GPU: {message}")
    assert wanted in message, f"expected {wanted!r}"
    if not torch.cuda.is_available():
        try:
            iin_fast.nn.Flow(4, 1, 8).to("cuda")
        except (RuntimeError, AssertionError) as error:
            print(f"a flow on a GPU that is not there: {str(error).splitlines()[0]}")
        else:
            raise AssertionError("a flow went to a GPU that is not there")
    y, logdet = iin_fast.functional.affine_coupling(x, x, x)
    assert y.shape == x.shape and logdet.shape == (2,)
    print("the load check is passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
