// The monotone rational-quadratic spline of one element, for host and device (Durkan et al. 2019, Sec. 3.1, Eq. 4-8).
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

// Elements that the CPU loops work on side by side: 64 bytes of them. And numbers of memory that a block needs.
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

// The slope at a knot.
template <Parameterization form, class T> IIN_FAST_HD T knot_slope(T raw, const SplineLimits<T> &limits) {
  if constexpr (form == Parameterization::nflows)
    return limits.min_derivative + math::softplus(raw);
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

// Position in the bin, in [0, 1], of a coordinate x.
template <class T> IIN_FAST_HD T unit(T value) {
  value = math::select(value > T(0), value, T(0));
  return math::select(value < T(1), value, T(1));
}

template <class T> IIN_FAST_HD T position(const Segment<T> &s, T x) { return unit((x - s.x) / s.width); }

// Position of a coordinate y: the stable root of the quadratic (Eq. 29-32 of the paper's appendix).
template <class T> IIN_FAST_HD T position_of_image(const Segment<T> &s, T y) {
  const T delta = s.height / s.width, rise = y - s.y, bend = s.slope0 + s.slope1 - T(2) * delta;
  const T a = rise * bend + s.height * (delta - s.slope0);
  const T b = s.height * s.slope0 - rise * bend;
  const T c = -delta * rise;
  T discriminant = b * b - T(4) * a * c;
  discriminant = math::select(discriminant > T(0), discriminant, T(0));
  const T divisor = -b - math::sqrt(discriminant);
  return unit(T(2) * c / math::select(divisor == T(0), T(-1), divisor));
}

// The position of a coordinate held at an edge of the box is exactly 0 or 1: what a quotient rounds away from it, the
// bend of a narrow bin multiplies.
template <class T> IIN_FAST_HD T held_position(T theta, T excess) {
  return math::select(excess > T(0), T(1), math::select(excess < T(0), T(0), theta));
}

// y and log dy/dx at a position.
template <class T> IIN_FAST_HD T image(const Segment<T> &s, T theta, T &logdet) {
  const T delta = s.height / s.width, rest = T(1) - theta, mixed = theta * rest;
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
IIN_FAST_HD SegmentGradient<T> image_backward(const Segment<T> &s, T theta, T grad_y, T grad_logdet) {
  const T delta = s.height / s.width, rest = T(1) - theta, mixed = theta * rest, square = theta * theta;
  const T bend = s.slope0 + s.slope1 - T(2) * delta;
  const T denominator = delta + bend * mixed, over = T(1) / denominator;
  const T numerator = s.slope1 * square + T(2) * delta * mixed + s.slope0 * rest * rest, below = T(1) / numerator;
  const T rational = (delta * square + s.slope0 * mixed) * over;
  const T grad_rational = grad_y * s.height;
  SegmentGradient<T> g;
  g.theta =
      grad_rational * delta * numerator * over * over +
      grad_logdet * ((T(2) * s.slope1 * theta + T(2) * delta * (T(1) - T(2) * theta) - T(2) * s.slope0 * rest) * below -
                     T(2) * bend * (T(1) - T(2) * theta) * over);
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

// A coordinate held at the edges of the box, and how far it lay beyond. NaN stays NaN, and lies outside.
template <class T> struct Coordinate {
  T within, excess;
  bool outside;
};

template <class T> IIN_FAST_HD Coordinate<T> hold(T value, T low, T high) {
  const bool inside = (value >= low) & (value <= high);
  const T within = math::select(value > high, high, math::select(value < low, low, value));
  return {within, value - within, !inside};
}

// The element's value and its term of the log-det. `identity`: outside the box nothing changes; else a straight line of
// the outer slope goes on from its edge.
template <bool inverse, class T>
IIN_FAST_HD T map_element(const Segment<T> &s, const Coordinate<T> &c, bool identity, T &logdet) {
  const T theta = held_position(inverse ? position_of_image(s, c.within) : position(s, c.within), c.excess);
  T slope_log;
  const T mapped = image(s, theta, slope_log);
  const T slope = math::exp(inverse ? -slope_log : slope_log);
  const T result = inverse ? s.x + s.width * theta : mapped;
  const bool outside = c.outside, same = outside & identity;
  const T y = math::select(same, c.within + c.excess, math::select(outside, result + c.excess * slope, result));
  logdet = math::select(same, T(0), inverse ? -slope_log : slope_log);
  return y;
}

// Gradients of an element by its coordinate, by the lower left corner of its bin, its size, and the slopes at its ends.
template <class T> struct ElementGradient {
  T x, corner_x, size_x, corner_y, size_y, slope0, slope1;
};

template <bool inverse, class T>
IIN_FAST_HD ElementGradient<T> map_element_backward(const Segment<T> &s, const Coordinate<T> &c, bool identity,
                                                    T grad_y, T grad_logdet) {
  const T theta = held_position(inverse ? position_of_image(s, c.within) : position(s, c.within), c.excess);
  const bool outside = c.outside, same = outside & identity;
  T slope_log;
  image(s, theta, slope_log);
  const T slope = math::exp(slope_log);
  T from_y = grad_y, from_logdet = grad_logdet, result = T(0);
  if constexpr (inverse) {
    // x = f^-1(y): dx = (dy - f_p dp) / f_x, log-det = -log f_x; at fixed x the log-det moves x as well
    const SegmentGradient<T> curve = image_backward(s, theta, T(0), T(1));
    const T curvature = math::select(outside, T(0), curve.theta / s.width);
    result = (grad_y - grad_logdet * curvature) / slope;
    from_y = -result;
    from_logdet = -grad_logdet;
  }
  SegmentGradient<T> g = image_backward(s, theta, from_y, from_logdet);
  if constexpr (!inverse)
    result = math::select(outside, from_y * slope, g.theta / s.width);
  // beyond the box the coordinate is held at its edge, and a straight line of the outer slope goes on from there
  const T beyond = from_y * (inverse ? c.excess / slope : c.excess);
  const T edge = g.theta / s.width;
  const bool above = c.excess > T(0);
  g.slope0 += math::select(outside & !above, beyond, T(0));
  g.slope1 += math::select(outside & above, beyond, T(0));
  // where nothing of the spline counts, a product with 0 would let an overflow through as NaN
  ElementGradient<T> e;
  e.corner_x = math::select(outside, T(0), g.x);
  e.size_x = math::select(same, T(0), math::select(outside, g.width + edge * theta, g.width));
  e.corner_y = math::select(same, T(0), g.y);
  e.size_y = math::select(same, T(0), g.height);
  e.slope0 = math::select(same, T(0), g.slope0);
  e.slope1 = math::select(same, T(0), g.slope1);
  e.x = math::select(same, grad_y, result);
  return e;
}

} // namespace iin_fast
