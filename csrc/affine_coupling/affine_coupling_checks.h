// What the loops and kernels of affine_coupling rely on, checked once for CPU and CUDA.
#pragma once

#include "affine_coupling/affine_coupling.h"
#include "common/tensor.h"

namespace iin_fast {

inline void check_like(const char *op, const char *name, const Tensor &t, const Tensor &x) {
  bool same = t.dim() == x.dim() && t.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d)
    same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape and type of x");
}

inline void check_raw(const char *op, const std::optional<Tensor> &raw, const Tensor &x, int64_t squash) {
  STD_TORCH_CHECK(squash >= 0 && squash < squash_count, op, ": squash ", squash, " is not a known code");
  STD_TORCH_CHECK(raw.has_value() == (static_cast<Squash>(squash) != Squash::none), op,
                  ": raw_scale must be given, except for squash none");
  if (raw.has_value())
    check_like(op, "raw_scale", *raw, x);
}

inline void check_coupling(const Tensor &x, const std::optional<Tensor> &raw, const Tensor &shift, int64_t squash) {
  STD_TORCH_CHECK(x.dim() >= 1, "affine_coupling: x must have a batch dimension");
  check_like("affine_coupling", "shift", shift, x);
  check_raw("affine_coupling", raw, x, squash);
}

inline void check_coupling_backward(const Tensor &grad_y, const Tensor &grad_logdet, const Tensor &value,
                                    const std::optional<Tensor> &raw, int64_t squash) {
  STD_TORCH_CHECK(value.dim() >= 1, "affine_coupling_backward: value must have a batch dimension");
  check_like("affine_coupling_backward", "grad_y", grad_y, value);
  check_raw("affine_coupling_backward", raw, value, squash);
  STD_TORCH_CHECK(grad_logdet.dim() == 1 && grad_logdet.size(0) == row_count(value) &&
                      grad_logdet.scalar_type() == accumulate_type(value.scalar_type()),
                  "affine_coupling_backward: grad_logdet must be [batch] in the type of the log-det");
}

} // namespace iin_fast
