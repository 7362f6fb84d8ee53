// The monotone rational-quadratic spline of a block of elements on the CPU: an element to a lane, its raw values
// `stride` apart. Included by the *_loops.cpp of the ops that have splines; they bring the elements into this layout.
//
// The math of an element is that of spline_coupling.h, as for CUDA; here are its loops over lanes.
#pragma once

#include "common/half.h" // IIN_FAST_INLINE
#include "spline_coupling/spline_coupling.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

#define IIN_FAST_LANES _Pragma("omp simd") for (int l = 0; l < block_size<T>; ++l)

// What all elements of a call share.
template <class T> struct SplineShape {
  int64_t bins;
  Tails tails;
  SplineLimits<T> limits;
};

template <class T> SplineShape<T> spline_shape(int64_t bins, Tails tails, const SplineLimits<double> &l) {
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

// What is known of each element of a block.
template <class T> struct SplineBlock {
  alignas(64) T x[block_size<T>]; // its coordinate, held at the edges of the box
  alignas(64) T sx[block_size<T>], width[block_size<T>], sy[block_size<T>], height[block_size<T>],
      slope0[block_size<T>], slope1[block_size<T>];
  alignas(64) T raw0[block_size<T>], raw1[block_size<T>];       // raw derivatives at both ends
  alignas(64) T bin[block_size<T>];                             // its number
  alignas(64) T mass_w[block_size<T>], mass_h[block_size<T>];   // softmax mass left of the bin
  alignas(64) T share_w[block_size<T>], share_h[block_size<T>]; // and in it
  alignas(64) T over_w[block_size<T>], over_h[block_size<T>];   // 1 / sum of exponentials
  alignas(64) T used[block_size<T>];                            // backward: whether its raw values count, 1 or 0

  IIN_FAST_INLINE Segment<T> segment(int l) const { return {sx[l], width[l], sy[l], height[l], slope0[l], slope1[l]}; }
};

// Softmax numerators of the raw widths and heights, [2 bins][lane], and 1 / their sums. Both at once: one's chain of
// sums fills the gaps of the other's.
template <Parameterization form, class T>
IIN_FAST_INLINE void exponentials(const SplineShape<T> &shape, const T *raw, int64_t stride, T *numerators,
                                  SplineBlock<T> &b) {
  constexpr int block = block_size<T>;
  const SplineLimits<T> &limits = shape.limits;
  const int64_t bins = shape.bins;
  const T *const widths = raw, *const heights = raw + bins * stride;
  alignas(64) T top_w[block], top_h[block], sum_w[block], sum_h[block], lost_w[block], lost_h[block];
  IIN_FAST_LANES {
    top_w[l] = squeeze<form>(widths[l], limits);
    top_h[l] = squeeze<form>(heights[l], limits);
  }
  for (int64_t k = 1; k < bins; ++k)
    IIN_FAST_LANES {
      const T w = squeeze<form>(widths[k * stride + l], limits), h = squeeze<form>(heights[k * stride + l], limits);
      top_w[l] = math::select(w > top_w[l], w, top_w[l]);
      top_h[l] = math::select(h > top_h[l], h, top_h[l]);
    }
  IIN_FAST_LANES sum_w[l] = sum_h[l] = lost_w[l] = lost_h[l] = T(0);
  for (int64_t k = 0; k < bins; ++k)
    IIN_FAST_LANES {
      const T w = math::exp_below_zero(squeeze<form>(widths[k * stride + l], limits) - top_w[l]);
      const T h = math::exp_below_zero(squeeze<form>(heights[k * stride + l], limits) - top_h[l]);
      numerators[k * block + l] = w;
      numerators[(bins + k) * block + l] = h;
      sum_w[l] = add(sum_w[l], w, lost_w[l]);
      sum_h[l] = add(sum_h[l], h, lost_h[l]);
    }
  IIN_FAST_LANES {
    b.over_w[l] = T(1) / sum_w[l];
    b.over_h[l] = T(1) / sum_h[l];
  }
}

// Finds the bin of every lane's coordinate, by x or by y, from what `exponentials` left. What belongs to the bin is
// picked on the way along the knots, and turned into its corner and size once, behind it.
template <Parameterization form, bool by_image, class T>
IIN_FAST_INLINE void find_bins(const SplineShape<T> &shape, const T *numerators, const T *slopes /* raw */,
                               int64_t stride /* of the slopes */, SplineBlock<T> &b) {
  constexpr int block = block_size<T>;
  const SplineLimits<T> &limits = shape.limits;
  const int64_t bins = shape.bins, count = derivative_count(shape.tails, bins);
  const T wide = limits.right - limits.left, high = limits.top - limits.bottom;
  const T min_width = form == Parameterization::nflows ? limits.min_width : T(0);
  const T min_height = form == Parameterization::nflows ? limits.min_height : T(0);
  const T rest_width = T(1) - min_width * T(bins), rest_height = T(1) - min_height * T(bins);
  const T low = by_image ? limits.bottom : limits.left, side = by_image ? high : wide;
  const T minimum = by_image ? min_height : min_width, rest = by_image ? rest_height : rest_width;
  const Sides<T> sides = sides_of<by_image>(limits);
  // (not running sums of the numerators, divided at the end: a rounding more, and a third more error)
  alignas(64) T key[block], mass_w[block], mass_h[block], lost_w[block], lost_h[block];
  IIN_FAST_LANES {
    key[l] = search_key(b.x[l], sides.low, sides.high);
    mass_w[l] = mass_h[l] = lost_w[l] = lost_h[l] = T(0);
  }
  for (int64_t k = 0; k < bins; ++k) {
    const BinEnds ends = bin_ends(shape.tails, bins, k);
    // where there are no derivatives at all, what is read is not used
    const T *const left = count == 0 ? numerators : slopes + (ends.first >= 0 ? ends.first : 0) * stride;
    const T *const right = count == 0 ? numerators : slopes + (ends.second < count ? ends.second : count - 1) * stride;
    const T *const width = numerators + k * block, *const height = width + bins * block;
    const T shift = minimum * T(k);
    IIN_FAST_LANES {
      const T share_w = width[l] * b.over_w[l], share_h = height[l] * b.over_h[l];
      const bool here = (k == 0) | (key[l] >= low + side * (shift + rest * (by_image ? mass_h[l] : mass_w[l])));
      b.bin[l] = math::select(here, T(k), b.bin[l]);
      b.share_w[l] = math::select(here, share_w, b.share_w[l]);
      b.share_h[l] = math::select(here, share_h, b.share_h[l]);
      b.mass_w[l] = math::select(here, mass_w[l], b.mass_w[l]);
      b.mass_h[l] = math::select(here, mass_h[l], b.mass_h[l]);
      b.raw0[l] = math::select(here, left[l], b.raw0[l]);
      b.raw1[l] = math::select(here, right[l], b.raw1[l]);
      mass_w[l] = add(mass_w[l], share_w, lost_w[l]);
      mass_h[l] = add(mass_h[l], share_h, lost_h[l]);
    }
  }
  IIN_FAST_LANES {
    b.sx[l] = limits.left + wide * (min_width * b.bin[l] + rest_width * b.mass_w[l]);
    b.sy[l] = limits.bottom + high * (min_height * b.bin[l] + rest_height * b.mass_h[l]);
    b.width[l] = bin_size(min_width + rest_width * b.share_w[l], wide);
    b.height[l] = bin_size(min_height + rest_height * b.share_h[l], high);
    b.slope0[l] = knot_slope<form>(b.raw0[l], limits);
    b.slope1[l] = knot_slope<form>(b.raw1[l], limits);
  }
  if (shape.tails == Tails::linear)
    IIN_FAST_LANES {
      b.slope0[l] = math::select(b.bin[l] == T(0), T(1), b.slope0[l]);
      b.slope1[l] = math::select(b.bin[l] == T(bins - 1), T(1), b.slope1[l]);
    }
}

// Coordinates of a block and their bins. Leaves the softmax numerators in `work`, first.
template <Parameterization form, bool by_image, class T>
IIN_FAST_INLINE void locate(const SplineShape<T> &shape, const T *raw, int64_t stride, const T *x, T *work,
                            SplineBlock<T> &b) {
  const SplineLimits<T> &limits = shape.limits;
  const Sides<T> sides = sides_of<by_image>(limits);
  IIN_FAST_LANES b.x[l] = hold(x[l], sides.low, sides.high);
  exponentials<form>(shape, raw, stride, work, b);
  find_bins<form, by_image>(shape, work, raw + 2 * shape.bins * stride, stride, b);
}

// The map of a block: y and the log-det's term of each element. `raw` is [2 bins + derivatives][lane], its values
// `stride` apart; `work` has room for spline_work<T>(bins) elements.
template <Parameterization form, bool inverse, class T>
IIN_FAST_INLINE void spline_block_forward(const SplineShape<T> &shape, const T *raw, int64_t stride, const T *x, T *y,
                                          T *logdet, T *work) {
  const bool identity = shape.tails != Tails::none; // outside the box
  const Sides<T> sides = sides_of<inverse>(shape.limits);
  SplineBlock<T> b;
  locate<form, inverse>(shape, raw, stride, x, work, b);
  IIN_FAST_LANES y[l] = map_element<inverse>(b.segment(l), sides, x[l], b.x[l], identity, logdet[l]);
}

// Gradients of raw widths or heights, from those by the bin's corner and its size. They may take the place of `raw`.
template <Parameterization form, class T>
IIN_FAST_INLINE void softmax_backward(const SplineShape<T> &shape, const T *numerators, T scale, const T *raw,
                                      int64_t stride, const SplineBlock<T> &b, const T *over, const T *corner,
                                      const T *size, const T *mass, const T *share, T *grad_raw, int64_t grad_stride) {
  for (int64_t k = 0; k < shape.bins; ++k)
    IIN_FAST_LANES {
      const T common = corner[l] * mass[l] + size[l] * share[l];
      const T own = math::select(T(k) < b.bin[l], corner[l], math::select(T(k) == b.bin[l], size[l], T(0)));
      T g = scale * numerators[k * block_size<T> + l] * over[l] * (own - common);
      if constexpr (form == Parameterization::zuko) {
        T step;
        squeeze<form>(raw[k * stride + l], shape.limits, step);
        g *= step;
      }
      grad_raw[k * grad_stride + l] = math::select(b.used[l] == T(0), T(0), g);
    }
}

// Gradients of a block by x and the raw values, from those by y and by the log-det's terms. grad_raw may be raw, with
// the same stride.
template <Parameterization form, bool inverse, class T>
IIN_FAST_INLINE void spline_block_backward(const SplineShape<T> &shape, const T *raw, int64_t stride, const T *x,
                                           const T *grad_y, const T *grad_logdet, T *grad_raw, int64_t grad_stride,
                                           T *grad_x, T *work) {
  constexpr int block = block_size<T>;
  const SplineLimits<T> &limits = shape.limits;
  const bool identity = shape.tails != Tails::none;
  const Sides<T> sides = sides_of<inverse>(shape.limits);
  const int64_t bins = shape.bins, derivatives = derivative_count(shape.tails, bins);
  SplineBlock<T> b;
  alignas(64) T corner_x[block], size_x[block], corner_y[block], size_y[block], at0[block], at1[block];
  const T min_width = form == Parameterization::nflows ? limits.min_width : T(0);
  const T min_height = form == Parameterization::nflows ? limits.min_height : T(0);
  const T scale_x = (limits.right - limits.left) * (T(1) - min_width * T(bins));
  const T scale_y = (limits.top - limits.bottom) * (T(1) - min_height * T(bins));
  locate<form, inverse>(shape, raw, stride, x, work, b);
  IIN_FAST_LANES {
    const ElementGradient<T> e =
        map_element_backward<inverse>(b.segment(l), sides, x[l], b.x[l], identity, grad_y[l], grad_logdet[l]);
    corner_x[l] = e.corner_x, size_x[l] = e.size_x, corner_y[l] = e.corner_y, size_y[l] = e.size_y;
    at0[l] = math::select(e.same, T(0), e.slope0 * knot_slope_derivative<form>(b.raw0[l], b.slope0[l], limits));
    at1[l] = math::select(e.same, T(0), e.slope1 * knot_slope_derivative<form>(b.raw1[l], b.slope1[l], limits));
    b.used[l] = math::select(e.same, T(0), T(1));
    grad_x[l] = e.x;
  }
  softmax_backward<form>(shape, work, scale_x, raw, stride, b, b.over_w, corner_x, size_x, b.mass_w, b.share_w,
                         grad_raw, grad_stride);
  softmax_backward<form>(shape, work + bins * block, scale_y, raw + bins * stride, stride, b, b.over_h, corner_y,
                         size_y, b.mass_h, b.share_h, grad_raw + bins * grad_stride, grad_stride);
  T *const slopes = grad_raw + 2 * bins * grad_stride;
  const int64_t shift = shape.tails == Tails::linear ? 1 : 0;
  for (int64_t d = 0; d < derivatives; ++d) {
    const T knot = T(d + shift); // this raw value is the left end of bin `knot` and the right end of the one before
    const T before = shape.tails == Tails::circular && d == 0 ? T(bins - 1) : knot - T(1);
    IIN_FAST_LANES slopes[d * grad_stride + l] =
        math::select(b.bin[l] == knot, at0[l], T(0)) + math::select(b.bin[l] == before, at1[l], T(0));
  }
}

} // namespace
} // namespace IIN_FAST_ISA
} // namespace iin_fast
