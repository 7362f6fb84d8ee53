// The monotone rational-quadratic spline of one element, for host and device (Durkan et al. 2019, Sec. 3.1, Eq. 4-8). T
// is a number, or a Pack of them.
//
// K bins; raw widths and heights become bin sizes through a softmax, raw derivatives become slopes at the knots.
// Nothing of it is stored: one pass finds the largest raw value, one sums the exponentials, one walks along the knots
// until the bin of the coordinate is found. The passes are the loops' and the kernels' own; what they do at each step
// is here. The reference for all of it is iin_fast/ops/spline_coupling/reference.py.
#pragma once

#include "common/math.h"

namespace iin_fast {

// Values are part of the op's schema (iin_fast/ops/spline_coupling/__init__.py holds the names).
enum class Tails : int64_t { linear = 0, none = 1, circular = 2 };
enum class Parameterization : int64_t { nflows = 0, zuko = 1 };

// Raw derivatives that an element brings: the inner knots, all knots, or all but the last, which is the first again.
IIN_FAST_HD int64_t derivative_count(Tails tails, int64_t bins) {
  return tails == Tails::linear ? bins - 1 : tails == Tails::none ? bins + 1 : bins;
}

// Raw derivatives at the two ends of a bin, counted from the first one; those of linear tails lie outside of
// [0, derivative_count) for the outer knots, which have none.
struct BinEnds {
  int64_t first, second;
};
IIN_FAST_HD BinEnds bin_ends(Tails tails, int64_t bins, int64_t bin) {
  const int64_t first = tails == Tails::linear ? bin - 1 : bin;
  return {first, tails == Tails::circular && bin + 1 == bins ? 0 : first + 1};
}

// Elements that the CPU loops work on side by side: 64 bytes of them. And elements of memory that a block needs.
template <class T> constexpr int block_size = 64 / sizeof(T);
template <class T> constexpr int64_t spline_work(int64_t bins) { return 2 * bins * block_size<T>; }

// sum += term, with what rounding takes away kept in `lost` (Kahan): knots are differences of running sums.
template <class T> IIN_FAST_HD T add(T sum, T term, T &lost) {
  const T corrected = term - lost, next = sum + corrected;
  lost = (next - sum) - corrected;
  return next;
}

template <class T> struct SplineLimits {
  T left, right, bottom, top;
  T min_width, min_height, min_derivative; // nflows
  T softness;                              // zuko: 1 / log(slope)
};

// The sides of the box along which a coordinate and its image lie.
template <class T> struct Sides {
  T low, high, image_low, image_high;
};
template <bool inverse, class T> IIN_FAST_HD Sides<T> sides_of(const SplineLimits<T> &l) {
  if constexpr (inverse)
    return {l.bottom, l.top, l.left, l.right};
  else
    return {l.left, l.right, l.bottom, l.top};
}

// A raw width or height as it enters the softmax; `derivative` is that of this step.
template <Parameterization form, class T> IIN_FAST_HD T squeeze(T raw, const SplineLimits<T> &limits, T &derivative) {
  if constexpr (form == Parameterization::nflows) {
    derivative = T(1);
    return raw;
  } else {
    const T shrink = T(1) / (T(1) + math::abs(T(2) * raw * limits.softness));
    derivative = shrink * shrink;
    return raw * shrink;
  }
}

template <Parameterization form, class T> IIN_FAST_HD T squeeze(T raw, const SplineLimits<T> &limits) {
  T derivative;
  return squeeze<form>(raw, limits, derivative);
}

// The slope at a knot. That of an infinite raw value is NaN, so that no map comes out finite.
template <Parameterization form, class T> IIN_FAST_HD T knot_slope(T raw, const SplineLimits<T> &limits) {
  if constexpr (form == Parameterization::nflows)
    return limits.min_derivative + (math::softplus(raw) + T(0) * raw);
  else
    return math::exp(raw / (T(1) + math::abs(raw * limits.softness)));
}

// Its derivative by the raw value.
template <Parameterization form, class T>
IIN_FAST_HD T knot_slope_derivative(T raw, T slope, const SplineLimits<T> &limits) {
  if constexpr (form == Parameterization::nflows) {
    return math::sigmoid(raw);
  } else {
    const T shrink = T(1) / (T(1) + math::abs(raw * limits.softness));
    return slope * shrink * shrink;
  }
}

// The bin of one element: lower left knot, size, slopes at both ends.
template <class T> struct Segment {
  T x, width, y, height, slope0, slope1;
};

// A coordinate, held at the edges of the box. NaN stays NaN, and does not lie outside.
template <class T> IIN_FAST_HD T hold(T value, T low, T high) {
  return math::select(value > high, high, math::select(value < low, low, value));
}

// What the search for the bin compares with the knots: the ends of the box lie in the first and the last bin, also
// where rounding puts other knots on them. NaN lies in the first one.
template <class T> IIN_FAST_HD T search_key(T within, T low, T high) {
  const T infinity = T(math::Limits<T>::infinity());
  return math::select(within >= high, infinity, math::select(within > low, within, -infinity));
}

// The size of a bin, from its part of the box. A bin that is too small to be seen holds an end of the box at most; it
// is given some size, so that slopes there are finite.
template <class T> IIN_FAST_HD T bin_size(T part, T side) {
  const T least = T(math::Limits<T>::epsilon() / 4);
  return side * math::select(part < least, least, part);
}

// The position in a bin whose image lies at `share` of its height: the root of Eq. 29-32 of the paper's appendix, made
// of sums of positive terms, so that no rounding takes it out of [0, 1]. `rest`: 1 - position, as exact where it is
// small.
template <class T> IIN_FAST_HD T root(const Segment<T> &s, T share, T &rest) {
  const T other = T(1) - share;
  const T half = (s.slope0 * other - s.slope1 * share) * s.width / (T(2) * s.height);
  const math::Truth<T> rising = half >= T(0);
  const T far = math::abs(half) + math::sqrt(half * half + share * other);
  const T before = math::select(rising, share, far), after = math::select(rising, far, other);
  const T sum = math::select(before + after == T(0), T(1), before + after); // 0: slopes of 0, at a knot
  rest = after / sum;
  return before / sum;
}

// Where in its bin a coordinate lies, in [0, 1], and 1 - that. At the upper edge of the box it is exactly 1: what a
// quotient rounds away from it, the bend of a narrow bin multiplies. (The lower edge is the first knot.) NaN stays NaN.
template <bool inverse, class T> IIN_FAST_HD T position(const Segment<T> &s, T within, T high, T &rest) {
  T share = inverse ? (within - s.y) / s.height : (within - s.x) / s.width;
  share = hold(share, T(0), T(1));
  share = math::select((within >= high) & (share >= T(0)), T(1), share);
  if constexpr (inverse)
    return root(s, share, rest);
  rest = T(1) - share;
  return share;
}

// What the map gives, held in the box; that of the upper edge is the upper edge. NaN stays NaN.
template <class T> IIN_FAST_HD T held(T result, math::Truth<T> at_end, T low, T high) {
  return math::select(at_end & (result >= low), high, hold(result, low, high));
}

// y and log dy/dx at a position.
template <class T> IIN_FAST_HD T image(const Segment<T> &s, T theta, T rest, T &logdet) {
  const T delta = s.height / s.width, mixed = theta * rest;
  const T denominator = delta + (s.slope0 + s.slope1 - T(2) * delta) * mixed;
  const T numerator = s.slope1 * theta * theta + T(2) * delta * mixed + s.slope0 * rest * rest;
  const T ratio = delta / denominator;
  logdet = math::log(numerator) + T(2) * math::log(ratio);
  return s.y + s.height * (delta * theta * theta + s.slope0 * mixed) / denominator;
}

template <class T> struct SegmentGradient {
  T x, width, y, height, slope0, slope1, theta; // theta: by the coordinate, times the width
};

// Gradients of grad_y * y + grad_logdet * logdet by the bin, x held fixed.
template <class T>
IIN_FAST_HD SegmentGradient<T> image_backward(const Segment<T> &s, T theta, T rest, T grad_y, T grad_logdet) {
  const T delta = s.height / s.width, mixed = theta * rest, square = theta * theta;
  const T bend = s.slope0 + s.slope1 - T(2) * delta;
  const T denominator = delta + bend * mixed, over = T(1) / denominator;
  const T numerator = s.slope1 * square + T(2) * delta * mixed + s.slope0 * rest * rest, below = T(1) / numerator;
  const T rational = (delta * square + s.slope0 * mixed) * over;
  const T grad_rational = grad_y * s.height;
  SegmentGradient<T> g;
  g.theta = grad_rational * delta * numerator * over * over +
            grad_logdet * ((T(2) * s.slope1 * theta + T(2) * delta * (rest - theta) - T(2) * s.slope0 * rest) * below -
                           T(2) * bend * (rest - theta) * over);
  const T grad_delta = grad_rational * (square - rational * (T(1) - T(2) * mixed)) * over +
                       grad_logdet * (T(2) / delta + T(2) * mixed * below - T(2) * (T(1) - T(2) * mixed) * over);
  g.slope0 =
      grad_rational * mixed * (T(1) - rational) * over + grad_logdet * (rest * rest * below - T(2) * mixed * over);
  g.slope1 = -grad_rational * mixed * rational * over + grad_logdet * (square * below - T(2) * mixed * over);
  const T inverse_width = T(1) / s.width;
  g.x = -g.theta * inverse_width;
  g.width = -(g.theta * theta + grad_delta * delta) * inverse_width;
  g.y = grad_y;
  g.height = grad_y * rational + grad_delta * inverse_width;
  return g;
}

// The element's value and its term of the log-det. `identity`: outside the box nothing changes; else a straight line of
// the outer slope goes on from its edge.
template <bool inverse, class T>
IIN_FAST_HD T map_element(const Segment<T> &s, const Sides<T> &sides, T value, T within, bool identity, T &logdet) {
  T rest;
  const T theta = position<inverse>(s, within, sides.high, rest);
  T slope_log;
  const T mapped = image(s, theta, rest, slope_log);
  const T result =
      held(inverse ? s.x + s.width * theta : mapped, within >= sides.high, sides.image_low, sides.image_high);
  const T edge = math::select(value > within, s.slope1, s.slope0);
  const T beyond = result + (value - within) * (inverse ? T(1) / edge : edge);
  const math::Truth<T> outside = (value > within) | (value < within), same = outside & identity;
  logdet = math::select(same, T(0), inverse ? -slope_log : slope_log);
  return math::select(same, value, math::select(outside, beyond, result));
}

// Gradients of an element by its coordinate, by the lower left corner of its bin, its size, and the slopes at its ends.
// `same`: the element is the identity, and its raw values have no gradient, finite or not.
template <class T> struct ElementGradient {
  T x, corner_x, size_x, corner_y, size_y, slope0, slope1;
  math::Truth<T> same;
};

template <bool inverse, class T>
IIN_FAST_HD ElementGradient<T> map_element_backward(const Segment<T> &s, const Sides<T> &sides, T value, T within,
                                                    bool identity, T grad_y, T grad_logdet) {
  T rest;
  const T theta = position<inverse>(s, within, sides.high, rest), excess = value - within;
  const math::Truth<T> above = value > within, outside = above | (value < within), same = outside & identity;
  T slope_log;
  image(s, theta, rest, slope_log);
  const T slope = math::select(outside, math::select(above, s.slope1, s.slope0), math::exp(slope_log));
  T from_y = grad_y, from_logdet = grad_logdet, result = T(0);
  if constexpr (inverse) {
    // x = f^-1(y): dx = (dy - f_p dp) / f_x, log-det = -log f_x; at fixed x the log-det moves x as well
    const SegmentGradient<T> curve = image_backward(s, theta, rest, T(0), T(1));
    const T curvature = math::select(outside, T(0), curve.theta / s.width);
    result = (grad_y - grad_logdet * curvature) / slope;
    from_y = -result;
    from_logdet = -grad_logdet;
  }
  SegmentGradient<T> g = image_backward(s, theta, rest, from_y, from_logdet);
  if constexpr (!inverse)
    result = math::select(outside, from_y * slope, g.theta / s.width);
  // beyond the box the coordinate is held at its edge, and a straight line of the outer slope goes on from there
  const T beyond = from_y * (inverse ? excess / slope : excess);
  const T edge = g.theta / s.width;
  g.slope0 += math::select(outside & !above, beyond, T(0));
  g.slope1 += math::select(above, beyond, T(0));
  // where nothing of the spline counts, a product with 0 would let an overflow through as NaN
  ElementGradient<T> e;
  e.corner_x = math::select(outside, T(0), g.x);
  e.size_x = math::select(same, T(0), math::select(outside, g.width + edge * theta, g.width));
  e.corner_y = math::select(same, T(0), g.y);
  e.size_y = math::select(same, T(0), g.height);
  e.slope0 = math::select(same, T(0), g.slope0);
  e.slope1 = math::select(same, T(0), g.slope1);
  e.x = math::select(same, grad_y, result);
  e.same = same;
  return e;
}

} // namespace iin_fast
