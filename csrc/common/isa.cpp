#include "common/isa.h"

#include <cstdlib>
#include <cstring>

#if !defined(IIN_FAST_ONE_ISA)
#include <cpuid.h>
#endif

namespace iin_fast {
namespace {

#if !defined(IIN_FAST_ONE_ISA)
bool has_f16c() { // which __builtin_cpu_supports of clang does not know
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Isa detect() {
#if defined(IIN_FAST_ONE_ISA)
  return Isa::IIN_FAST_ONE_ISA;
#else
  __builtin_cpu_init();
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
  }
  const char *wanted = std::getenv("IIN_FAST_CPU");
  if (wanted != nullptr) {
    if (std::strcmp(wanted, "baseline") == 0)
      return Isa::baseline;
    if (std::strcmp(wanted, "avx2") == 0 && best != Isa::baseline)
      return Isa::avx2;
  }
  return best;
#endif
}

} // namespace

Isa isa() {
  static const Isa picked = detect();
  return picked;
}

const char *isa_name() {
  switch (isa()) {
  case Isa::avx512:
    return "avx512";
  case Isa::avx2:
    return "avx2";
  default:
    return "baseline";
  }
}

} // namespace iin_fast
