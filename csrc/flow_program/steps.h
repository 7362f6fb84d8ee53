// The elementwise steps of a net on a tile, and their gradients. `count` elements, whole vectors; a gradient is stored,
// or added to what is there.
#pragma once

#include "common/pack.h"
#include "flow_program/elementwise.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

template <class T> IIN_FAST_INLINE void copy(const T *from, T *to, int64_t count) {
  __builtin_memcpy(to, from, count * sizeof(T));
}

// An accumulator before its first term.
template <class T> IIN_FAST_INLINE void begin(T *sums, int64_t count, bool add) {
  if (!add)
    __builtin_memset(sums, 0, count * sizeof(T));
}

// sums[i][lane] += the rows of value i that share a lane. Those from `rows` on repeat the last one: they would make NaN
// of an infinite sum.
template <class T> void sum_rows(const T *values, int64_t count, int64_t ld, int64_t rows, T *sums) {
  using V = Pack<T>;
  for (int64_t r = 0; r < ld; r += block_size<T>) {
    alignas(64) T inside[block_size<T>];
    for (int l = 0; l < block_size<T>; ++l)
      inside[l] = r + l < rows ? T(1) : T(0);
    for (int l = 0; l < block_size<T>; l += lanes<T>) {
      const Mask<T> here = V::load(inside + l) > V(T(0));
      for (int64_t i = 0; i < count; ++i) {
        const V term = math::select(here, V::load(values + i * ld + r + l), V(T(0)));
        (V::load(sums + i * 16 + l) + term).store(sums + i * 16 + l);
      }
    }
  }
}

template <class T, class F> IIN_FAST_INLINE void each(const T *from, T *to, int64_t count, F f) {
  for (int64_t i = 0; i < count; i += lanes<T>)
    f(Pack<T>::load(from + i)).store(to + i);
}

template <class T> void activate(Activation activation, T slope, const T *x, T *y, int64_t count) {
  with_activation(activation, [&](auto kind) {
    each(x, y, count, [=](Pack<T> v) { return activated<decltype(kind)::value>(v, Pack<T>(slope)); });
  });
}

template <class T, class F>
IIN_FAST_INLINE void each_gradient(const T *at, const T *g, T *to, int64_t count, bool add, F derivative) {
  for (int64_t i = 0; i < count; i += lanes<T>) {
    const Pack<T> d = derivative(Pack<T>::load(at + i), Pack<T>::load(g + i));
    (add ? Pack<T>::load(to + i) + d : d).store(to + i);
  }
}

// From the gradient g by y to that by x, which y may have overwritten where the derivative can be had from y.
template <class T>
void activate_backward(Activation activation, T slope, const T *x, const T *y, const T *g, T *to, int64_t count,
                       bool add) {
  with_activation(activation, [&](auto kind) {
    constexpr Activation a = decltype(kind)::value;
    each_gradient(derivative_reads_input(a) ? x : y, g, to, count, add,
                  [=](Pack<T> v, Pack<T> d) { return activated_backward<a>(v, d, Pack<T>(slope)); });
  });
}

template <class T> void add_values(const T *a, const T *b, T *out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    out[i] = a[i] + b[i];
}

template <class T> void gate_values(const T *a, const T *gate, T *out, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<T>)
    gated(Pack<T>::load(a + i), Pack<T>::load(gate + i)).store(out + i);
}

template <class T>
void gate_backward(const T *a, const T *gate, const T *g, T *to_a, int64_t count, bool add_a, T *to_gate,
                   bool add_gate) {
  using V = Pack<T>;
  for (int64_t i = 0; i < count; i += lanes<T>) {
    const GateGradient<V> d = gated_backward(V::load(a + i), V::load(gate + i), V::load(g + i));
    if (to_a != nullptr)
      (add_a ? V::load(to_a + i) + d.a : d.a).store(to_a + i);
    if (to_gate != nullptr)
      (add_gate ? V::load(to_gate + i) + d.gate : d.gate).store(to_gate + i);
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
