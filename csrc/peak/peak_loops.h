#pragma once

#include <cstdint>

#include "common/isa.h"

namespace iin_fast {

// clang-format off
IIN_FAST_DECLARE_LOOPS(
  // Multiply-adds on registers alone; returns how many floating-point operations that was.
  double peak_multiply_adds(int64_t rounds, float *sink);
  // The sum of data [count], read once.
  float peak_read(const float *data, int64_t count);
)
// clang-format on

} // namespace iin_fast
