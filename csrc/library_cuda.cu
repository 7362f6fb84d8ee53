// What the CUDA build can say of itself and of the driver.
#include "common/cuda.h"

namespace iin_fast {
namespace {

// The GPUs that this library has code for, e.g. "sm_80 sm_90 sm_100 compute_100": sm_* is machine code, compute_* is
// PTX, which the driver compiles for later GPUs.
std::string cuda_targets() { return IIN_FAST_CUDA_TARGETS; }

// The CUDA of the compiler, as 1000 major + 10 minor: the driver must be for the same major or later.
int64_t cuda_compiler() { return 1000 * __CUDACC_VER_MAJOR__ + 10 * __CUDACC_VER_MINOR__; }

// The latest CUDA that this machine's driver serves, in the same units; 0 without a driver.
int64_t driver_version() { return cuda_driver_version(); }

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) {
  m.def("cuda_targets() -> str");
  m.def("cuda_compiler() -> int");
  m.def("cuda_driver() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_targets", TORCH_BOX(&cuda_targets));
  m.impl("cuda_compiler", TORCH_BOX(&cuda_compiler));
  m.impl("cuda_driver", TORCH_BOX(&driver_version));
}

} // namespace iin_fast
