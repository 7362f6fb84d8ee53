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

// Values are part of the op's schema (iin_fast/ops/affine_coupling/__init__.py holds the names).
enum class Squash : int64_t { identity = 0, tanh = 1, atan = 2, sigmoid = 3, none = 4, softplus = 5, softclip = 6 };

// Calls f with the squash and the direction as compile-time constants.
template <class F> IIN_FAST_HD void with_constants(Squash squash, bool inverse, F &&f) {
  switch (squash) {
  case Squash::identity:
    return inverse ? f(std::integral_constant<Squash, Squash::identity>(), std::true_type())
                   : f(std::integral_constant<Squash, Squash::identity>(), std::false_type());
  case Squash::tanh:
    return inverse ? f(std::integral_constant<Squash, Squash::tanh>(), std::true_type())
                   : f(std::integral_constant<Squash, Squash::tanh>(), std::false_type());
  case Squash::atan:
    return inverse ? f(std::integral_constant<Squash, Squash::atan>(), std::true_type())
                   : f(std::integral_constant<Squash, Squash::atan>(), std::false_type());
  case Squash::sigmoid:
    return inverse ? f(std::integral_constant<Squash, Squash::sigmoid>(), std::true_type())
                   : f(std::integral_constant<Squash, Squash::sigmoid>(), std::false_type());
  case Squash::none:
    return inverse ? f(std::integral_constant<Squash, Squash::none>(), std::true_type())
                   : f(std::integral_constant<Squash, Squash::none>(), std::false_type());
  case Squash::softplus:
    return inverse ? f(std::integral_constant<Squash, Squash::softplus>(), std::true_type())
                   : f(std::integral_constant<Squash, Squash::softplus>(), std::false_type());
  case Squash::softclip:
    return inverse ? f(std::integral_constant<Squash, Squash::softclip>(), std::true_type())
                   : f(std::integral_constant<Squash, Squash::softclip>(), std::false_type());
  }
}

// Squashes that make the scale itself, whose logarithm is s.
template <Squash squash> constexpr bool makes_scale = squash == Squash::sigmoid || squash == Squash::softplus;

// The scale, and d log(scale) / draw. sigmoid(raw + 2) + 0.001; softplus(raw) + clamp, where clamp is the least scale.
template <Squash squash, class T> IIN_FAST_HD T scale_of(T raw, T clamp, T &derivative) {
  if constexpr (squash == Squash::sigmoid) {
    const T unit = math::sigmoid(raw + T(2)), scale = unit + T(1e-3);
    derivative = unit * (T(1) - unit) / scale;
    return scale;
  } else {
    const T scale = math::softplus(raw) + clamp;
    derivative = math::sigmoid(raw) / scale;
    return scale;
  }
}

// s of raw, for squashes whose s comes first. `clamp` bounds |s| for tanh, atan and softclip.
template <Squash squash, class T> IIN_FAST_HD T log_scale(T raw, T clamp) {
  if constexpr (squash == Squash::identity)
    return raw;
  else if constexpr (squash == Squash::tanh)
    return clamp * math::tanh(raw);
  else if constexpr (squash == Squash::atan)
    return clamp * T(0.636) * math::atan(raw);
  else if constexpr (squash == Squash::softclip)
    return raw / (T(1) + math::abs(raw / clamp));
  else {
    static_assert(squash == Squash::none);
    return T(0);
  }
}

// s and ds / draw.
template <Squash squash, class T> IIN_FAST_HD T log_scale(T raw, T clamp, T &derivative) {
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

// One element: the transformed value, and its term of the log-det of the map that is computed.
template <Squash squash, bool inverse, class T> IIN_FAST_HD T couple(T x, T raw, T shift, T clamp, T &logdet) {
  if constexpr (makes_scale<squash>) {
    T derivative;
    const T scale = scale_of<squash>(raw, clamp, derivative), s = math::log(scale);
    logdet = inverse ? -s : s;
    return inverse ? (x - shift) / scale : x * scale + shift;
  } else {
    const T s = log_scale<squash>(raw, clamp);
    logdet = inverse ? -s : s;
    if constexpr (squash == Squash::none)
      return inverse ? x - shift : x + shift;
    return inverse ? (x - shift) * math::exp(-s) : x * math::exp(s) + shift;
  }
}

template <class T> struct CouplingGradient {
  T x, raw, shift;
};

// `value` is what multiplies ds: the input x of the forward map, the output of the inverse map. dy/ds = x exp(s) is
// formed before the gradient joins: it is as large as y, so it overflows only where y does.
template <Squash squash, bool inverse, class T>
IIN_FAST_HD CouplingGradient<T> couple_backward(T value, T raw, T clamp, T grad_y, T grad_logdet) {
  T derivative, slope, grad_x; // slope: what multiplies x in the forward map
  const T sign = inverse ? T(-1) : T(1);
  if constexpr (makes_scale<squash>) {
    const T scale = scale_of<squash>(raw, clamp, derivative);
    slope = scale;
    grad_x = inverse ? grad_y / scale : grad_y * scale;
  } else {
    const T s = log_scale<squash>(raw, clamp, derivative);
    slope = squash == Squash::none ? T(1) : math::exp(sign * s);
    grad_x = squash == Squash::none ? grad_y : grad_y * slope;
  }
  const T grad_shift = inverse ? -grad_x : grad_y;
  const T grad_s = sign * (grad_y * (inverse ? value : slope * value) + grad_logdet);
  return {grad_x, grad_s * derivative, grad_shift};
}

} // namespace iin_fast
