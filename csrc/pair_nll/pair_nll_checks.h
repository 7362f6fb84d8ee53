// What the loops and kernels of pair_nll rely on, checked once for CPU and CUDA.
#pragma once

#include "common/tensor.h"

namespace iin_fast {

inline void check_pair(const char *op, const Tensor &za, const Tensor &zb, const Tensor &shared,
                       const std::vector<int64_t> &sizes) {
  STD_TORCH_CHECK(za.dim() == 2 && zb.dim() == 2 && za.size(0) == zb.size(0) && za.size(1) == zb.size(1) &&
                      za.scalar_type() == zb.scalar_type(),
                  op, ": za and zb must be [batch, dim] of one type");
  STD_TORCH_CHECK(shared.dim() == 2 && shared.size(0) == za.size(0) &&
                      shared.size(1) == static_cast<int64_t>(sizes.size()) && shared.scalar_type() == ScalarType::Bool,
                  op, ": shared must be bool [batch, factors]");
  int64_t sum = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, op, ": sizes must not be negative");
    sum += size;
  }
  STD_TORCH_CHECK(sum == za.size(1), op, ": sizes must sum to dim");
}

inline void check_row_values(const char *op, const char *name, const Tensor &t, const Tensor &za) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == za.size(0) && t.scalar_type() == accumulate_type(za.scalar_type()), op,
                  ": ", name, " must be [batch] in the type of a log-det");
}

} // namespace iin_fast
