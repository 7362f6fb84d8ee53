// What the loops and kernels of spline_coupling rely on, checked once for CPU and CUDA.
#pragma once

#include <cmath>

#include "common/tensor.h"
#include "spline_coupling/spline_coupling.h"

namespace iin_fast {

// The numbers of a call, as the op's schema has them.
struct SplineOptions {
  int64_t bins, tails, form;
  double left, right, bottom, top, min_width, min_height, min_derivative;

  SplineLimits<double> limits() const {
    const bool zuko = static_cast<Parameterization>(form) == Parameterization::zuko;
    return {left,      right,      bottom,         top,
            min_width, min_height, min_derivative, zuko ? 1.0 / std::log(min_derivative) : 0.0};
  }
  int64_t count() const { return 2 * bins + derivative_count(static_cast<Tails>(tails), bins); }
};

inline void check_spline(const char *op, const Tensor &x, const Tensor &parameters, const SplineOptions &options) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must be [rows, features]");
  STD_TORCH_CHECK(options.bins >= 1 && options.tails >= 0 && options.tails <= 2 && options.form >= 0 &&
                      options.form <= 1,
                  op, ": bins, tails or parameterization is out of range");
  STD_TORCH_CHECK(parameters.dim() == 3 && parameters.size(0) == x.size(0) && parameters.size(1) == x.size(1) &&
                      parameters.size(2) == options.count() && parameters.scalar_type() == x.scalar_type(),
                  op, ": parameters must be [rows, features, ", options.count(), "] in the type of x");
}

inline void check_spline_backward(const char *op, const Tensor &grad_y, const Tensor &grad_logdet, const Tensor &x,
                                  const Tensor &parameters, const SplineOptions &options) {
  check_spline(op, x, parameters, options);
  check_spline(op, grad_y, parameters, options);
  STD_TORCH_CHECK(grad_logdet.dim() == 1 && grad_logdet.size(0) == x.size(0) &&
                      grad_logdet.scalar_type() == accumulate_type(x.scalar_type()),
                  op, ": grad_logdet must be [rows] in the type of the log-det");
}

// Parameters whose raw values lie side by side, whatever the distance between elements.
inline Tensor with_contiguous_values(const Tensor &parameters) {
  return parameters.size(2) == 1 || parameters.stride(2) == 1 ? parameters : torch::stable::contiguous(parameters);
}

} // namespace iin_fast
