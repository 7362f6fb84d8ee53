// Rational-quadratic splines on a GPU: from raw values to y and log-det in one pass, and back to gradients.
//
// Bytes an element, with P raw values (3 K - 1 at K bins with linear tails): forward and inverse read the raw values
// and x and write y, P + 2 numbers: 100 bytes in float32 at K = 8, 50 in 16-bit types. Backward also reads grad_y and
// writes the gradients of x and of the raw values, 2 P + 3 numbers: 196 and 98 bytes. Knots never leave the registers.
// On paper an H100 (3350 GB/s) moves 34 billion elements a second forward and 17 backward in float32 at K = 8, and
// issues 880 and 1730 instructions for each meanwhile. The compiled code takes about 1300 and 1800: forward is limited
// by instructions, at two thirds of the bandwidth, backward by both. 16-bit types are limited by instructions.
//
// Work: an element to a thread, a tile of elements to a block. Raw values of neighbours lie P apart, which no warp
// could read well, so a block first brings the values of its tile to shared memory as they lie there, 16 bytes at a
// time, and each thread takes its own from there; gradients go out the same way, in the place of the values that they
// belong to. There, elements are an odd number of values apart, so that the lanes of a warp hit different banks: where
// P is even, or the values are strided, not aligned or in three tensors, they are copied one by one, neighbours by
// neighbouring lanes. float32 and float64 keep the exponentials of the softmax in the place of the raw values; 16-bit
// types, which would lose digits there, compute them again where they need them. In registers those of 16 bins took
// 200, which left an SM 10 warps. Where not even 16 elements fit shared memory, threads read and write global memory
// themselves.
//
// A tile is some whole rows or a part of one row. The log-det's sum over a row is made in shared memory by a few lanes
// to a row; no atomics, and its order depends on the shape and the GPU alone. Where several blocks share a row, a
// second, small kernel adds their sums.
//
// The sizes of tiles follow from shared memory and occupancy on paper; no GPU was at hand to measure on. The launch
// functions at the end take the launcher as an argument, so that nothing here depends on torch.
#pragma once

#include "common/rows.cuh"
#include "spline_coupling/spline_coupling.h"

namespace iin_fast {

constexpr int spline_threads = 256;            // of a block, at most
constexpr int spline_shared_bytes = 44 * 1024; // of a tile, at most: with the sums below the 48 KiB of any launch
constexpr int spline_fewest_elements = 16;     // a tile that would hold fewer is not made

// Raw widths, heights or derivatives of each element, or their gradients.
template <class Storage> struct DeviceSplineValues {
  Storage *data;                      // [rows, features, count], those of an element side by side
  int64_t row_stride, feature_stride; // in elements
  int count;

  __host__ __device__ Storage *element(int64_t row, int64_t feature) const {
    return data + row * row_stride + feature * feature_stride;
  }
};

template <class Storage> struct DeviceSpline {
  DeviceSplineValues<const Storage> values[3]; // widths, heights, derivatives: of one tensor, or of three
  int64_t rows, features;
  int bins, count; // count: raw values of an element
  Tails tails;
  Parameterization form;
  SplineLimits<compute_t<Storage>> limits;
  bool inverse;
};

// Where the raw values of an element begin. In shared memory these are parts of one piece.
template <class Values> struct SplineElement {
  Values *widths, *heights, *derivatives;
};
template <class Storage>
__device__ __forceinline__ SplineElement<Storage> spline_element(const DeviceSplineValues<Storage> (&values)[3],
                                                                 int64_t row, int64_t feature) {
  return {values[0].element(row, feature), values[1].element(row, feature), values[2].element(row, feature)};
}
template <class Storage> __device__ __forceinline__ SplineElement<Storage> spline_element(Storage *first, int bins) {
  return {first, first + bins, first + 2 * bins};
}

template <class Storage> struct DeviceSplineForward {
  DeviceSpline<Storage> spline;
  DeviceRows<const Storage> x; // [rows, features]
  Storage *y;                  // [rows, features]
  compute_t<Storage> *logdet;  // [rows]
  compute_t<Storage> *partial; // [rows, parts], or null if parts is 1
};

template <class Storage> struct DeviceSplineBackward {
  DeviceSpline<Storage> spline;
  DeviceRows<const Storage> x, grad_y;   // [rows, features]; x is the input of the map
  const compute_t<Storage> *grad_logdet; // [rows]
  Storage *grad_x;                       // [rows, features]
  DeviceSplineValues<Storage> grads[3];  // as spline.values, each contiguous or all of them in one contiguous tensor
};

// i / by for i and by below 2^16.
struct SmallDivisor {
  unsigned reciprocal; // 2^32 / by, rounded up; 0: by is 1
  SmallDivisor(int by = 1) : reciprocal(by == 1 ? 0 : 0xffffffffu / static_cast<unsigned>(by) + 1) {}
  __device__ __forceinline__ int operator()(int i) const {
    return reciprocal == 0 ? i : static_cast<int>(static_cast<uint64_t>(i) * reciprocal >> 32);
  }
};

// How the values of all elements lie in global memory.
struct SplineLayout {
  int pieces;               // 1: widths, heights and derivatives of an element are side by side; or 3
  SmallDivisor by_count[3]; // values of an element in each piece
  bool dense;               // each piece lies as one contiguous [rows, features, values]
  bool wide;                // copied in 16-byte accesses
};

// How a launch maps elements to threads.
struct SplinePlan {
  int threads;                  // of a block
  int tile_rows, tile_features; // of a tile: whole rows, or one row's part
  int pitch;                    // values from an element to the next in shared memory; 0: nothing is staged
  int log_sum_lanes;            // log2 of the lanes that sum a row's log-det
  SmallDivisor by_features;     // of tile_features
  SplineLayout in, out;         // of the raw values, and of their gradients
  unsigned blocks, parts;       // of the grid, and of them those that share a row
  size_t shared_bytes;          // dynamic
};

// What the launch gave of shared memory.
inline __device__ unsigned char *shared_splines() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}

// The elements of a tile. They lie side by side in [rows, features].
struct SplineTile {
  int64_t row, feature; // the first one
  int64_t first;        // its number
  int rows, elements;
};

// Values between the last 16-byte boundary and the tile's first value: shared memory is laid out like global memory
// modulo 16 bytes.
template <class Storage>
__device__ __forceinline__ int tile_offset(const DeviceSpline<Storage> &spline, const SplineTile &tile) {
  return static_cast<int>(tile.first * spline.count % wide_vector<Storage>);
}

// store(i, load(i)) for all i below `count`, by the threads of the block. A thread has `batch` loads under way before
// it waits for the first one.
template <class T, int batch, class Load, class Store>
__device__ __forceinline__ void copy_tile(int count, Load &&load, Store &&store) {
  const int threads = blockDim.x;
  for (int first = threadIdx.x; first < count; first += batch * threads) {
    T held[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j)
      if (first + j * threads < count)
        held[j] = load(first + j * threads);
#pragma unroll
    for (int j = 0; j < batch; ++j)
      if (first + j * threads < count)
        store(first + j * threads, held[j]);
  }
}

// copy(values, piece, first, count): of an element, `count` values of each piece lie in shared memory from `first` on.
template <class Storage, class Copy>
__device__ __forceinline__ void for_each_piece(const DeviceSplineValues<Storage> (&values)[3],
                                               const SplineLayout &layout, int count, Copy &&copy) {
  int first = 0;
#pragma unroll 1
  for (int piece = 0; piece < layout.pieces; ++piece) {
    const int here = layout.pieces == 1 ? count : values[piece].count;
    copy(values[piece], layout.by_count[piece], first, here);
    first += here;
  }
}

template <class Storage>
__device__ __forceinline__ void load_tile(const DeviceSpline<Storage> &spline, const SplinePlan &plan,
                                          const SplineTile &tile, Storage *shared) {
  const int offset = tile_offset(spline, tile);
  if (plan.in.wide) { // pitch is count
    constexpr int vector = wide_vector<Storage>;
    const int64_t begin = tile.first * spline.count - offset;
    const int64_t left = spline.rows * spline.features * spline.count - begin;
    const int vectors = (offset + tile.elements * spline.count + vector - 1) / vector;
    // the last vector may reach into the next tile, but not beyond the tensor
    const int whole = static_cast<int64_t>(vectors) * vector <= left ? vectors : vectors - 1;
    const Storage *const data = spline.values[0].data + begin;
    const uint4 *const from = reinterpret_cast<const uint4 *>(data);
    uint4 *const to = reinterpret_cast<uint4 *>(shared);
    copy_tile<uint4, 6>( // all of it at 8 bins in float32
        whole, [&](int i) { return __ldg(from + i); }, [&](int i, uint4 value) { to[i] = value; });
    const int at = whole * vector + static_cast<int>(threadIdx.x);
    if (whole < vectors && at < left)
      shared[at] = __ldg(data + at);
  } else {
    for_each_piece(spline.values, plan.in, spline.count,
                   [&](const DeviceSplineValues<const Storage> &values, SmallDivisor by_count, int first, int count) {
                     const Storage *const from = values.element(tile.row, tile.feature);
                     Storage *const to = shared + offset + first;
                     const auto load = [&](int i) {
                       if (plan.in.dense)
                         return __ldg(from + i);
                       const int e = by_count(i), row = plan.by_features(e);
                       return __ldg(from + row * values.row_stride +
                                    (e - row * plan.tile_features) * values.feature_stride + (i - e * count));
                     };
                     copy_tile<Storage, 4>(tile.elements * count, load, [&](int i, Storage value) {
                       to[i + by_count(i) * (plan.pitch - count)] = value;
                     });
                   });
  }
}

template <class Storage>
__device__ __forceinline__ void store_tile(const DeviceSplineBackward<Storage> &job, const SplinePlan &plan,
                                           const SplineTile &tile, const Storage *shared) {
  const int offset = tile_offset(job.spline, tile);
  if (plan.out.wide) {
    constexpr int vector = wide_vector<Storage>;
    const int end = offset + tile.elements * job.spline.count;
    const int first = (offset + vector - 1) / vector, last = end / vector;
    Storage *const to = job.grads[0].data + tile.first * job.spline.count;
    const uint4 *const from = reinterpret_cast<const uint4 *>(shared) + first;
    uint4 *const vectors = reinterpret_cast<uint4 *>(to - offset) + first;
    copy_tile<uint4, 2>(
        last - first, [&](int i) { return from[i]; }, [&](int i, uint4 value) { __stwb(vectors + i, value); });
    // what other tiles have a part of goes out one by one
    const int head = offset + static_cast<int>(threadIdx.x);
    if (head < first * vector && head < end)
      to[head - offset] = shared[head];
    const int tail = (first > last ? first : last) * vector + static_cast<int>(threadIdx.x);
    if (tail < end)
      to[tail - offset] = shared[tail];
  } else {
    for_each_piece(job.grads, plan.out, job.spline.count,
                   [&](const DeviceSplineValues<Storage> &grads, SmallDivisor by_count, int first, int count) {
                     const Storage *const from = shared + offset + first;
                     Storage *const to = grads.data + tile.first * count;
                     copy_tile<Storage, 2>(
                         tile.elements * count, [&](int i) { return from[i + by_count(i) * (plan.pitch - count)]; },
                         [&](int i, Storage value) { to[i] = value; });
                   });
  }
}

// Softmax of one element's raw widths or heights. Values: a pointer, or what is indexed like one. The numerators take
// the raw values' place if `in_place`; else they are computed again at each use.
template <class Values, Parameterization form, bool in_place> struct SplineSoftmax {
  using T = compute_t<std::decay_t<decltype(std::declval<Values>()[0])>>;
  const Values values;
  const int bins;
  const SplineLimits<T> &limits;
  T top, over; // the largest exponent, 1 / sum of the numerators

  __device__ __forceinline__ SplineSoftmax(Values values, int bins, const SplineLimits<T> &limits)
      : values(values), bins(bins), limits(limits) {
    top = exponent(0);
#pragma unroll 4
    for (int k = 1; k < bins; ++k) {
      const T value = exponent(k);
      top = value > top ? value : top;
    }
    T sum = 0, lost = 0;
#pragma unroll 4
    for (int k = 0; k < bins; ++k) {
      const T e = math::exp(exponent(k) - top);
      if constexpr (in_place)
        values[k] = e;
      sum = add(sum, e, lost);
    }
    over = T(1) / sum;
  }

  __device__ __forceinline__ T exponent(int k) const { return squeeze<form>(widen(values[k]), limits); }

  __device__ __forceinline__ T numerator(int k) const {
    if constexpr (in_place)
      return values[k];
    else
      return math::exp(exponent(k) - top);
  }

  // Gradients of the raw values, from those by the corner and the size of bin `number`; `rest`: the size of all shares
  // together; `none`: they are 0, whatever the values. They may take the place of the values.
  template <class Out>
  __device__ __forceinline__ void backward(T rest, int number, T corner, T size, T mass, T own_share, bool none,
                                           Out out) const {
    const T common = corner * mass + size * own_share;
#pragma unroll 4
    for (int k = 0; k < bins; ++k) {
      T g = rest * (numerator(k) * over) * ((k < number ? corner : k == number ? size : T(0)) - common);
      if constexpr (form == Parameterization::zuko) {
        static_assert(!in_place, "the raw values are still needed");
        T step;
        squeeze<form>(widen(values[k]), limits, step);
        g *= step;
      }
      narrow(none ? T(0) : g, out[k]);
    }
  }
};

// The bin of an element's coordinate, and what its gradients need of it.
template <class T> struct SplineBin {
  Segment<T> segment;
  int number;
  int first, second;  // raw derivatives at its ends, or -1
  T raw0, raw1;       // their values
  T mass_w, mass_h;   // softmax mass left of the bin
  T share_w, share_h; // and in it
  T rest_w, rest_h;   // the box's sides less the smallest bins: sizes are these times the shares
};

// `spline`: a DeviceSpline, or what has its bins, count, tails and limits.
template <bool by_image, Parameterization form, bool in_place, class Shape, class Values, class Derivatives, class T>
__device__ __forceinline__ SplineBin<T>
find_bin(const Shape &spline, const SplineSoftmax<Values, form, in_place> &widths,
         const SplineSoftmax<Values, form, in_place> &heights, Derivatives derivatives, T coordinate) {
  const SplineLimits<T> &limits = spline.limits;
  const T wide = limits.right - limits.left, high = limits.top - limits.bottom, bins = T(spline.bins);
  const T min_width = form == Parameterization::nflows ? limits.min_width : T(0);
  const T min_height = form == Parameterization::nflows ? limits.min_height : T(0);
  const T rest_width = T(1) - min_width * bins, rest_height = T(1) - min_height * bins;
  SplineBin<T> b;
  b.mass_w = b.mass_h = T(0);
  T lost_w = 0, lost_h = 0, number = 0;
#pragma unroll 4
  for (int k = 0;; ++k) {
    b.number = k;
    b.share_w = widths.numerator(k) * widths.over;
    b.share_h = heights.numerator(k) * heights.over;
    if (k + 1 >= spline.bins)
      break;
    const T after_w = add(b.mass_w, b.share_w, lost_w), after_h = add(b.mass_h, b.share_h, lost_h);
    const T knot = by_image ? limits.bottom + high * (min_height * (number + T(1)) + rest_height * after_h)
                            : limits.left + wide * (min_width * (number + T(1)) + rest_width * after_w);
    if (!(coordinate >= knot)) // where knots are NaN, in the first bin
      break;
    number += T(1);
    b.mass_w = after_w;
    b.mass_h = after_h;
  }
  Segment<T> &s = b.segment;
  s.x = limits.left + wide * (min_width * number + rest_width * b.mass_w);
  s.y = limits.bottom + high * (min_height * number + rest_height * b.mass_h);
  s.width = bin_size(min_width + rest_width * b.share_w, wide);
  s.height = bin_size(min_height + rest_height * b.share_h, high);
  b.rest_w = wide * rest_width;
  b.rest_h = high * rest_height;

  const BinEnds ends = bin_ends(spline.tails, spline.bins, b.number);
  b.first = static_cast<int>(ends.first);
  b.second = ends.second < spline.count - 2 * spline.bins ? static_cast<int>(ends.second) : -1;
  b.raw0 = b.first >= 0 ? widen(derivatives[b.first]) : T(0);
  b.raw1 = b.second >= 0 ? widen(derivatives[b.second]) : T(0);
  s.slope0 = b.first >= 0 ? knot_slope<form>(b.raw0, limits) : T(1);
  s.slope1 = b.second >= 0 ? knot_slope<form>(b.raw1, limits) : T(1);
  return b;
}

// f(form, inverse) as constants: the same for the whole launch, so a jump that all threads take together.
template <class F> __device__ __forceinline__ void with_spline(Parameterization form, bool inverse, F &&f) {
  using N = std::integral_constant<Parameterization, Parameterization::nflows>;
  using Z = std::integral_constant<Parameterization, Parameterization::zuko>;
  if (form == Parameterization::nflows)
    inverse ? f(N(), std::true_type()) : f(N(), std::false_type());
  else
    inverse ? f(Z(), std::true_type()) : f(Z(), std::false_type());
}

// The tile of this block. One tile each: what a loop over tiles could keep in registers from one to the next, nvcc did
// keep, 50 of them.
template <class Storage>
__device__ __forceinline__ SplineTile tile_of_block(const DeviceSpline<Storage> &spline, const SplinePlan &plan) {
  const unsigned group = blockIdx.x / plan.parts, part = blockIdx.x - group * plan.parts;
  const int64_t row = static_cast<int64_t>(group) * plan.tile_rows;
  const int64_t feature = static_cast<int64_t>(part) * plan.tile_features;
  const int64_t rows = spline.rows - row, features = spline.features - feature;
  const int tile_rows = static_cast<int>(rows < plan.tile_rows ? rows : plan.tile_rows);
  const int tile_features = static_cast<int>(features < plan.tile_features ? features : plan.tile_features);
  return {row, feature, row * spline.features + feature, tile_rows, tile_rows * tile_features};
}

template <class Storage, bool staged>
__global__ void __launch_bounds__(spline_threads, sizeof(Storage) == 8 ? 2 : 3)
    spline_forward_kernel(const __grid_constant__ DeviceSplineForward<Storage> job,
                          const __grid_constant__ SplinePlan plan) {
  using T = compute_t<Storage>;
  __shared__ T sums[spline_threads]; // [tile_rows, tile_features]
  const DeviceSpline<Storage> &spline = job.spline;
  const SplineTile tile = tile_of_block(spline, plan);
  const int thread = threadIdx.x, row = plan.by_features(thread), feature = thread - row * plan.tile_features;
  const bool valid = thread < tile.elements;
  T value = 0, logdet = 0;
  if (valid)
    value = widen(__ldg(job.x[tile.row + row] + tile.feature + feature));
  SplineElement<std::conditional_t<staged, Storage, const Storage>> raw;
  if constexpr (staged) {
    Storage *const shared = reinterpret_cast<Storage *>(shared_splines());
    load_tile(spline, plan, tile, shared);
    __syncthreads();
    raw = spline_element(shared + tile_offset(spline, tile) + thread * plan.pitch, spline.bins);
  } else {
    raw = spline_element(spline.values, tile.row + row, tile.feature + feature);
  }
  if (valid)
    with_spline(spline.form, spline.inverse, [&](auto form, auto inverse) {
      constexpr Parameterization f = decltype(form)::value;
      constexpr bool backwards = decltype(inverse)::value;
      constexpr bool in_place = staged && std::is_same<Storage, T>::value;
      const Sides<T> sides = sides_of<backwards>(spline.limits);
      const T within = hold(value, sides.low, sides.high);
      const SplineSoftmax<decltype(raw.widths), f, in_place> widths(raw.widths, spline.bins, spline.limits);
      const SplineSoftmax<decltype(raw.heights), f, in_place> heights(raw.heights, spline.bins, spline.limits);
      const SplineBin<T> b =
          find_bin<backwards>(spline, widths, heights, raw.derivatives, search_key(within, sides.low, sides.high));
      narrow(map_element<backwards>(b.segment, sides, value, within, spline.tails != Tails::none, logdet),
             job.y[tile.first + thread]);
    });

  sums[thread] = logdet;
  __syncthreads();
  T *const to = plan.parts > 1 ? job.partial : job.logdet;
  const int lanes = 1 << plan.log_sum_lanes, lane = thread & (lanes - 1);
  const int together = static_cast<int>(blockDim.x) >> plan.log_sum_lanes; // rows that are summed at once
  for (int first = 0; first < tile.rows; first += together) {              // all threads stay to the shuffles
    const int r = first + (thread >> plan.log_sum_lanes);
    CompensatedSum<T> sum;
    if (r < tile.rows)
      for (int i = lane; i < plan.tile_features; i += lanes)
        sum.add(sums[r * plan.tile_features + i]);
    T total = sum.total();
    for (int offset = lanes / 2; offset > 0; offset /= 2)
      total += __shfl_xor_sync(whole_warp, total, offset);
    if (r < tile.rows && lane == 0)
      to[(tile.row + r) * plan.parts + blockIdx.x % plan.parts] = total;
  }
}

template <class Storage, bool staged>
__global__ void __launch_bounds__(spline_threads, sizeof(Storage) == 8 ? 2 : 3)
    spline_backward_kernel(const __grid_constant__ DeviceSplineBackward<Storage> job,
                           const __grid_constant__ SplinePlan plan) {
  using T = compute_t<Storage>;
  const DeviceSpline<Storage> &spline = job.spline;
  const SplineTile tile = tile_of_block(spline, plan);
  const int thread = threadIdx.x, row = plan.by_features(thread), feature = thread - row * plan.tile_features;
  const bool valid = thread < tile.elements;
  T value = 0, grad_y = 0, grad_logdet = 0;
  if (valid) {
    value = widen(__ldg(job.x[tile.row + row] + tile.feature + feature));
    grad_y = widen(__ldg(job.grad_y[tile.row + row] + tile.feature + feature));
    grad_logdet = __ldg(job.grad_logdet + tile.row + row);
  }
  Storage *const shared = staged ? reinterpret_cast<Storage *>(shared_splines()) : nullptr;
  SplineElement<std::conditional_t<staged, Storage, const Storage>> raw;
  SplineElement<Storage> out; // gradients of the raw values; in shared memory in their place
  if constexpr (staged) {
    load_tile(spline, plan, tile, shared);
    __syncthreads();
    raw = out = spline_element(shared + tile_offset(spline, tile) + thread * plan.pitch, spline.bins);
  } else {
    raw = spline_element(spline.values, tile.row + row, tile.feature + feature);
    out = spline_element(job.grads, tile.row + row, tile.feature + feature);
  }
  if (valid)
    with_spline(spline.form, spline.inverse, [&](auto form, auto inverse) {
      constexpr Parameterization f = decltype(form)::value;
      constexpr bool backwards = decltype(inverse)::value;
      constexpr bool in_place = staged && std::is_same<Storage, T>::value && f == Parameterization::nflows;
      const SplineLimits<T> &limits = spline.limits;
      const Sides<T> sides = sides_of<backwards>(limits);
      const T within = hold(value, sides.low, sides.high);
      const SplineSoftmax<decltype(raw.widths), f, in_place> widths(raw.widths, spline.bins, limits);
      const SplineSoftmax<decltype(raw.heights), f, in_place> heights(raw.heights, spline.bins, limits);
      const SplineBin<T> b =
          find_bin<backwards>(spline, widths, heights, raw.derivatives, search_key(within, sides.low, sides.high));
      const ElementGradient<T> g = map_element_backward<backwards>(b.segment, sides, value, within,
                                                                   spline.tails != Tails::none, grad_y, grad_logdet);
      narrow(g.x, job.grad_x[tile.first + thread]);
      const T slope0 = g.same ? T(0) : g.slope0 * knot_slope_derivative<f>(b.raw0, b.segment.slope0, limits);
      const T slope1 = g.same ? T(0) : g.slope1 * knot_slope_derivative<f>(b.raw1, b.segment.slope1, limits);
      widths.backward(b.rest_w, b.number, g.corner_x, g.size_x, b.mass_w, b.share_w, g.same, out.widths);
      heights.backward(b.rest_h, b.number, g.corner_y, g.size_y, b.mass_h, b.share_h, g.same, out.heights);
#pragma unroll 4
      for (int d = 0; d < spline.count - 2 * spline.bins; ++d)
        narrow((d == b.first ? slope0 : T(0)) + (d == b.second ? slope1 : T(0)), out.derivatives[d]);
    });
  if constexpr (staged) {
    __syncthreads();
    store_tile(job, plan, tile, shared);
  }
}

template <class Storage>
SplineLayout layout_of(const DeviceSplineValues<Storage> (&values)[3], int64_t rows, int64_t features, int count) {
  SplineLayout layout{1, {}, true, false};
  for (int i = 1; i < 3; ++i)
    if (values[i].count > 0 && // one bin with linear tails has no derivatives
        (values[i].data != values[i - 1].data + values[i - 1].count || values[i].row_stride != values[0].row_stride ||
         values[i].feature_stride != values[0].feature_stride))
      layout.pieces = 3;
  for (int i = 0; i < layout.pieces; ++i) {
    const int here = layout.pieces == 1 ? count : values[i].count;
    layout.by_count[i] = SmallDivisor(here > 0 ? here : 1);
    layout.dense = layout.dense && (features <= 1 || values[i].feature_stride == here) &&
                   (rows <= 1 || values[i].row_stride == features * here);
  }
  layout.wide =
      layout.pieces == 1 && layout.dense && count % 2 == 1 && reinterpret_cast<uintptr_t>(values[0].data) % 16 == 0;
  return layout;
}

// `grads`: as those of a DeviceSplineBackward, or null.
template <class Storage>
SplinePlan plan_spline(const DeviceSpline<Storage> &spline, const DeviceSplineValues<Storage> (*grads)[3],
                       int multiprocessors) {
  const int64_t elements = spline.rows * spline.features, features = spline.features > 0 ? spline.features : 1;
  SplinePlan plan{};
  plan.pitch = spline.count | 1;
  // elements of a tile, at most: those that fit, and no more than gives each multiprocessor a tile
  const int64_t bytes = static_cast<int64_t>(plan.pitch) * sizeof(Storage), room = spline_shared_bytes - 16;
  const bool staged = bytes * spline_fewest_elements <= room;
  int64_t limit = staged && room / bytes < spline_threads ? room / bytes : spline_threads;
  const int64_t share = (elements / multiprocessors + warp_lanes - 1) / warp_lanes * warp_lanes;
  limit = share < limit ? (share > warp_lanes ? share : limit < warp_lanes ? limit : warp_lanes) : limit;
  const auto in_warps = [](int64_t n) { return (n + warp_lanes - 1) / warp_lanes * warp_lanes; };
  plan.tile_rows = 1;
  plan.parts = 1;
  if (features > limit) {
    const int64_t steps = (features + limit - 1) / limit;
    plan.tile_features = static_cast<int>((features + steps - 1) / steps);
    plan.parts = static_cast<unsigned>(steps);
  } else {
    // the rows that leave the fewest threads of the block without an element
    plan.tile_features = static_cast<int>(features);
    int64_t best = 0, best_threads = 1;
    for (int64_t rows = 1; rows * features <= limit; ++rows) {
      const int64_t used = rows * features, threads = in_warps(used);
      if ((used * 8 >= limit * 3 || (rows + 1) * features > limit) && used * best_threads > best * threads) {
        best = used;
        best_threads = threads;
        plan.tile_rows = static_cast<int>(rows);
      }
    }
  }
  const int64_t tile = static_cast<int64_t>(plan.tile_rows) * plan.tile_features;
  plan.threads = static_cast<int>(in_warps(tile));
  while ((2 << plan.log_sum_lanes) <= plan.tile_features && plan.log_sum_lanes < 5)
    ++plan.log_sum_lanes;
  plan.by_features = SmallDivisor(plan.tile_features);
  plan.blocks = static_cast<unsigned>((spline.rows + plan.tile_rows - 1) / plan.tile_rows * plan.parts);
  if (staged) {
    plan.in = layout_of(spline.values, spline.rows, spline.features, spline.count);
    if (grads != nullptr)
      plan.out = layout_of(*grads, spline.rows, spline.features, spline.count);
    plan.shared_bytes = static_cast<size_t>((tile * bytes + 16 + 15) / 16 * 16);
  } else {
    plan.pitch = 0;
  }
  return plan;
}

// launch(kernel, grid, block, arguments...) starts a kernel; launch.with_shared(bytes) is one that gives it dynamic
// shared memory. job.partial must be there if plan.parts > 1.
template <class Storage, class Launch>
void launch_spline_forward(const DeviceSplineForward<Storage> &job, const SplinePlan &plan, Launch &&launch) {
  using T = compute_t<Storage>;
  if (job.spline.rows == 0)
    return;
  const auto kernel = plan.pitch > 0 ? spline_forward_kernel<Storage, true> : spline_forward_kernel<Storage, false>;
  launch.with_shared(plan.shared_bytes)(kernel, dim3(plan.blocks), dim3(plan.threads), job, plan);
  if (plan.parts > 1) {
    const T *partial = job.partial;
    constexpr int rows_per_block = row_threads / warp_lanes;
    const unsigned blocks = static_cast<unsigned>((job.spline.rows + rows_per_block - 1) / rows_per_block);
    launch(sum_parts_kernel<T>, dim3(blocks), dim3(row_threads), partial, job.logdet, job.spline.rows,
           static_cast<int>(plan.parts));
  }
}

template <class Storage, class Launch>
void launch_spline_backward(const DeviceSplineBackward<Storage> &job, const SplinePlan &plan, Launch &&launch) {
  if (job.spline.rows == 0 || job.spline.features == 0)
    return;
  const auto kernel = plan.pitch > 0 ? spline_backward_kernel<Storage, true> : spline_backward_kernel<Storage, false>;
  launch.with_shared(plan.shared_bytes)(kernel, dim3(plan.blocks), dim3(plan.threads), job, plan);
}

} // namespace iin_fast
