// Rational-quadratic splines on the CPU: one pass over the raw parameters of each element.
//
// With K bins and linear tails an element reads 3K - 1 raw values and x and writes y: 4 (3K + 1) bytes in float32, 100
// at K = 8; backward reads grad_y as well and writes the gradients: 4 (6K + 1), 196 at K = 8. A block is one vector
// register of elements (64 bytes), an element to a lane: its raw values are turned to [value][lane] on the way in, and
// gradients back on the way out. Rows are the unit of parallel work; blocks run across rows, so that one feature fills
// lanes too.
//
// forward_rows and backward_rows spell out map_element and map_element_backward (spline_coupling.h): called as
// functions they were not turned into vector code by gcc 12, and the loops took 1.8 to 2.7 times as long.
#include "spline_coupling/spline_coupling_loops.h"

#include "common/simd.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

#define IIN_FAST_LANES _Pragma("omp simd") for (int l = 0; l < block_size<T>; ++l)

template <class T> IIN_FAST_INLINE T widen(const T *p) { return *p; }
IIN_FAST_INLINE float widen(const BFloat16 *p) {
  float buffer[1];
  return *load(p, buffer, 1);
}
IIN_FAST_INLINE float widen(const Half *p) {
  float buffer[1];
  return *load(p, buffer, 1);
}
template <class T> IIN_FAST_INLINE void narrow(T value, T *p) { *p = value; }
IIN_FAST_INLINE void narrow(float value, BFloat16 *p) { store(&value, p, 1); }
IIN_FAST_INLINE void narrow(float value, Half *p) { store(&value, p, 1); }

// A block of elements: e, e + 1, … of the flattened [rows, features]; lanes past `valid` repeat the last element.
template <class T> struct Block {
  alignas(64) T x[block_size<T>], excess[block_size<T>], inside[block_size<T>];
  alignas(64) T sx[block_size<T>], width[block_size<T>], sy[block_size<T>], height[block_size<T>],
      slope0[block_size<T>], slope1[block_size<T>];
  alignas(64) T raw0[block_size<T>], raw1[block_size<T>];       // raw derivatives at both ends
  alignas(64) T bin[block_size<T>];                             // its number
  alignas(64) T mass_w[block_size<T>], mass_h[block_size<T>];   // softmax mass left of the bin
  alignas(64) T share_w[block_size<T>], share_h[block_size<T>]; // and in it
  alignas(64) T over_w[block_size<T>], over_h[block_size<T>];   // 1 / sum of exponentials

  IIN_FAST_INLINE Segment<T> segment(int l) const { return {sx[l], width[l], sy[l], height[l], slope0[l], slope1[l]}; }
};

// Turns `count` values of each of `lanes<T>` rows to columns: column[k * column_stride + i] = row[i][k]. The last
// square overlaps the one before.
template <class T>
IIN_FAST_INLINE void rows_to_columns(const T *const *row, int64_t count, T *column, int64_t column_stride) {
  constexpr int n = lanes<T>;
  for (int64_t k = 0;; k = smaller(k + n, count - n)) {
    vec<T> square[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      square[i] = load(row[i] + k);
    transpose_stage<T, 1>(square);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      store(column + (k + i) * column_stride, square[i]);
    if (k + n == count)
      break;
  }
}

// And back: row i is at rows + i * count.
template <class T>
IIN_FAST_INLINE void columns_to_rows(const T *column, int64_t column_stride, int64_t count, T *rows) {
  constexpr int n = lanes<T>;
  for (int64_t k = 0;; k = smaller(k + n, count - n)) {
    vec<T> square[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      square[i] = load(column + (k + i) * column_stride);
    transpose_stage<T, 1>(square);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      store(rows + i * count + k, square[i]);
    if (k + n == count)
      break;
  }
}

// raw[k][lane] for a block. `buffer` takes its rows where they have to be converted.
template <class Storage, class T>
IIN_FAST_INLINE void gather(const SplineParameters<Storage> &p, int64_t row, int64_t feature, int64_t features,
                            int valid, T *raw, T *buffer) {
  constexpr int block = block_size<T>;
  const T *at[block];
  for (int l = 0; l < block; ++l) {
    at[l] = iin_fast::load(p.data + row * p.row_stride + feature * p.feature_stride, buffer + l * p.count, p.count);
    if (l + 1 < valid && ++feature == features) {
      feature = 0;
      ++row;
    }
  }
  if (p.count >= lanes<T>) {
    for (int first = 0; first < block; first += lanes<T>)
      rows_to_columns(at + first, p.count, raw + first, block);
  } else {
    for (int l = 0; l < block; ++l)
      for (int64_t k = 0; k < p.count; ++k)
        raw[k * block + l] = at[l][k];
  }
}

// Gradients raw[k][lane] of the first `valid` elements of a block, side by side from `out` on.
template <class Storage, class T>
IIN_FAST_INLINE void scatter(const T *raw, int64_t count, int valid, Storage *out, T *buffer) {
  constexpr int block = block_size<T>;
  T *rows = output(out, buffer);
  int done = 0;
  if (count >= lanes<T>)
    for (; done + lanes<T> <= valid; done += lanes<T>)
      columns_to_rows(raw + done, block, count, rows + done * count);
  for (int l = done; l < valid; ++l)
    for (int64_t k = 0; k < count; ++k)
      rows[l * count + k] = raw[k * block + l];
  iin_fast::store(rows, out, valid * count);
}

// Softmax numerators of `bins` raw widths and the `bins` raw heights after them, in place, and 1 / their sums. Both at
// once: one's chain of sums fills the gaps of the other's.
template <Parameterization form, class T>
IIN_FAST_INLINE void exponentials(T *widths, int64_t bins, const SplineLimits<T> &limits, Block<T> &b) {
  constexpr int block = block_size<T>;
  T *heights = widths + bins * block;
  alignas(64) T top_w[block], top_h[block], sum_w[block], sum_h[block], lost_w[block], lost_h[block];
  IIN_FAST_LANES {
    top_w[l] = squeeze<form>(widths[l], limits);
    top_h[l] = squeeze<form>(heights[l], limits);
  }
  for (int64_t k = 1; k < bins; ++k)
    IIN_FAST_LANES {
      const T w = squeeze<form>(widths[k * block + l], limits), h = squeeze<form>(heights[k * block + l], limits);
      top_w[l] = math::select(w > top_w[l], w, top_w[l]);
      top_h[l] = math::select(h > top_h[l], h, top_h[l]);
    }
  IIN_FAST_LANES sum_w[l] = sum_h[l] = lost_w[l] = lost_h[l] = T(0);
  for (int64_t k = 0; k < bins; ++k)
    IIN_FAST_LANES {
      const T w = math::exp_below_zero(squeeze<form>(widths[k * block + l], limits) - top_w[l]);
      const T h = math::exp_below_zero(squeeze<form>(heights[k * block + l], limits) - top_h[l]);
      widths[k * block + l] = w;
      heights[k * block + l] = h;
      sum_w[l] = add(sum_w[l], w, lost_w[l]);
      sum_h[l] = add(sum_h[l], h, lost_h[l]);
    }
  IIN_FAST_LANES {
    b.over_w[l] = T(1) / sum_w[l];
    b.over_h[l] = T(1) / sum_h[l];
  }
}

// Finds the bin of every lane's coordinate: by x, or by y. `raw` holds exponentials of widths and heights, then raw
// derivatives.
template <Parameterization form, bool by_image, class T>
IIN_FAST_INLINE void find_bins(const T *raw, int64_t bins, Tails tails, const SplineLimits<T> &limits, Block<T> &b) {
  const T wide = limits.right - limits.left, high = limits.top - limits.bottom;
  const T min_width = form == Parameterization::nflows ? limits.min_width : T(0);
  const T min_height = form == Parameterization::nflows ? limits.min_height : T(0);
  const T rest_width = T(1) - min_width * T(bins), rest_height = T(1) - min_height * T(bins);
  const T *widths = raw, *heights = raw + bins * block_size<T>, *slopes = raw + 2 * bins * block_size<T>;
  alignas(64) T knot_x[block_size<T>], knot_y[block_size<T>], mass_w[block_size<T>], mass_h[block_size<T>];
  alignas(64) T lost_w[block_size<T>], lost_h[block_size<T>];
  IIN_FAST_LANES {
    knot_x[l] = limits.left;
    knot_y[l] = limits.bottom;
    mass_w[l] = mass_h[l] = lost_w[l] = lost_h[l] = T(0);
    b.raw0[l] = b.raw1[l] = T(0);
  }
  const int64_t count = derivative_count(tails, bins);
  for (int64_t k = 0; k < bins; ++k) {
    const BinEnds ends = bin_ends(tails, bins, k);
    const T *left = slopes + (ends.first >= 0 ? ends.first : 0) * block_size<T>;
    const T *right = slopes + (ends.second < count ? ends.second : count - 1) * block_size<T>;
    const bool has_slopes = count > 0, last = k + 1 == bins;
    IIN_FAST_LANES {
      const T share_w = widths[k * block_size<T> + l] * b.over_w[l],
              share_h = heights[k * block_size<T> + l] * b.over_h[l];
      const T after_w = add(mass_w[l], share_w, lost_w[l]), after_h = add(mass_h[l], share_h, lost_h[l]);
      const T next_x = last ? limits.right : limits.left + wide * (min_width * T(k + 1) + rest_width * after_w);
      const T next_y = last ? limits.top : limits.bottom + high * (min_height * T(k + 1) + rest_height * after_h);
      const bool here = (k == 0) | (by_image ? b.x[l] >= knot_y[l] : b.x[l] >= knot_x[l]);
      b.bin[l] = math::select(here, T(k), b.bin[l]);
      b.sx[l] = math::select(here, knot_x[l], b.sx[l]);
      b.sy[l] = math::select(here, knot_y[l], b.sy[l]);
      b.width[l] = math::select(here, wide * (min_width + rest_width * share_w), b.width[l]);
      b.height[l] = math::select(here, high * (min_height + rest_height * share_h), b.height[l]);
      b.mass_w[l] = math::select(here, mass_w[l], b.mass_w[l]);
      b.mass_h[l] = math::select(here, mass_h[l], b.mass_h[l]);
      b.share_w[l] = math::select(here, share_w, b.share_w[l]);
      b.share_h[l] = math::select(here, share_h, b.share_h[l]);
      mass_w[l] = after_w;
      mass_h[l] = after_h;
      knot_x[l] = next_x;
      knot_y[l] = next_y;
    }
    if (has_slopes)
      IIN_FAST_LANES {
        const bool here = b.bin[l] == T(k);
        b.raw0[l] = math::select(here, left[l], b.raw0[l]);
        b.raw1[l] = math::select(here, right[l], b.raw1[l]);
      }
  }
  IIN_FAST_LANES {
    b.slope0[l] = knot_slope<form>(b.raw0[l], limits);
    b.slope1[l] = knot_slope<form>(b.raw1[l], limits);
  }
  if (tails == Tails::linear)
    IIN_FAST_LANES {
      b.slope0[l] = math::select(b.bin[l] == T(0), T(1), b.slope0[l]);
      b.slope1[l] = math::select(b.bin[l] == T(bins - 1), T(1), b.slope1[l]);
    }
}

// Coordinates of a block, what of them lies beyond the box, their bins.
template <Parameterization form, bool by_image, class Storage, class T>
IIN_FAST_INLINE void locate(const SplineParameters<Storage> &p, const SplineLimits<T> &limits, const Storage *x,
                            int64_t element, int64_t features, int valid, T *raw, T *buffer, Block<T> &b) {
  gather(p, element / features, element % features, features, valid, raw, buffer);
  for (int l = 0; l < block_size<T>; ++l)
    b.x[l] = widen(x + element + (l < valid ? l : valid - 1));
  const T low = by_image ? limits.bottom : limits.left, high = by_image ? limits.top : limits.right;
  IIN_FAST_LANES {
    const T all = b.x[l];
    const bool inside = (all >= low) & (all <= high);
    const T within = math::select(all > high, high, math::select(all < low, low, all)); // NaN stays NaN
    b.inside[l] = math::select(inside, T(1), T(0));
    b.excess[l] = all - within;
    b.x[l] = within;
  }
  exponentials<form>(raw, p.bins, limits, b);
  find_bins<form, by_image>(raw, p.bins, p.tails, limits, b);
}

template <class T> SplineLimits<T> limits_of(const SplineLimits<double> &l) {
  return {T(l.left),      T(l.right),      T(l.bottom),         T(l.top),
          T(l.min_width), T(l.min_height), T(l.min_derivative), T(l.softness)};
}

template <Parameterization form, bool inverse, class Storage>
void forward_rows(const SplineForward<Storage> &job, int64_t begin, int64_t end, compute_t<Storage> *raw) {
  using T = compute_t<Storage>;
  T *const buffer = raw + (job.parameters.count + 2 * job.parameters.bins) * block_size<T>;
  const SplineLimits<T> limits = limits_of<T>(job.parameters.limits);
  const bool identity = job.parameters.tails != Tails::none; // outside the box
  Block<T> b;
  alignas(64) T y[block_size<T>], logdet[block_size<T>];
  const int64_t features = job.features, stop = end * features;
  for (int64_t row = begin; row < end; ++row)
    job.logdet[row] = T(0);
  for (int64_t element = begin * features; element < stop; element += block_size<T>) {
    const int valid = stop - element < block_size<T> ? static_cast<int>(stop - element) : block_size<T>;
    locate<form, inverse>(job.parameters, limits, job.x, element, features, valid, raw, buffer, b);
    IIN_FAST_LANES {
      const Segment<T> s = b.segment(l);
      const T theta = held_position(inverse ? position_of_image(s, b.x[l]) : position(s, b.x[l]), b.excess[l]);
      T slope_log;
      const T mapped = image(s, theta, slope_log);
      const T slope = math::exp(inverse ? -slope_log : slope_log);
      const T result = inverse ? s.x + s.width * theta : mapped;
      const bool outside = b.inside[l] == T(0);
      const bool same = outside & identity;
      y[l] = math::select(same, b.x[l] + b.excess[l], math::select(outside, result + b.excess[l] * slope, result));
      logdet[l] = math::select(same, T(0), inverse ? -slope_log : slope_log);
    }
    int64_t row = element / features, feature = element % features;
    for (int l = 0; l < valid; ++l) {
      narrow(y[l], job.y + element + l);
      job.logdet[row] += logdet[l];
      if (++feature == features) {
        feature = 0;
        ++row;
      }
    }
  }
}

// Gradients of raw widths or heights of a block, from those by the bin's corner and its size.
template <Parameterization form, class T>
IIN_FAST_INLINE void softmax_backward(T *exponent, int64_t bins, T scale, const T *raw_squeeze, const Block<T> &b,
                                      const T *over, const T *corner, const T *size, const T *mass, const T *share) {
  for (int64_t k = 0; k < bins; ++k)
    IIN_FAST_LANES {
      const T common = corner[l] * mass[l] + size[l] * share[l];
      const T own = math::select(T(k) < b.bin[l], corner[l], math::select(T(k) == b.bin[l], size[l], T(0)));
      T g = scale * exponent[k * block_size<T> + l] * over[l] * (own - common);
      if constexpr (form == Parameterization::zuko)
        g *= raw_squeeze[k * block_size<T> + l];
      exponent[k * block_size<T> + l] = g;
    }
}

template <Parameterization form, bool inverse, class Storage>
void backward_rows(const SplineBackward<Storage> &job, int64_t begin, int64_t end, compute_t<Storage> *raw) {
  using T = compute_t<Storage>;
  const SplineParameters<Storage> &p = job.parameters;
  const SplineLimits<T> limits = limits_of<T>(p.limits);
  const bool identity = p.tails != Tails::none;
  const int64_t bins = p.bins, derivatives = derivative_count(p.tails, bins);
  constexpr bool zuko = form == Parameterization::zuko;
  T *const steps = raw + p.count * block_size<T>; // zuko: derivatives of the squeeze
  T *const buffer = steps + 2 * bins * block_size<T>;
  Block<T> b;
  alignas(64) T grad_y[block_size<T>], grad_logdet[block_size<T>], grad_x[block_size<T>];
  alignas(64) T corner_x[block_size<T>], size_x[block_size<T>], corner_y[block_size<T>], size_y[block_size<T>],
      at0[block_size<T>], at1[block_size<T>];
  const int64_t features = job.features, stop = end * features;
  const T min_width = zuko ? T(0) : limits.min_width, min_height = zuko ? T(0) : limits.min_height;
  const T scale_x = (limits.right - limits.left) * (T(1) - min_width * T(bins));
  const T scale_y = (limits.top - limits.bottom) * (T(1) - min_height * T(bins));
  for (int64_t element = begin * features; element < stop; element += block_size<T>) {
    const int valid = stop - element < block_size<T> ? static_cast<int>(stop - element) : block_size<T>;
    if constexpr (zuko) { // exponentials overwrite what their derivative is taken at
      gather(p, element / features, element % features, features, valid, raw, buffer);
      for (int64_t k = 0; k < 2 * bins; ++k)
        IIN_FAST_LANES squeeze<form>(raw[k * block_size<T> + l], limits, steps[k * block_size<T> + l]);
    }
    locate<form, inverse>(p, limits, job.x, element, features, valid, raw, buffer, b);
    int64_t row = element / features, feature = element % features;
    for (int l = 0; l < block_size<T>; ++l) {
      const int from = l < valid ? l : valid - 1;
      grad_y[l] = widen(job.grad_y + element + from);
      grad_logdet[l] = job.grad_logdet[row];
      if (l + 1 < valid && ++feature == features) {
        feature = 0;
        ++row;
      }
    }
    IIN_FAST_LANES {
      const Segment<T> s = b.segment(l);
      const T theta = held_position(inverse ? position_of_image(s, b.x[l]) : position(s, b.x[l]), b.excess[l]);
      const bool outside = b.inside[l] == T(0), same = outside & identity;
      T slope_log;
      image(s, theta, slope_log);
      const T slope = math::exp(slope_log);
      T from_y = grad_y[l], from_logdet = grad_logdet[l], result = T(0);
      if constexpr (inverse) {
        // x = f^-1(y): dx = (dy - f_p dp) / f_x, log-det = -log f_x; at fixed x the log-det moves x as well
        const SegmentGradient<T> curve = image_backward(s, theta, T(0), T(1));
        const T curvature = math::select(outside, T(0), curve.theta / s.width);
        result = (grad_y[l] - grad_logdet[l] * curvature) / slope;
        from_y = -result;
        from_logdet = -grad_logdet[l];
      }
      SegmentGradient<T> g = image_backward(s, theta, from_y, from_logdet);
      if constexpr (!inverse)
        result = math::select(outside, from_y * slope, g.theta / s.width);
      // beyond the box the coordinate is held at its edge, and a straight line of the outer slope goes on from there
      const T beyond = from_y * (inverse ? b.excess[l] / slope : b.excess[l]);
      const T edge = g.theta / s.width;
      // where nothing of the spline counts, a product with 0 would let an overflow through as NaN
      corner_x[l] = math::select(outside, T(0), g.x);
      size_x[l] = math::select(same, T(0), math::select(outside, g.width + edge * theta, g.width));
      corner_y[l] = math::select(same, T(0), g.y);
      size_y[l] = math::select(same, T(0), g.height);
      const bool above = b.excess[l] > T(0);
      g.slope0 += math::select(outside & !above, beyond, T(0));
      g.slope1 += math::select(outside & above, beyond, T(0));
      at0[l] = math::select(same, T(0), g.slope0) * knot_slope_derivative<form>(b.raw0[l], b.slope0[l], limits);
      at1[l] = math::select(same, T(0), g.slope1) * knot_slope_derivative<form>(b.raw1[l], b.slope1[l], limits);
      grad_x[l] = math::select(same, grad_y[l], result);
    }
    softmax_backward<form>(raw, bins, scale_x, steps, b, b.over_w, corner_x, size_x, b.mass_w, b.share_w);
    softmax_backward<form>(raw + bins * block_size<T>, bins, scale_y, steps + (zuko ? bins * block_size<T> : 0), b,
                           b.over_h, corner_y, size_y, b.mass_h, b.share_h);
    T *slopes = raw + 2 * bins * block_size<T>;
    const int64_t shift = p.tails == Tails::linear ? 1 : 0;
    for (int64_t d = 0; d < derivatives; ++d) {
      const T knot = T(d + shift); // this raw value is the left end of bin `knot` and the right end of the one before
      const T before = p.tails == Tails::circular && d == 0 ? T(bins - 1) : knot - T(1);
      IIN_FAST_LANES slopes[d * block_size<T> + l] =
          math::select(b.bin[l] == knot, at0[l], T(0)) + math::select(b.bin[l] == before, at1[l], T(0));
    }
    for (int l = 0; l < valid; ++l)
      narrow(grad_x[l], job.grad_x + element + l);
    scatter(raw, p.count, valid, job.grad_parameters + element * p.count, buffer);
  }
}

// The first address in `scratch` that a vector can be read from without crossing a cache line.
template <class T> IIN_FAST_INLINE T *aligned(T *scratch) {
  return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
}

template <class F> void with_form(Parameterization form, bool inverse, F &&f) {
  using N = std::integral_constant<Parameterization, Parameterization::nflows>;
  using Z = std::integral_constant<Parameterization, Parameterization::zuko>;
  if (form == Parameterization::nflows)
    inverse ? f(N(), std::true_type()) : f(N(), std::false_type());
  else
    inverse ? f(Z(), std::true_type()) : f(Z(), std::false_type());
}

} // namespace

template <class Storage>
void spline_forward(const SplineForward<Storage> &job, int64_t begin, int64_t end, compute_t<Storage> *scratch) {
  with_form(job.parameters.form, job.parameters.inverse, [&](auto form, auto inverse) {
    forward_rows<decltype(form)::value, decltype(inverse)::value>(job, begin, end, aligned(scratch));
  });
}

template <class Storage>
void spline_backward(const SplineBackward<Storage> &job, int64_t begin, int64_t end, compute_t<Storage> *scratch) {
  with_form(job.parameters.form, job.parameters.inverse, [&](auto form, auto inverse) {
    backward_rows<decltype(form)::value, decltype(inverse)::value>(job, begin, end, aligned(scratch));
  });
}

#define IIN_FAST_INSTANTIATE(Storage)                                                                                  \
  template void spline_forward(const SplineForward<Storage> &, int64_t, int64_t, compute_t<Storage> *);                \
  template void spline_backward(const SplineBackward<Storage> &, int64_t, int64_t, compute_t<Storage> *);
IIN_FAST_INSTANTIATE(float)
IIN_FAST_INSTANTIATE(double)
IIN_FAST_INSTANTIATE(BFloat16)
IIN_FAST_INSTANTIATE(Half)

} // namespace IIN_FAST_ISA
} // namespace iin_fast
