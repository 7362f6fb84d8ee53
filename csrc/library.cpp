// The library itself: its namespace, and what the build can say of itself.
#include "common/isa.h"
#include "common/tensor.h"

namespace iin_fast {
namespace {

std::string cpu_isa() { return isa_name(); }

} // namespace

STABLE_TORCH_LIBRARY(iin_fast, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

} // namespace iin_fast
