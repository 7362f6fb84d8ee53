// The monotone rational-quadratic spline of a block of elements on the CPU: an element to a lane, its raw values
// `stride` apart. Included by the *_loops.cpp of the ops that have splines; they bring the elements into this layout.
//
// The math of an element is that of spline_coupling.h, as for CUDA; here are its passes over the bins, for one vector
// of elements after the other.
#pragma once

#include "common/pack.h"
#include "spline_coupling/spline_coupling.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

// What all elements of a call share. V: a Pack.
template <class V> struct SplineShape {
  int64_t bins;
  Tails tails;
  SplineLimits<V> limits;
};

template <class T> SplineShape<Pack<T>> spline_shape(int64_t bins, Tails tails, const SplineLimits<double> &l) {
  return {bins,
          tails,
          {T(l.left), T(l.right), T(l.bottom), T(l.top), T(l.min_width), T(l.min_height), T(l.min_derivative),
           T(l.softness)}};
}

// Calls f with the form and the direction as compile-time constants.
template <class F> void with_form(Parameterization form, bool inverse, F &&f) {
  using N = std::integral_constant<Parameterization, Parameterization::nflows>;
  using Z = std::integral_constant<Parameterization, Parameterization::zuko>;
  if (form == Parameterization::nflows)
    inverse ? f(N(), std::true_type()) : f(N(), std::false_type());
  else
    inverse ? f(Z(), std::true_type()) : f(Z(), std::false_type());
}

// What is known of each element of a vector.
template <class V> struct SplineElement {
  V x; // its coordinate, held at the edges of the box
  Segment<V> segment;
  V raw0, raw1;       // raw derivatives at both ends of its bin
  V bin;              // the number of that
  V mass_w, mass_h;   // softmax mass left of the bin
  V share_w, share_h; // and in it
  V over_w, over_h;   // 1 / sum of exponentials
};

// Softmax numerators of the raw widths and heights, [2 bins][lane], and 1 / their sums. Both at once: one's chain of
// sums fills the gaps of the other's.
template <Parameterization form, class T>
IIN_FAST_INLINE void exponentials(const SplineShape<Pack<T>> &shape, const T *raw, int64_t stride, T *numerators,
                                  SplineElement<Pack<T>> &e) {
  using V = Pack<T>;
  const int64_t bins = shape.bins;
  const auto at = [&](int64_t k)
                      __attribute__((always_inline)) { return squeeze<form>(V::load(raw + k * stride), shape.limits); };
  constexpr bool kept = form == Parameterization::zuko; // squeezed once
  V top_w = at(0), top_h = at(bins);
  for (int64_t k = 0; k < bins; ++k) {
    const V w = at(k), h = at(bins + k);
    top_w = math::select(w > top_w, w, top_w);
    top_h = math::select(h > top_h, h, top_h);
    if (kept)
      w.store(numerators + k * lanes<T>), h.store(numerators + (bins + k) * lanes<T>);
  }
  V sum_w = T(0), sum_h = T(0), lost_w = T(0), lost_h = T(0);
  for (int64_t k = 0; k < bins; ++k) {
    T *const to_w = numerators + k * lanes<T>, *const to_h = numerators + (bins + k) * lanes<T>;
    const V w = math::exp_below_zero((kept ? V::load(to_w) : at(k)) - top_w);
    const V h = math::exp_below_zero((kept ? V::load(to_h) : at(bins + k)) - top_h);
    w.store(to_w), h.store(to_h);
    sum_w = add(sum_w, w, lost_w);
    sum_h = add(sum_h, h, lost_h);
  }
  e.over_w = V(T(1)) / sum_w;
  e.over_h = V(T(1)) / sum_h;
}

// Finds the bin of every lane's coordinate, by x or by y, from what `exponentials` left. What belongs to the bin is
// picked on the way along the knots, and turned into its corner and size once, behind it.
template <Parameterization form, bool by_image, class T>
IIN_FAST_INLINE void find_bins(const SplineShape<Pack<T>> &shape, const T *numerators, const T *slopes /* raw */,
                               int64_t stride /* of the slopes */, SplineElement<Pack<T>> &e) {
  using V = Pack<T>;
  const SplineLimits<V> &limits = shape.limits;
  const int64_t bins = shape.bins, count = derivative_count(shape.tails, bins);
  const V wide = limits.right - limits.left, high = limits.top - limits.bottom;
  const V min_width = form == Parameterization::nflows ? limits.min_width : V(T(0));
  const V min_height = form == Parameterization::nflows ? limits.min_height : V(T(0));
  const V rest_width = V(T(1)) - min_width * V(T(bins)), rest_height = V(T(1)) - min_height * V(T(bins));
  const V low = by_image ? limits.bottom : limits.left, side = by_image ? high : wide;
  const V minimum = by_image ? min_height : min_width, rest = by_image ? rest_height : rest_width;
  const Sides<V> sides = sides_of<by_image>(limits);
  const V key = search_key(e.x, sides.low, sides.high);
  // (not running sums of the numerators, divided at the end: a rounding more, and a third more error)
  V mass_w = T(0), mass_h = T(0), lost_w = T(0), lost_h = T(0);
  for (int64_t k = 0; k < bins; ++k) {
    const BinEnds ends = bin_ends(shape.tails, bins, k);
    // where there are no derivatives at all, what is read is not used
    const V left = V::load(count == 0 ? numerators : slopes + (ends.first >= 0 ? ends.first : 0) * stride);
    const V right =
        V::load(count == 0 ? numerators : slopes + (ends.second < count ? ends.second : count - 1) * stride);
    const V share_w = V::load(numerators + k * lanes<T>) * e.over_w;
    const V share_h = V::load(numerators + (bins + k) * lanes<T>) * e.over_h;
    const Mask<T> here =
        Mask<T>(k == 0) | (key >= low + side * (minimum * V(T(k)) + rest * (by_image ? mass_h : mass_w)));
    e.bin = math::select(here, V(T(k)), e.bin);
    e.share_w = math::select(here, share_w, e.share_w);
    e.share_h = math::select(here, share_h, e.share_h);
    e.mass_w = math::select(here, mass_w, e.mass_w);
    e.mass_h = math::select(here, mass_h, e.mass_h);
    e.raw0 = math::select(here, left, e.raw0);
    e.raw1 = math::select(here, right, e.raw1);
    mass_w = add(mass_w, share_w, lost_w);
    mass_h = add(mass_h, share_h, lost_h);
  }
  Segment<V> &s = e.segment;
  s.x = limits.left + wide * (min_width * e.bin + rest_width * e.mass_w);
  s.y = limits.bottom + high * (min_height * e.bin + rest_height * e.mass_h);
  s.width = bin_size(min_width + rest_width * e.share_w, wide);
  s.height = bin_size(min_height + rest_height * e.share_h, high);
  s.slope0 = knot_slope<form>(e.raw0, limits);
  s.slope1 = knot_slope<form>(e.raw1, limits);
  if (shape.tails == Tails::linear) {
    s.slope0 = math::select(e.bin == V(T(0)), V(T(1)), s.slope0);
    s.slope1 = math::select(e.bin == V(T(bins - 1)), V(T(1)), s.slope1);
  }
}

// Coordinates and their bins. Leaves the softmax numerators in `work`, first.
template <Parameterization form, bool by_image, class T>
IIN_FAST_INLINE SplineElement<Pack<T>> locate(const SplineShape<Pack<T>> &shape, const T *raw, int64_t stride,
                                              Pack<T> x, T *work) {
  const Sides<Pack<T>> sides = sides_of<by_image>(shape.limits);
  SplineElement<Pack<T>> e{};
  e.x = hold(x, sides.low, sides.high);
  exponentials<form>(shape, raw, stride, work, e);
  find_bins<form, by_image>(shape, work, raw + 2 * shape.bins * stride, stride, e);
  return e;
}

// The map of a block: y and the log-det's term of each element. `raw` is [2 bins + derivatives][lane], its values
// `stride` apart; `work` has room for spline_work<T>(bins) elements.
template <Parameterization form, bool inverse, class T>
IIN_FAST_INLINE void spline_block_forward(const SplineShape<Pack<T>> &shape, const T *raw, int64_t stride, const T *x,
                                          T *y, T *logdet, T *work) {
  using V = Pack<T>;
  const bool identity = shape.tails != Tails::none; // outside the box
  const Sides<V> sides = sides_of<inverse>(shape.limits);
  for (int l = 0; l < block_size<T>; l += lanes<T>) {
    const V value = V::load(x + l);
    const SplineElement<V> e = locate<form, inverse>(shape, raw + l, stride, value, work);
    V term;
    map_element<inverse>(e.segment, sides, value, e.x, identity, term).store(y + l);
    term.store(logdet + l);
  }
}

// Gradients of raw widths or heights where `used`, from those by the bin's corner and its size. They may take the place
// of `raw`.
template <Parameterization form, class T>
IIN_FAST_INLINE void softmax_backward(const SplineShape<Pack<T>> &shape, const T *numerators, Pack<T> scale,
                                      const T *raw, int64_t stride, Pack<T> bin, Mask<T> used, Pack<T> corner,
                                      Pack<T> size, Pack<T> mass, Pack<T> share, T *grad_raw, int64_t grad_stride) {
  using V = Pack<T>;
  const V zero = T(0), common = corner * mass + size * share;
  for (int64_t k = 0; k < shape.bins; ++k) {
    const V own = math::select(V(T(k)) < bin, corner, math::select(V(T(k)) == bin, size, zero));
    V g = scale * V::load(numerators + k * lanes<T>) * (own - common);
    if constexpr (form == Parameterization::zuko) {
      V step;
      squeeze<form>(V::load(raw + k * stride), shape.limits, step);
      g *= step;
    }
    math::select(used, g, zero).store(grad_raw + k * grad_stride);
  }
}

// Gradients of a block by x and the raw values, from those by y and by the log-det's terms. grad_raw may be raw, with
// the same stride.
template <Parameterization form, bool inverse, class T>
IIN_FAST_INLINE void spline_block_backward(const SplineShape<Pack<T>> &shape, const T *raw, int64_t stride, const T *x,
                                           const T *grad_y, const T *grad_logdet, T *grad_raw, int64_t grad_stride,
                                           T *grad_x, T *work) {
  using V = Pack<T>;
  const SplineLimits<V> &limits = shape.limits;
  const bool identity = shape.tails != Tails::none;
  const Sides<V> sides = sides_of<inverse>(limits);
  const int64_t bins = shape.bins, derivatives = derivative_count(shape.tails, bins);
  const V zero = T(0), one = T(1);
  const V min_width = form == Parameterization::nflows ? limits.min_width : zero;
  const V min_height = form == Parameterization::nflows ? limits.min_height : zero;
  const V scale_x = (limits.right - limits.left) * (one - min_width * V(T(bins)));
  const V scale_y = (limits.top - limits.bottom) * (one - min_height * V(T(bins)));
  for (int l = 0; l < block_size<T>; l += lanes<T>) {
    const V value = V::load(x + l);
    const SplineElement<V> e = locate<form, inverse>(shape, raw + l, stride, value, work);
    const ElementGradient<V> g = map_element_backward<inverse>(e.segment, sides, value, e.x, identity,
                                                               V::load(grad_y + l), V::load(grad_logdet + l));
    const V slope0 = g.slope0 * knot_slope_derivative<form>(e.raw0, e.segment.slope0, limits);
    const V slope1 = g.slope1 * knot_slope_derivative<form>(e.raw1, e.segment.slope1, limits);
    const V at0 = math::select(g.same, zero, slope0), at1 = math::select(g.same, zero, slope1);
    softmax_backward<form>(shape, work, scale_x * e.over_w, raw + l, stride, e.bin, !g.same, g.corner_x, g.size_x,
                           e.mass_w, e.share_w, grad_raw + l, grad_stride);
    softmax_backward<form>(shape, work + bins * lanes<T>, scale_y * e.over_h, raw + l + bins * stride, stride, e.bin,
                           !g.same, g.corner_y, g.size_y, e.mass_h, e.share_h, grad_raw + l + bins * grad_stride,
                           grad_stride);
    T *const slopes = grad_raw + l + 2 * bins * grad_stride;
    const int64_t shift = shape.tails == Tails::linear ? 1 : 0;
    for (int64_t d = 0; d < derivatives; ++d) {
      const T knot = T(d + shift); // this raw value is the left end of bin `knot` and the right end of the one before
      const T before = shape.tails == Tails::circular && d == 0 ? T(bins - 1) : knot - T(1);
      (math::select(e.bin == V(knot), at0, zero) + math::select(e.bin == V(before), at1, zero))
          .store(slopes + d * grad_stride);
    }
    g.x.store(grad_x + l);
  }
}

} // namespace
} // namespace IIN_FAST_ISA
} // namespace iin_fast
