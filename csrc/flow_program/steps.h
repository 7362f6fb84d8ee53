// The elementwise steps of a net on a tile, and their gradients. `count` elements; a gradient is stored, or added to
// what is there.
#pragma once

#include <cmath>

#include "common/math.h"
#include "common/simd.h"
#include "common/sum.h"
#include "flow_program/flow_program.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

template <class T> IIN_FAST_INLINE void copy(const T *from, T *to, int64_t count) {
  __builtin_memcpy(to, from, count * sizeof(T));
}

// sum + lost += term, compensated. `lost` stays below a unit of the sum: what equal terms lose is of one sign, and
// would grow until it lost digits of its own.
template <class T> IIN_FAST_INLINE void add_term(T &sum, T &lost, T term) {
  CompensatedSum<T> s{sum, lost};
  s.add(term);
  sum = s.total();
  lost = s.lost - (sum - s.value);
}

// An accumulator before its first term.
template <class T> IIN_FAST_INLINE void begin(T *sums, int64_t count, bool add) {
  if (!add)
    __builtin_memset(sums, 0, count * sizeof(T));
}

// sums[i][lane] += the rows of value i that share a lane. Those from `rows` on repeat the last one: they would make NaN
// of an infinite sum.
template <class T> void sum_rows(const T *values, int64_t count, int64_t ld, int64_t rows, T *sums) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < ld; r += block_size<T>)
#pragma omp simd
      for (int l = 0; l < block_size<T>; ++l)
        sums[i * 16 + l] += math::select(r + l < rows, values[i * ld + r + l], T(0));
}

template <class T, class F> IIN_FAST_INLINE void each(const T *from, T *to, int64_t count, F f) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    to[i] = f(from[i]);
}

template <class T> T gelu_cdf(T x) { return T(0.5) * (T(1) + std::erf(x * T(0.70710678118654752440))); }

// NaN passes through all of them.
template <class T> void activate(Activation activation, T slope, const T *x, T *y, int64_t count) {
  switch (activation) {
  case Activation::none:
    return each(x, y, count, [](T v) { return v; });
  case Activation::relu:
    return each(x, y, count, [](T v) { return math::select(v < T(0), T(0), v); });
  case Activation::leaky_relu:
    return each(x, y, count, [=](T v) { return math::select(v > T(0), v, slope * v); });
  case Activation::elu:
    return each(x, y, count, [=](T v) {
      const T held = math::select(v < T(-64), T(-64), math::select(v > T(0), T(0), v)); // exp(-64) - 1 is -1
      return math::select(v > T(0), v, slope * math::expm1_bounded(held));
    });
  case Activation::silu:
    return each(x, y, count, [](T v) { return v * math::sigmoid(v); });
  case Activation::gelu:
    for (int64_t i = 0; i < count; ++i)
      y[i] = x[i] * gelu_cdf(x[i]);
    return;
  case Activation::tanh:
    return each(x, y, count, [](T v) { return math::tanh(v); });
  case Activation::sigmoid:
    return each(x, y, count, [](T v) { return math::sigmoid(v); });
  case Activation::atan:
    return each(x, y, count, [](T v) { return math::atan(v); });
  }
}

template <class T, class F>
IIN_FAST_INLINE void each_gradient(const T *at, const T *g, T *to, int64_t count, bool add, F derivative) {
  if (add) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      to[i] += derivative(at[i], g[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      to[i] = derivative(at[i], g[i]);
  }
}

// From the gradient g by y to that by x. x is read by silu, gelu and atan alone: the others may have overwritten it by
// y.
template <class T>
void activate_backward(Activation activation, T slope, const T *x, const T *y, const T *g, T *to, int64_t count,
                       bool add) {
  switch (activation) {
  case Activation::none:
    return each_gradient(y, g, to, count, add, [](T, T d) { return d; });
  case Activation::relu:
    return each_gradient(y, g, to, count, add, [](T v, T d) { return math::select(v <= T(0), T(0), d); });
  case Activation::leaky_relu:
    return each_gradient(y, g, to, count, add, [=](T v, T d) { return math::select(v > T(0), d, slope * d); });
  case Activation::elu:
    return each_gradient(y, g, to, count, add, [=](T v, T d) { return math::select(v > T(0), d, d * (v + slope)); });
  case Activation::silu:
    return each_gradient(x, g, to, count, add, [](T v, T d) {
      const T s = math::sigmoid(v);
      return d * (s * (T(1) + v * (T(1) - s)));
    });
  case Activation::gelu:
    for (int64_t i = 0; i < count; ++i) {
      const T v = x[i];
      const T slope_at = gelu_cdf(v) + v * T(0.39894228040143267794) * std::exp(T(-0.5) * v * v);
      to[i] = (add ? to[i] : T(0)) + g[i] * slope_at;
    }
    return;
  case Activation::tanh:
    return each_gradient(y, g, to, count, add, [](T v, T d) { return d * (T(1) - v * v); });
  case Activation::sigmoid:
    return each_gradient(y, g, to, count, add, [](T v, T d) { return d * v * (T(1) - v); });
  case Activation::atan:
    return each_gradient(x, g, to, count, add, [](T v, T d) { return d / (T(1) + v * v); });
  }
}

template <class T> void add_values(const T *a, const T *b, T *out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    out[i] = a[i] + b[i];
}

template <class T> void gate_values(const T *a, const T *gate, T *out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    out[i] = a[i] * math::sigmoid(gate[i]);
}

template <class T>
void gate_backward(const T *a, const T *gate, const T *g, T *to_a, int64_t count, bool add_a, T *to_gate,
                   bool add_gate) {
  for (int64_t i = 0; i < count; i += block_size<T>) {
    alignas(64) T for_a[block_size<T>], for_gate[block_size<T>];
#pragma omp simd
    for (int l = 0; l < block_size<T>; ++l) {
      const T s = math::sigmoid(gate[i + l]), d = g[i + l];
      for_a[l] = d * s;
      for_gate[l] = d * a[i + l] * s * (T(1) - s);
    }
    if (to_a != nullptr)
      for (int l = 0; l < block_size<T>; ++l)
        to_a[i + l] = (add_a ? to_a[i + l] : T(0)) + for_a[l];
    if (to_gate != nullptr)
      for (int l = 0; l < block_size<T>; ++l)
        to_gate[i + l] = (add_gate ? to_gate[i + l] : T(0)) + for_gate[l];
  }
}

template <class T> void pass_gradient(const T *g, T *to, int64_t count, bool add) {
  if (!add)
    return copy(g, to, count);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    to[i] += g[i];
}

} // namespace
} // namespace IIN_FAST_ISA
} // namespace iin_fast
