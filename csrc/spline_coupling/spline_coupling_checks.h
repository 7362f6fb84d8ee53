// What the loops and kernels of spline_coupling rely on, checked once for CPU and CUDA.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

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
  // Raw values of an element in tensor i of 1 or 3.
  int64_t count(size_t tensors, size_t i) const { return tensors == 1 ? count() : i < 2 ? bins : count() - 2 * bins; }
};

// The raw values of a call: one tensor, or widths, heights and derivatives apart.
using SplineTensors = std::vector<Tensor>;

inline SplineTensors spline_tensors(const char *op, const Tensor &parameters, const std::optional<Tensor> &heights,
                                    const std::optional<Tensor> &derivatives) {
  STD_TORCH_CHECK(heights.has_value() == derivatives.has_value(), op, ": heights and derivatives come together");
  return heights.has_value() ? SplineTensors{parameters, *heights, *derivatives} : SplineTensors{parameters};
}

inline void check_spline(const char *op, const Tensor &x, const SplineTensors &values, const SplineOptions &options) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must be [rows, features]");
  STD_TORCH_CHECK(options.bins >= 1 && options.tails >= 0 && options.tails <= 2 && options.form >= 0 &&
                      options.form <= 1,
                  op, ": bins, tails or parameterization is out of range");
  for (size_t i = 0; i < values.size(); ++i) {
    const Tensor &t = values[i];
    const int64_t count = options.count(values.size(), i);
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == count &&
                        t.scalar_type() == x.scalar_type(),
                    op, ": raw values must be [rows, features, ", count, "] in the type of x");
  }
}

inline void check_spline_backward(const char *op, const Tensor &grad_y, const Tensor &grad_logdet, const Tensor &x,
                                  const SplineTensors &values, const SplineOptions &options) {
  check_spline(op, x, values, options);
  check_spline(op, grad_y, values, options);
  STD_TORCH_CHECK(grad_logdet.dim() == 1 && grad_logdet.size(0) == x.size(0) &&
                      grad_logdet.scalar_type() == accumulate_type(x.scalar_type()),
                  op, ": grad_logdet must be [rows] in the type of the log-det");
}

// Parameters whose raw values lie side by side, whatever the distance between elements.
inline Tensor with_contiguous_values(const Tensor &parameters) {
  return parameters.size(2) == 1 || parameters.stride(2) == 1 ? parameters : torch::stable::contiguous(parameters);
}
inline SplineTensors with_contiguous_values(SplineTensors values) {
  for (Tensor &t : values)
    t = with_contiguous_values(t);
  return values;
}

// Of three tensors, each made by empty(like, sizes); where raw values come in one, the other two are empty.
template <class Empty> SplineTensors empty_gradients(const SplineTensors &values, const Empty &empty) {
  SplineTensors grads;
  for (size_t i = 0; i < 3; ++i)
    grads.push_back(i < values.size() ? empty(values[i], values[i].sizes()) : torch::stable::new_empty(values[0], {0}));
  return grads;
}

} // namespace iin_fast
