// The affine coupling of one element, for host and device (Dinh et al. 2017, Eq. 7; the squashes are those of the
// libraries that use them):
//
//   y = x exp(s) + t, log|dy/dx| = s, s = squash(raw)
//
// The reference for all of it is iin_fast/ops/affine_coupling/reference.py.
#pragma once

#include <type_traits>

#include "common/math.h"

namespace iin_fast {

// All squashes, with their codes in the op's schema (iin_fast/ops/affine_coupling/reference.py, SQUASHES).
#define IIN_FAST_SQUASHES(X) X(identity, 0) X(tanh, 1) X(atan, 2) X(sigmoid, 3) X(none, 4) X(softplus, 5) X(softclip, 6)

#define IIN_FAST_CODE(name, code) name = code,
enum class Squash : int64_t { IIN_FAST_SQUASHES(IIN_FAST_CODE) };
#undef IIN_FAST_CODE

#define IIN_FAST_ONE(name, code) +1
constexpr int64_t squash_count = IIN_FAST_SQUASHES(IIN_FAST_ONE);
#undef IIN_FAST_ONE

// Calls f with the squash and the direction as compile-time constants.
template <class F> IIN_FAST_HD void with_constants(Squash squash, bool inverse, F &&f) {
  switch (squash) {
#define IIN_FAST_CASE(name, code)                                                                                      \
  case Squash::name:                                                                                                   \
    return inverse ? f(std::integral_constant<Squash, Squash::name>(), std::true_type())                               \
                   : f(std::integral_constant<Squash, Squash::name>(), std::false_type());
    IIN_FAST_SQUASHES(IIN_FAST_CASE)
#undef IIN_FAST_CASE
  }
}

// Squashes that make the scale itself, whose logarithm is s.
template <Squash squash> constexpr bool makes_scale = squash == Squash::sigmoid || squash == Squash::softplus;

// s of raw, or the scale where the squash makes that; and ds / draw. `clamp` bounds |s| for tanh, atan and softclip,
// and is the least scale for softplus.
template <Squash squash, class T> IIN_FAST_HD T squash_of(T raw, T clamp, T &derivative) {
  if constexpr (squash == Squash::identity) {
    derivative = T(1);
    return raw;
  } else if constexpr (squash == Squash::tanh) {
    const T unit = math::tanh(raw);
    derivative = clamp * (T(1) - unit * unit);
    return clamp * unit;
  } else if constexpr (squash == Squash::atan) {
    derivative = clamp * T(0.636) / (T(1) + raw * raw);
    return clamp * T(0.636) * math::atan(raw);
  } else if constexpr (squash == Squash::sigmoid) {
    const T unit = math::sigmoid(raw + T(2)), scale = unit + T(1e-3);
    derivative = unit * (T(1) - unit) / scale;
    return scale;
  } else if constexpr (squash == Squash::softplus) {
    const T scale = math::softplus(raw) + clamp;
    derivative = math::sigmoid(raw) / scale;
    return scale;
  } else if constexpr (squash == Squash::softclip) {
    const T shrink = T(1) / (T(1) + math::abs(raw / clamp));
    derivative = shrink * shrink;
    return raw * shrink;
  } else {
    static_assert(squash == Squash::none);
    derivative = T(0);
    return T(0);
  }
}

// The transformed value, from the log-scale s.
template <bool inverse, class T> IIN_FAST_HD T couple_by(T s, T x, T shift) {
  return inverse ? (x - shift) * math::exp(-s) : x * math::exp(s) + shift;
}

// One element: the transformed value, and its term of the log-det of the map that is computed.
template <Squash squash, bool inverse, class T> IIN_FAST_HD T couple(T x, T raw, T shift, T clamp, T &logdet) {
  T derivative;
  if constexpr (makes_scale<squash>) {
    const T scale = squash_of<squash>(raw, clamp, derivative), s = math::log(scale);
    logdet = inverse ? -s : s;
    return inverse ? (x - shift) / scale : x * scale + shift;
  } else {
    const T s = squash_of<squash>(raw, clamp, derivative);
    logdet = inverse ? -s : s;
    if constexpr (squash == Squash::none)
      return inverse ? x - shift : x + shift;
    return couple_by<inverse>(s, x, shift);
  }
}

template <class T> struct CouplingGradient {
  T x, raw, shift;
};

// From the scale or its inverse, `slope`, which multiplies the gradient of y; `derivative` is ds / draw. `value` is
// what multiplies ds: the input x of the forward map, the output of the inverse map. dy/ds = x exp(s) is formed before
// the gradient joins: it is as large as y, so it overflows only where y does.
template <bool inverse, class T>
IIN_FAST_HD CouplingGradient<T> couple_slope_backward(T slope, T derivative, T value, T grad_y, T grad_logdet) {
  const T grad_x = grad_y * slope;
  const T grad_s = inverse ? -(grad_y * value + grad_logdet) : grad_y * (slope * value) + grad_logdet;
  return {grad_x, grad_s * derivative, inverse ? -grad_x : grad_y};
}

// From the log-scale s.
template <bool inverse, class T>
IIN_FAST_HD CouplingGradient<T> couple_by_backward(T s, T derivative, T value, T grad_y, T grad_logdet) {
  return couple_slope_backward<inverse>(math::exp(inverse ? -s : s), derivative, value, grad_y, grad_logdet);
}

template <Squash squash, bool inverse, class T>
IIN_FAST_HD CouplingGradient<T> couple_backward(T value, T raw, T clamp, T grad_y, T grad_logdet) {
  T derivative;
  const T s = squash_of<squash>(raw, clamp, derivative); // or the scale
  if constexpr (makes_scale<squash>)
    return couple_slope_backward<inverse>(inverse ? T(1) / s : s, derivative, value, grad_y, grad_logdet);
  else if constexpr (squash == Squash::none)
    return couple_slope_backward<inverse>(T(1), derivative, value, grad_y, grad_logdet);
  else
    return couple_by_backward<inverse>(s, derivative, value, grad_y, grad_logdet);
}

} // namespace iin_fast
