// What the CUDA build can say of itself.
#include "common/cuda.h"

namespace iin_fast {
namespace {

// The GPUs that this library has code for, e.g. "sm_80 sm_90 sm_100 compute_100": sm_* is machine code, compute_* is
// PTX, which the driver compiles for later GPUs.
std::string cuda_targets() { return IIN_FAST_CUDA_TARGETS; }

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) { m.def("cuda_targets() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CompositeExplicitAutograd, m) { m.impl("cuda_targets", TORCH_BOX(&cuda_targets)); }

} // namespace iin_fast
