// The elementwise steps of a net, for host and device: one value, and its gradient.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/math.h"
#include "common/sum.h"
#include "flow_program/flow_program.h"

namespace iin_fast {

// sum + lost += term, compensated. `lost` stays below a unit of the sum: what equal terms lose is of one sign, and
// would grow until it lost digits of its own.
template <class T> IIN_FAST_HD void add_term(T &sum, T &lost, T term) {
  CompensatedSum<T> s{sum, lost};
  s.add(term);
  sum = s.total();
  lost = s.lost - (sum - s.value);
}

// Calls f with the activation as a compile-time constant.
template <class F> IIN_FAST_HD void with_activation(Activation activation, F &&f) {
  switch (activation) {
#define IIN_FAST_CASE(name)                                                                                            \
  case Activation::name:                                                                                               \
    return f(std::integral_constant<Activation, Activation::name>());
    IIN_FAST_CASE(none)
    IIN_FAST_CASE(relu)
    IIN_FAST_CASE(leaky_relu)
    IIN_FAST_CASE(elu)
    IIN_FAST_CASE(silu)
    IIN_FAST_CASE(gelu)
    IIN_FAST_CASE(tanh)
    IIN_FAST_CASE(sigmoid)
    IIN_FAST_CASE(atan)
#undef IIN_FAST_CASE
  }
}

// NaN passes through all of them.
template <Activation activation, class T> IIN_FAST_HD T activated(T v, T slope) {
  if constexpr (activation == Activation::relu)
    return math::select(v < T(0), T(0), v);
  else if constexpr (activation == Activation::leaky_relu)
    return math::select(v > T(0), v, slope * v);
  else if constexpr (activation == Activation::elu) {
    const T held = math::select(v < T(-64), T(-64), math::select(v > T(0), T(0), v)); // exp(-64) - 1 is -1
    return math::select(v > T(0), v, slope * math::expm1_bounded(held));
  } else if constexpr (activation == Activation::silu)
    return v * math::sigmoid(v);
  else if constexpr (activation == Activation::gelu)
    return v * math::normal(v).cdf;
  else if constexpr (activation == Activation::tanh)
    return math::tanh(v);
  else if constexpr (activation == Activation::sigmoid)
    return math::sigmoid(v);
  else if constexpr (activation == Activation::atan)
    return math::atan(v);
  else
    return v;
}

// Whether the derivative is made of the activation's input: of the others the result alone is left, in its place.
constexpr bool derivative_reads_input(Activation activation) {
  return activation == Activation::silu || activation == Activation::gelu || activation == Activation::atan;
}

// From the gradient d by the result to that by the input; v: the input or the result, see above.
template <Activation activation, class T> IIN_FAST_HD T activated_backward(T v, T d, T slope) {
  if constexpr (activation == Activation::relu)
    return math::select(v <= T(0), T(0), d);
  else if constexpr (activation == Activation::leaky_relu)
    return math::select(v > T(0), d, slope * d);
  else if constexpr (activation == Activation::elu)
    return math::select(v > T(0), d, d * (v + slope));
  else if constexpr (activation == Activation::silu) {
    const T s = math::sigmoid(v);
    return d * (s * (T(1) + v * (T(1) - s)));
  } else if constexpr (activation == Activation::gelu) {
    const math::Normal<T> normal = math::normal(v);
    return d * (normal.cdf + v * normal.density);
  } else if constexpr (activation == Activation::tanh)
    return d * (T(1) - v * v);
  else if constexpr (activation == Activation::sigmoid)
    return d * v * (T(1) - v);
  else if constexpr (activation == Activation::atan)
    return d / (T(1) + v * v);
  else
    return d;
}

template <class T> IIN_FAST_HD T gated(T a, T gate) { return a * math::sigmoid(gate); }

template <class T> struct GateGradient {
  T a, gate;
};
template <class T> IIN_FAST_HD GateGradient<T> gated_backward(T a, T gate, T d) {
  const T s = math::sigmoid(gate);
  return {d * s, d * a * s * (T(1) - s)};
}

// s of a raw scale.
template <class T> IIN_FAST_HD T scale_of(ScaleForm form, T raw, T eps) {
  return form == ScaleForm::plain ? raw : form == ScaleForm::exp ? math::exp(raw) : math::softplus(raw) + eps;
}
// log|s|
template <class T> IIN_FAST_HD T log_scale(ScaleForm form, T raw, T scale) {
  return form == ScaleForm::exp ? raw : math::log(math::abs(scale));
}
// From the gradients by s and by log|s| to that by raw.
template <class T> IIN_FAST_HD T scale_gradient(ScaleForm form, T raw, T scale, T grad_scale, T grad_log) {
  if (form == ScaleForm::exp) // a scale that is too small for its type has a log all the same
    return grad_scale * scale + grad_log;
  return (grad_scale + grad_log / scale) * (form == ScaleForm::plain ? T(1) : math::sigmoid(raw));
}

// On the circle of a wrapped spline's box: v mod its length, from its middle on. Its derivative is 1.
template <class T> IIN_FAST_HD T wrapped_value(T v, T right) {
  const T length = T(2) * right, rest = std::fmod(v, length);
  return (rest < T(0) ? rest + length : rest) - right;
}

// The log-density of a standard normal.
template <class T> IIN_FAST_HD T normal_term(T value) { return T(-0.5) * value * value - T(0.91893853320467274178); }

} // namespace iin_fast
