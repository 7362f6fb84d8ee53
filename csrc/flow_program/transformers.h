// The transformers of a coupling on a tile: one feature, its rows in lanes, ld of them.
#pragma once

#include <cmath>

#include "affine_coupling/affine_coupling.h"
#include "common/pack.h"
#include "flow_program/flow_program.h"
#include "flow_program/steps.h"
#include "spline_coupling/spline_block.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

// logdet + lost += term, a vector of them.
template <class T> IIN_FAST_INLINE void add_terms(T *logdet, T *lost, Pack<T> term) {
  Pack<T> sum = Pack<T>::load(logdet), rest = Pack<T>::load(lost);
  add_term(sum, rest, term);
  sum.store(logdet), rest.store(lost);
}

// Features [first, end) of the transformed ones, coordinates `index` of x and y. raw: [raw rows, ld].
template <class T>
void affine_transform(const AffineTransformer &t, bool inverse, const T *raw, const int64_t *index, int64_t first,
                      int64_t end, int64_t ld, const T *x, T *y, T *logdet, T *lost) {
  using V = Pack<T>;
  const V clamp = static_cast<T>(t.clamp), gain = static_cast<T>(t.gain);
  const T *const shifts = raw + t.shift_at * ld, *const scales = t.scale_at < 0 ? shifts : raw + t.scale_at * ld;
  const int64_t shift_step = t.shift_step * ld, scale_step = t.scale_at < 0 ? shift_step : t.scale_step * ld;
  with_constants(static_cast<Squash>(t.squash), inverse, [&](auto squash, auto backwards) {
    for (int64_t l = 0; l < ld; l += lanes<T>) {
      V sum = V::load(logdet + l), rest = V::load(lost + l);
      for (int64_t i = first; i < end; ++i) {
        V term;
        couple<decltype(squash)::value, decltype(backwards)::value>(
            V::load(x + index[i] * ld + l), gain * V::load(scales + i * scale_step + l),
            gain * V::load(shifts + i * shift_step + l), clamp, term)
            .store(y + index[i] * ld + l);
        if constexpr (decltype(squash)::value != Squash::none)
          add_term(sum, rest, term);
      }
      sum.store(logdet + l), rest.store(lost + l);
    }
  });
}

// value: the input of the forward map, the output of the inverse map.
template <class T>
void affine_transform_backward(const AffineTransformer &t, bool inverse, const T *raw, T *grad_raw, int64_t i,
                               int64_t ld, const T *value, const T *g, const T *grad_logdet, T *gx) {
  using V = Pack<T>;
  const V clamp = static_cast<T>(t.clamp), gain = static_cast<T>(t.gain);
  const int64_t shift_at = (t.shift_at + i * t.shift_step) * ld;
  const int64_t scale_at = t.scale_at < 0 ? shift_at : (t.scale_at + i * t.scale_step) * ld;
  const auto add = [](T *to, V term) { (V::load(to) + term).store(to); };
  with_constants(static_cast<Squash>(t.squash), inverse, [&](auto squash, auto backwards) {
    for (int64_t l = 0; l < ld; l += lanes<T>) {
      const CouplingGradient<V> e = couple_backward<decltype(squash)::value, decltype(backwards)::value>(
          V::load(value + l), gain * V::load(raw + scale_at + l), clamp, V::load(g + l), V::load(grad_logdet + l));
      e.x.store(gx + l);
      add(grad_raw + shift_at + l, gain * e.shift);
      if constexpr (decltype(squash)::value != Squash::none)
        add(grad_raw + scale_at + l, gain * e.raw);
    }
  });
}

// Raw widths and heights of a feature times their gain. The gradient takes the same way.
template <class T> void scale_sizes(const SplineTransformer &t, T *raw, int64_t ld) {
  const T gain = static_cast<T>(t.gain);
  if (gain != T(1))
    each(raw, raw, 2 * t.bins * ld, [=](Pack<T> v) { return gain * v; });
}

template <class T> const T *wrapped(const SplineTransformer &t, const T *v, T *to) {
  for (int l = 0; l < block_size<T>; ++l)
    to[l] = wrapped_value(v[l], static_cast<T>(t.limits.right));
  return to;
}

// raw: [count, ld], those of this feature.
template <class T>
void spline_transform(const SplineTransformer &t, bool inverse, const T *raw, int64_t ld, const T *x, T *y, T *logdet,
                      T *lost, T *work) {
  const auto shape = spline_shape<T>(t.bins, static_cast<Tails>(t.tails), t.limits);
  with_form(static_cast<Parameterization>(t.form), inverse, [&](auto form, auto backwards) {
    for (int64_t r = 0; r < ld; r += block_size<T>) {
      alignas(64) T terms[block_size<T>], turned[block_size<T>];
      const T *const from = t.wrap && !inverse ? wrapped(t, x + r, turned) : x + r;
      spline_block_forward<decltype(form)::value, decltype(backwards)::value>(shape, raw + r, ld, from, y + r, terms,
                                                                              work);
      if (t.wrap && inverse)
        wrapped(t, y + r, y + r);
      for (int l = 0; l < block_size<T>; l += lanes<T>)
        add_terms(logdet + r + l, lost + r + l, Pack<T>::load(terms + l));
    }
  });
}

template <class T>
void spline_transform_backward(const SplineTransformer &t, bool inverse, const T *raw, T *grad_raw, int64_t ld,
                               const T *x, const T *g, const T *grad_logdet, T *gx, T *work) {
  const auto shape = spline_shape<T>(t.bins, static_cast<Tails>(t.tails), t.limits);
  with_form(static_cast<Parameterization>(t.form), inverse, [&](auto form, auto backwards) {
    for (int64_t r = 0; r < ld; r += block_size<T>) {
      alignas(64) T turned[block_size<T>];
      const T *const from = t.wrap && !inverse ? wrapped(t, x + r, turned) : x + r;
      spline_block_backward<decltype(form)::value, decltype(backwards)::value>(
          shape, raw + r, ld, from, g + r, grad_logdet + r, grad_raw + r, ld, gx + r, work);
    }
  });
  scale_sizes(t, grad_raw, ld);
}

} // namespace
} // namespace IIN_FAST_ISA
} // namespace iin_fast
