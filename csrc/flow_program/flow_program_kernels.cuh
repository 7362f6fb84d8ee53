// A whole flow in one launch: a block takes a tile of rows and walks it through all layers, forward or inverse; one
// more launch walks back for the gradients.
//
// Bytes: x, y and the log-det once, and the input of every layer where backward follows. Weights come from the L2 cache
// to shared memory once a tile: panels of columns in the order in which the walk reads them, the next one on its way
// while one is at work. Activations never leave shared memory. Arithmetic: 2 flops a weight and row each way, 4 more
// for the gradients; plain float32 or float64 multiply-adds, of which a thread has 4 rows x 1 to 4 columns in
// registers, or one or three products of TF32 on tensor cores for each of float32 (common/tile.cuh), of which a warp
// has 16 columns x 8 to 32 rows.
//
// Small nets are what it is for: the published IIN has flow_kernels.cuh, where blocks share each net.
//
// Tiles are 8 to 64 rows (choose_tile). Values lie [feature][ld] in shared memory, ld rows and one vector more, so that
// neighbouring features hit different banks. Rows beyond the batch repeat its last one; their gradients are 0.
// Backward keeps weight gradients of its tiles in an accumulator of each block, in global memory; a last launch adds
// the accumulators in order. Their number depends on the batch, the program and the shared memory of the GPU, and there
// are no atomics, so results are the same in every run.
//
// The text of a program becomes a table (flow_program_table.h) that all threads read alike.
#pragma once

#include <cstring>

#include "affine_coupling/affine_coupling.h"
#include "common/affine.h"
#include "common/mma.cuh"
#include "common/rows.cuh"
#include "common/tile.cuh"
#include "flow_program/flow_program_parts.cuh"
#include "spline_coupling/spline_coupling_kernels.cuh"

namespace iin_fast {

// What a walk reads and writes. tf32: products of TF32, on tensor cores, that make one of float32; 0: plain
// multiply-adds.
template <class T, int tf32> struct DeviceWalk {
  const unsigned char *table; // of flow_program_table.h
  TableView view;             // where its parts begin
  T *packed;                  // parameters as the walk reads them
  const int *orders;          // of autoregressive layers that run by their inverse
  const T *x, *context;       // [batch, dim], [batch, context]
  T *y, *logdet;              // [batch, dim], [batch]
  T *inputs;                  // [layers, batch, dim]: what each layer makes; null if nobody asks
  int64_t batch;
  int tiles, log_rows;
  bool inverse, base;
};

template <class T, int tf32> struct DeviceWalkBack {
  DeviceWalk<T, tf32> walk;
  const T *grad_y, *grad_logdet; // [batch, dim] or null for 0, [batch]
  T *grad_x, *grad_context;      // null where not wanted
  T *accumulators;               // [blocks, view.accumulator]
};

inline __device__ unsigned char *shared_program() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}

// Elements of a feature that lie `stride` apart, indexed like a pointer.
template <class T> struct Strided {
  T *first;
  int stride;
  __device__ __forceinline__ T &operator[](int k) const { return first[k * stride]; }
};

// Vectors of 16 bytes, or of 8.
template <class T, int size_ = 16 / sizeof(T)> struct Vector {
  static constexpr int size = size_;
  using Access = std::conditional_t<size * sizeof(T) == 16, uint4, uint2>;
  T at[size];
};
template <class V, class T> __device__ __forceinline__ V load_shared(const T *from) {
  V v;
  *reinterpret_cast<typename V::Access *>(&v) = *reinterpret_cast<const typename V::Access *>(from);
  return v;
}
template <class T, int size> __device__ __forceinline__ void store_shared(const Vector<T, size> &v, T *to) {
  using Access = typename Vector<T, size>::Access;
  *reinterpret_cast<Access *>(to) = *reinterpret_cast<const Access *>(&v);
}

// Panels of weights on their way to shared memory, two at a time, in the order of the list.
template <class T> struct PanelStream {
  const TablePanel *panels; // in shared memory
  int count;                // of them
  const T *packed;          // where panels lie
  T *even, *odd;            // where they go in turn
  int taken = 0;

  __device__ __forceinline__ T *buffer(int number) const { return number & 1 ? odd : even; }

  __device__ __forceinline__ void issue(int number) {
    if (number < count) {
      const TablePanel panel = panels[number];
      constexpr int vector = Vector<T>::size;
      const T *const from = packed + panel.at;
      T *const to = buffer(number);
      for (int i = threadIdx.x * vector; i < panel.size; i += program_threads * vector)
        copy_async_16(to + i, from + i, 16);
    }
    commit_copies();
  }

  // The next panel. All threads of the block: they have left the one before it.
  __device__ __forceinline__ const T *next() {
    wait_copies<0>();
    __syncthreads();
    const int number = taken++;
    issue(number + 1);
    return buffer(number);
  }
};

// The layers of a program on the tile of a block. Every function is called by all threads, finds what it reads in
// shared memory, and ends behind a barrier.
template <class T, int tf32> struct TileWalk {
  static constexpr int vector = Vector<T>::size;
  static constexpr bool tensor = tf32 != 0, split = tf32 == 3; // products on tensor cores, of numbers split in two

  const DeviceWalk<T, tf32> &job;
  const TableView &view;
  const int rows, ld; // of the tile, and from feature to feature
  const int thread;
  PanelStream<T> stream;
  unsigned char *even_record, *odd_record; // of layers at even and odd positions
  const TableRecord *records;              // where those of all layers lie
  T *x, *y;                                // [dim, ld] each: a layer's input and output
  T *values;                               // [context + net rows, ld]: the context, then what the net makes
  T *terms;                                // [2 dim, ld]
  T *logdet, *lost;                        // [ld]
  T *g, *next_g;                           // [dim, ld], backward
  T *value_gradients;                      // [context + rows, ld]
  T *grad_logdet;                          // [ld]
  int64_t first = 0;                       // the tile's first row
  int valid = 0;                           // rows of the batch in it

  // Cuts shared memory as shared_bytes() counts it, and brings what all tiles read of the table.
  __device__ __forceinline__ TileWalk(const DeviceWalk<T, tf32> &job, bool backward, int list)
      : job(job), view(job.view), rows(1 << job.log_rows), ld(rows + vector), thread(threadIdx.x) {
    even_record = shared_program(), odd_record = even_record + view.record;
    int2 *const table = reinterpret_cast<int2 *>(odd_record + view.record);
    const TableList panels = view.lists[list];
    const int2 *const from_records = reinterpret_cast<const int2 *>(job.table + view.records);
    const int2 *const from_panels = reinterpret_cast<const int2 *>(job.table + view.panels) + panels.first;
    for (int i = thread; i < view.layer_count; i += program_threads)
      table[i] = from_records[i];
    for (int i = thread; i < panels.count; i += program_threads)
      table[view.layer_count + i] = from_panels[i];
    records = reinterpret_cast<const TableRecord *>(table);
    stream.panels = reinterpret_cast<const TablePanel *>(table + view.layer_count);
    stream.count = panels.count, stream.packed = job.packed;
    T *at = reinterpret_cast<T *>(odd_record + view.record + (8 * (view.layer_count + view.list) + 15) / 16 * 16);
    const auto take = [&](int count) {
      T *const piece = at;
      at += count;
      return piece;
    };
    stream.even = take(view.panel), stream.odd = take(view.panel);
    x = take(view.dim * ld), y = take(view.dim * ld);
    values = take(view.values * ld);
    terms = take(2 * view.dim * ld);
    logdet = take(ld), lost = take(ld);
    if (backward) {
      g = take(view.dim * ld), next_g = take(view.dim * ld);
      value_gradients = take(view.gradients * ld);
      grad_logdet = take(ld);
    }
    __syncthreads();
  }

  __device__ __forceinline__ unsigned char *record(int position) const {
    return position & 1 ? odd_record : even_record;
  }
  // Begins to copy the record of a layer.
  __device__ __forceinline__ void bring(int position) const {
    if (position >= 0 && position < view.layer_count) {
      const TableRecord from = records[job.inverse ? view.layer_count - 1 - position : position];
      unsigned char *const to = record(position);
      for (int i = thread * 16; i < from.size; i += program_threads * 16)
        copy_async_16(to + i, job.table + from.at + i, 16);
    }
    commit_copies();
  }
  // The layer at a position, and `next` on its way. All threads have left the layer before.
  __device__ __forceinline__ const TableLayer &layer_at(int position, int next) const {
    wait_copies<0>();
    __syncthreads();
    bring(next);
    return *reinterpret_cast<const TableLayer *>(record(position));
  }
  __device__ __forceinline__ bool inverse_of(const TableLayer &l) const { return (l.inverted != 0) != job.inverse; }
  __device__ __forceinline__ const int *index(const TableLayer &l, int at) const {
    return reinterpret_cast<const int *>(reinterpret_cast<const unsigned char *>(&l) + l.indices) + at;
  }
  __device__ __forceinline__ const TableStep &step(const TableLayer &l, int k) const {
    return reinterpret_cast<const TableStep *>(&l + 1)[k];
  }

  __device__ __forceinline__ void begin_tile(int tile, int position) {
    first = static_cast<int64_t>(tile) << job.log_rows;
    const int64_t left = job.batch - first;
    valid = static_cast<int>(left < rows ? left : rows);
    bring(position);
    stream.taken = 0;
    stream.issue(0);
  }

  // f(feature, row) for each of `count` features and the rows of the tile.
  template <class F> __device__ __forceinline__ void each(int count, F &&f) const {
    for (int k = thread; k < count << job.log_rows; k += program_threads)
      f(k >> job.log_rows, k & (rows - 1));
  }

  __device__ __forceinline__ void read(const T *from, int count, T *to, bool zero = false) const {
    each(count, [&](int j, int r) {
      to[j * ld + r] = r < valid ? from[(first + r) * count + j] : zero ? T(0) : from[(first + valid - 1) * count + j];
    });
    __syncthreads();
  }
  __device__ __forceinline__ void write(const T *from, int count, T *to) const {
    each(count, [&](int j, int r) {
      if (r < valid)
        to[(first + r) * count + j] = from[j * ld + r];
    });
    __syncthreads();
  }

  __device__ __forceinline__ void add_logdet(T value) {
    if (thread < rows)
      add_term(logdet[thread], lost[thread], value);
    __syncthreads();
  }
  // The rows' sums of `count` terms[feature][row], in order.
  __device__ __forceinline__ void add_terms_of(int count) {
    __syncthreads();
    if (thread < rows)
      for (int i = 0; i < count; ++i)
        add_term(logdet[thread], lost[thread], terms[i * ld + thread]);
    __syncthreads();
  }

  // ---- forward

  __device__ __forceinline__ void forward(int tile) {
    begin_tile(tile, 0);
    read(job.x, view.dim, x);
    if (view.context)
      read(job.context, view.context, values);
    if (thread < rows)
      logdet[thread] = lost[thread] = T(0);
    __syncthreads();
    for (int position = 0; position < view.layer_count; ++position) {
      const TableLayer &l = layer_at(position, position + 1);
      layer_forward(l, inverse_of(l));
      if (job.inputs != nullptr)
        write(y, view.dim, job.inputs + position * job.batch * view.dim);
      T *const made = y;
      y = x, x = made;
    }
    if (job.base) {
      each(view.dim, [&](int j, int r) { terms[j * ld + r] = normal_term(x[j * ld + r]); });
      add_terms_of(view.dim);
    }
    write(x, view.dim, job.y);
    if (thread < valid)
      job.logdet[first + thread] = CompensatedSum<T>{logdet[thread], lost[thread]}.total();
    __syncthreads();
  }

  __device__ __forceinline__ void layer_forward(const TableLayer &l, bool inverse) {
    switch (static_cast<LayerKind>(l.kind)) {
    case LayerKind::affine:
      return affine_forward(l, inverse);
    case LayerKind::permute:
      return permute(l, inverse, x, y);
    case LayerKind::linear:
      return linear_forward(l, inverse);
    case LayerKind::activation:
      return activation_forward(l, inverse);
    case LayerKind::coupling:
      if (l.autoregressive && inverse)
        return sequential_forward(l);
      evaluate(l, x);
      couple_forward(l, inverse);
    }
  }

  __device__ __forceinline__ void permute(const TableLayer &l, bool inverse, const T *from, T *to) const {
    const int *const index = this->index(l, l.index);
    const int64_t *const packed = reinterpret_cast<const int64_t *>(job.packed + l.packed);
    each(view.dim, [&](int j, int r) {
      const int other = l.index >= 0 ? index[j] : static_cast<int>(packed[j]);
      to[(inverse ? other : j) * ld + r] = from[(inverse ? j : other) * ld + r];
    });
    __syncthreads();
  }

  // Calls f with the order of shift and scale, and the direction, as compile-time constants.
  template <class F> __device__ __forceinline__ static void with_order(const TableLayer &l, bool inverse, F &&f) {
    if (l.order == 0)
      inverse ? f(std::false_type(), std::true_type()) : f(std::false_type(), std::false_type());
    else
      inverse ? f(std::true_type(), std::true_type()) : f(std::true_type(), std::false_type());
  }

  // packed: [dim] scales, [dim] shifts, the log-det
  __device__ __forceinline__ void affine_forward(const TableLayer &l, bool inverse) {
    const T *const scale = job.packed + l.packed, *const shift = scale + view.dim;
    with_order(l, inverse, [&](auto shift_first, auto backwards) {
      each(view.dim, [&](int j, int r) {
        y[j * ld + r] =
            affine<decltype(shift_first)::value, decltype(backwards)::value>(x[j * ld + r], shift[j], scale[j]);
      });
    });
    add_logdet(inverse ? -shift[view.dim] : shift[view.dim]);
  }

  __device__ __forceinline__ void activation_forward(const TableLayer &l, bool inverse) {
    const T slope = static_cast<T>(inverse ? 1 / l.slope : l.slope);
    const T gain = static_cast<T>(inverse ? -l.log_slope : l.log_slope);
    each(view.dim, [&](int j, int r) {
      const T value = x[j * ld + r];
      y[j * ld + r] = leaky(value, slope);
      terms[j * ld + r] = value < T(0) ? gain : T(0);
    });
    if (l.exact)
      add_terms_of(view.dim);
    else
      __syncthreads();
  }

  // to[i] = sum over j of m[i * row + j * column] from[j], for j in [i, dim) or [0, i]
  __device__ __forceinline__ void triangle(const T *m, int row, int column, bool lower, const T *from, T *to,
                                           const T *bias) const {
    each(view.dim, [&](int i, int r) {
      T sum = bias == nullptr ? T(0) : bias[i];
      for (int j = lower ? 0 : i; j < (lower ? i + 1 : view.dim); ++j)
        sum += m[i * row + j * column] * from[j * ld + r];
      to[i * ld + r] = sum;
    });
    __syncthreads();
  }
  // M z = z in place, a row of the batch to a thread.
  __device__ __forceinline__ void solve(const T *m, int row, int column, bool lower, T *z) const {
    if (thread < rows)
      for (int step = 0; step < view.dim; ++step) {
        const int i = lower ? step : view.dim - 1 - step;
        T sum = z[i * ld + thread];
        for (int other = 0; other < step; ++other) {
          const int j = lower ? other : view.dim - 1 - other;
          sum -= m[i * row + j * column] * z[j * ld + thread];
        }
        z[i * ld + thread] = sum / m[i * row + i * column];
      }
    __syncthreads();
  }

  // packed: L with its unit diagonal, U with its diagonal, [dim, dim] each, the bias, the log-det
  __device__ __forceinline__ void linear_forward(const TableLayer &l, bool inverse) {
    const int dim = view.dim;
    const T *const lower = job.packed + l.packed, *const upper = lower + dim * dim, *const bias = upper + dim * dim;
    if (inverse) {
      each(dim, [&](int j, int r) { y[j * ld + r] = x[j * ld + r] - bias[j]; });
      __syncthreads();
      solve(lower, dim, 1, true, y);
      solve(upper, dim, 1, false, y);
    } else {
      triangle(upper, dim, 1, false, x, terms, nullptr);
      triangle(lower, dim, 1, true, terms, y, bias);
    }
    add_logdet(inverse ? -bias[dim] : bias[dim]);
  }

  // ---- nets

  // out[o][rows] (+)= sum over i of w[i][o] a[i][rows] + bias[o], for the columns of each panel; a thread has 4 rows
  // (2 in float64) of `columns` neighbouring columns. The bias is the row behind the last. all(sums) may change a
  // thread's sums before f(o, vector, rows) takes them.
  template <int columns, class All, class F>
  __device__ __forceinline__ void panel_product(const T *w, const TableMatrix &m, int across, const T *a, int item,
                                                const All &all, const F &f) const {
    const int in = m.in, stride = m.stride;
    const int o = item % across * columns, r = item / across * vector;
    T sums[columns][vector];
    const T *from = a + r;
    w += o;
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const T start = m.bias ? w[in * stride + c] : T(0);
#pragma unroll
      for (int k = 0; k < vector; ++k)
        sums[c][k] = start;
    }
#pragma unroll 8
    for (int i = 0; i < in; ++i, from += ld, w += stride) {
      const Vector<T> v = load_shared<Vector<T>>(from);
      T weights[columns];
      if constexpr (columns * sizeof(T) == 16) {
        const Vector<T> wide = load_shared<Vector<T>>(w);
#pragma unroll
        for (int c = 0; c < columns; ++c)
          weights[c] = wide.at[c];
      } else if constexpr (columns * sizeof(T) == 8) {
        *reinterpret_cast<uint2 *>(weights) = *reinterpret_cast<const uint2 *>(w);
      } else {
        static_assert(columns == 1, "an access for each number of columns");
        weights[0] = *w;
      }
#pragma unroll
      for (int c = 0; c < columns; ++c)
#pragma unroll
        for (int k = 0; k < vector; ++k)
          sums[c][k] += weights[c] * v.at[k];
    }
    all(sums);
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      Vector<T> sum;
#pragma unroll
      for (int k = 0; k < vector; ++k)
        sum.at[k] = sums[c][k];
      f(o + c, sum, r);
    }
  }

  // The same on tensor cores: a warp has 16 columns of 8 rows, or of several times 8. Of 8 of the depth the first of a
  // pair in TF32's order is 2 pair, the second 2 pair + 1: so four features, two apart, meet 32 banks.
  template <int tiles, class All, class F>
  __device__ __forceinline__ void tensor_product(const T *w, const TableMatrix &m, const T *a, int item, const All &all,
                                                 const F &f) const {
    const int in = m.in, across = m.width / 16, lane = thread % warp_lanes, group = lane / 4, pair = lane % 4 * 2;
    const int o = item % across * 16 + group, r = item / across * 8 * tiles;
    float sums[tiles][4];
#pragma unroll
    for (int j = 0; j < tiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[j][e] = m.bias ? w[in * m.stride + o + e / 2 * 8] : 0.0f;
    for (int begin = 0; begin < in; begin += 64) { // sums leave the tensor cores, which cut them
      float part[tiles][4] = {};
      const auto step = [&](int k, auto whole) {
        Tf32Parts left[4], right[tiles][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool inside = decltype(whole)::value || k + pair + e < in;
          const T *const weights = w + (k + pair + e) * m.stride + o, *const from = a + (k + pair + e) * ld + r + group;
          left[2 * e] = tf32_parts<split>(inside ? weights[0] : 0.0f);
          left[2 * e + 1] = tf32_parts<split>(inside ? weights[8] : 0.0f);
#pragma unroll
          for (int j = 0; j < tiles; ++j)
            right[j][e] = tf32_parts<split>(inside ? from[8 * j] : 0.0f);
        }
        multiply_tf32<split>(part, left, right);
      };
      const int end = in < begin + 64 ? in : begin + 64;
      int k = begin;
#pragma unroll 2
      for (; k + 8 <= end; k += 8)
        step(k, std::true_type());
      if (k < end)
        step(k, std::false_type());
#pragma unroll
      for (int j = 0; j < tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sums[j][e] += part[j][e];
    }
    all(sums);
#pragma unroll
    for (int j = 0; j < tiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        f(o + 8 * e, Vector<T, 2>{{sums[j][2 * e], sums[j][2 * e + 1]}}, r + 8 * j + pair);
  }

  // Calls f(the tiles of 8 that a warp takes at once, its items), of `across` times `eights` of them: so that all warps
  // have some.
  template <class F> __device__ __forceinline__ static void with_tiles(int across, int eights, const F &f) {
    constexpr int warps = program_threads / warp_lanes;
    if (across * eights >= 4 * warps && eights >= 4)
      f(std::integral_constant<int, 4>(), across * ((eights + 3) / 4));
    else if (across * eights >= 2 * warps && eights >= 2)
      f(std::integral_constant<int, 2>(), across * ((eights + 1) / 2));
    else
      f(std::integral_constant<int, 1>(), across * eights);
  }

  template <class All, class F>
  __device__ __forceinline__ void plain_product(const T *w, const TableMatrix &m, const T *a, const All &all,
                                                const F &f) const {
    const int items = m.width * (rows / vector); // of one column
    if (items <= program_threads) {
      if (thread < items)
        panel_product<1>(w, m, m.width, a, thread, all, f);
      return;
    }
    constexpr int most = vector; // columns of a 16-byte access
    const int columns = items <= 2 * program_threads ? 2 : most;
    for (int item = thread; item < items / columns; item += program_threads)
      if (columns == 2)
        panel_product<2>(w, m, m.width / 2, a, item, all, f);
      else
        panel_product<most>(w, m, m.width / most, a, item, all, f);
  }

  template <class All, class F>
  __device__ __forceinline__ void product(const TableMatrix &m, const T *a, const All &all, const F &f) {
    for (int p = 0; p < m.panels; ++p) {
      const T *const w = stream.next();
      const auto put = [&](int o, const auto &sum, int r) {
        if (p * m.width + o < m.out)
          f(p * m.width + o, sum, r);
      };
      if constexpr (tensor)
        with_tiles(m.width / 16, rows / 8, [&](auto tiles, int items) {
          for (int item = thread / warp_lanes; item < items; item += program_threads / warp_lanes)
            tensor_product<decltype(tiles)::value>(w, m, a, item, all, put);
        });
      else
        plain_product(w, m, a, all, put);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void dense_forward(const TableStep &s) {
    T *const out = values + s.out * ld;
    const auto activate = [&](auto &sums) {
      with_activation(static_cast<Activation>(s.fused), [&](auto activation) {
        const T slope = static_cast<T>(s.slope);
#pragma unroll
        for (auto &row : sums)
#pragma unroll
          for (T &sum : row)
            sum = activated<decltype(activation)::value>(sum, slope);
      });
    };
    product(s.forward, values + s.a * ld, activate,
            [&](int o, const auto &sum, int r) { store_shared(sum, out + o * ld + r); });
  }

  // The net of a coupling; leaves its values, the raw sizes of a spline multiplied by their gain.
  __device__ __forceinline__ void evaluate(const TableLayer &l, const T *from) {
    const int *const conditioning = index(l, l.index);
    each(l.index_count, [&](int i, int r) { values[(l.input + i) * ld + r] = from[conditioning[i] * ld + r]; });
    __syncthreads();
    for (int k = 0; k < l.step_count; ++k) {
      const TableStep &s = step(l, k);
      if (static_cast<StepKind>(s.kind) == StepKind::dense) {
        dense_forward(s);
      } else if (!s.skip) {
        each(s.rows, [&](int i, int r) { elementwise(s, i, r); });
        __syncthreads();
      }
    }
    scale_raw(l, 0, l.transformed_count);
  }

  // One row of a value that is no product.
  __device__ __forceinline__ void elementwise(const TableStep &s, int i, int r) const {
    const T *const a = values + s.a * ld + r, *const b = values + s.b * ld + r;
    T &out = values[(s.out + i) * ld + r];
    switch (static_cast<StepKind>(s.kind)) {
    case StepKind::act:
      with_activation(static_cast<Activation>(s.activation), [&](auto activation) {
        out = activated<decltype(activation)::value>(a[i * ld], static_cast<T>(s.slope));
      });
      break;
    case StepKind::add:
      out = a[i * ld] + b[i * ld];
      break;
    case StepKind::glu:
      out = gated(a[i * ld], b[i * ld]);
      break;
    case StepKind::concat:
      out = i < s.a_rows ? a[i * ld] : b[(i - s.a_rows) * ld];
      break;
    default: // context: a begins at its part
      out = a[i * ld];
    }
  }

  // Raw widths and heights of features [from, to) times their gain.
  __device__ __forceinline__ void scale_raw(const TableLayer &l, int from, int to) const {
    if (static_cast<TransformerKind>(l.transformer) != TransformerKind::spline || (l.raw == l.output && l.gain == 1))
      return;
    const int count = l.spline.count, sizes = 2 * l.spline.bins;
    const T gain = static_cast<T>(l.gain);
    each((to - from) * count, [&](int i, int r) {
      const int at = from * count + i;
      const T value = values[(l.output + at) * ld + r];
      values[(l.raw + at) * ld + r] = i % count < sizes ? gain * value : value;
    });
    __syncthreads();
  }

  // ---- transformers

  __device__ __forceinline__ void couple_forward(const TableLayer &l, bool inverse) {
    const int *const passed = index(l, l.passed), *const transformed = index(l, l.transformed);
    each(l.passed_count, [&](int i, int r) { y[passed[i] * ld + r] = x[passed[i] * ld + r]; });
    each(l.transformed_count, [&](int i, int r) {
      const int at = transformed[i] * ld + r;
      y[at] = transform(l, i, r, inverse, x[at], terms[i * ld + r]);
    });
    add_terms_of(l.transformed_count);
  }

  __device__ __forceinline__ T transform(const TableLayer &l, int i, int r, bool inverse, T value, T &term) const {
    const T *const raw = values + l.raw * ld + r;
    if (static_cast<TransformerKind>(l.transformer) == TransformerKind::affine) {
      const TableAffine &t = l.affine;
      const T gain = static_cast<T>(l.gain), clamp = static_cast<T>(t.clamp);
      const T shift = gain * raw[(t.shift_at + i * t.shift_step) * ld];
      const T scale = t.scale_at < 0 ? T(0) : gain * raw[(t.scale_at + i * t.scale_step) * ld];
      T result = T(0);
      with_constants(static_cast<Squash>(t.squash), inverse, [&](auto squash, auto backwards) {
        result = couple<decltype(squash)::value, decltype(backwards)::value>(value, scale, shift, clamp, term);
      });
      return result;
    }
    const SplineOf spline(l.spline);
    const T v = l.wrap && !inverse ? wrapped_value(value, spline.limits.right) : value;
    T result = T(0);
    with_spline(static_cast<Parameterization>(l.spline.form), inverse, [&](auto form, auto backwards) {
      constexpr Parameterization f = decltype(form)::value;
      constexpr bool back = decltype(backwards)::value;
      const Sides<T> sides = sides_of<back>(spline.limits);
      const T within = hold(v, sides.low, sides.high);
      const SplineElement<T> at = element(l, i, r);
      const Strided<T> first{at.widths, ld}, second{at.heights, ld}, third{at.derivatives, ld};
      const SplineSoftmax<Strided<T>, f, true> widths(first, spline.bins, spline.limits);
      const SplineSoftmax<Strided<T>, f, true> heights(second, spline.bins, spline.limits);
      const SplineBin<T> b = find_bin<back>(spline, widths, heights, third, search_key(within, sides.low, sides.high));
      result = map_element<back>(b.segment, sides, v, within, spline.tails != Tails::none, term);
    });
    return l.wrap && inverse ? wrapped_value(result, spline.limits.right) : result;
  }

  // What find_bin asks of a spline.
  struct SplineOf {
    int bins, count;
    Tails tails;
    SplineLimits<T> limits;
    __device__ __forceinline__ explicit SplineOf(const TableSpline &s)
        : bins(s.bins), count(s.count), tails(static_cast<Tails>(s.tails)),
          limits{T(s.limits.left),      T(s.limits.right),      T(s.limits.bottom),         T(s.limits.top),
                 T(s.limits.min_width), T(s.limits.min_height), T(s.limits.min_derivative), T(s.limits.softness)} {}
  };

  __device__ __forceinline__ SplineElement<T> element(const TableLayer &l, int i, int r) const {
    T *const raw = values + (l.raw + i * l.spline.count) * ld + r;
    return {raw, raw + l.spline.bins * ld, raw + 2 * l.spline.bins * ld};
  }

  // Gradients of feature i by its coordinate (given back) and its raw values: added to those of the net's outputs, or,
  // of a spline, stored.
  __device__ __forceinline__ T transform_backward(const TableLayer &l, int i, int r, bool inverse, T in, T made,
                                                  T grad) const {
    const T *const raw = values + l.raw * ld + r;
    const T from_logdet = grad_logdet[r];
    if (static_cast<TransformerKind>(l.transformer) == TransformerKind::affine) {
      const TableAffine &t = l.affine;
      const T gain = static_cast<T>(l.gain), clamp = static_cast<T>(t.clamp);
      const int shift_at = (t.shift_at + i * t.shift_step) * ld, scale_at = (t.scale_at + i * t.scale_step) * ld;
      T *const gradients = value_gradients + l.output_gradient * ld + r;
      T result = T(0);
      with_constants(static_cast<Squash>(t.squash), inverse, [&](auto squash, auto backwards) {
        constexpr Squash kind = decltype(squash)::value;
        const T scale = kind == Squash::none ? T(0) : gain * raw[scale_at];
        const CouplingGradient<T> e =
            couple_backward<kind, decltype(backwards)::value>(inverse ? made : in, scale, clamp, grad, from_logdet);
        result = e.x;
        gradients[shift_at] += gain * e.shift;
        if constexpr (kind != Squash::none)
          gradients[scale_at] += gain * e.raw;
      });
      return result;
    }
    const SplineOf spline(l.spline);
    const T v = l.wrap && !inverse ? wrapped_value(in, spline.limits.right) : in;
    const int own = (l.raw_gradient + i * l.spline.count) * ld + r;
    T result = T(0);
    with_spline(static_cast<Parameterization>(l.spline.form), inverse, [&](auto form, auto backwards) {
      constexpr Parameterization f = decltype(form)::value;
      constexpr bool back = decltype(backwards)::value, in_place = f == Parameterization::nflows;
      const SplineLimits<T> &limits = spline.limits;
      const Sides<T> sides = sides_of<back>(limits);
      const T within = hold(v, sides.low, sides.high);
      const SplineElement<T> at = element(l, i, r);
      const Strided<T> first{at.widths, ld}, second{at.heights, ld}, third{at.derivatives, ld};
      const SplineSoftmax<Strided<T>, f, in_place> widths(first, spline.bins, limits);
      const SplineSoftmax<Strided<T>, f, in_place> heights(second, spline.bins, limits);
      const SplineBin<T> b = find_bin<back>(spline, widths, heights, third, search_key(within, sides.low, sides.high));
      const ElementGradient<T> e =
          map_element_backward<back>(b.segment, sides, v, within, spline.tails != Tails::none, grad, from_logdet);
      result = e.x;
      const T slope0 = e.same ? T(0) : e.slope0 * knot_slope_derivative<f>(b.raw0, b.segment.slope0, limits);
      const T slope1 = e.same ? T(0) : e.slope1 * knot_slope_derivative<f>(b.raw1, b.segment.slope1, limits);
      const Strided<T> to{value_gradients + own, ld};
      const Strided<T> to_heights{to.first + spline.bins * ld, ld}, to_slopes{to.first + 2 * spline.bins * ld, ld};
      widths.backward(b.rest_w, b.number, e.corner_x, e.size_x, b.mass_w, b.share_w, e.same, to);
      heights.backward(b.rest_h, b.number, e.corner_y, e.size_y, b.mass_h, b.share_h, e.same, to_heights);
      const T gain = static_cast<T>(l.gain);
      if (gain != T(1))
        for (int k = 0; k < 2 * spline.bins; ++k)
          to[k] = gain * to[k];
      for (int d = 0; d < spline.count - 2 * spline.bins; ++d)
        to_slopes[d] = (d == b.first ? slope0 : T(0)) + (d == b.second ? slope1 : T(0));
    });
    if (l.raw != l.output) {
      T *const gradients = value_gradients + (l.output_gradient + i * l.spline.count) * ld + r;
      for (int k = 0; k < l.spline.count; ++k)
        gradients[k * ld] += value_gradients[own + k * ld];
    }
    return result;
  }

  // ---- sampling from an autoregressive layer: feature by feature, every row of every value as soon as it is known

  __device__ __forceinline__ void sequential_forward(const TableLayer &l) {
    const int *const orders = job.orders + l.orders;
    const int dim = view.dim;
    each(dim, [&](int j, int r) {
      values[(l.input + j) * ld + r] = T(0);
      y[j * ld + r] = std::numeric_limits<T>::quiet_NaN(); // a feature without an order
      terms[j * ld + r] = T(0);
    });
    __syncthreads();
    for (int now = 0; now <= dim; ++now) {
      each(dim, [&](int j, int r) {
        if (orders[j] + 1 == now)
          values[(l.input + j) * ld + r] = y[j * ld + r];
      });
      __syncthreads();
      for (int k = 0; k < l.step_count; ++k) {
        const TableStep &s = step(l, k);
        if (s.skip)
          continue;
        const int *const order = orders + dim + s.out;
        each(s.rows, [&](int i, int r) {
          if (order[i] != now)
            return;
          if (static_cast<StepKind>(s.kind) != StepKind::dense)
            return elementwise(s, i, r);
          const TableMatrix &m = s.forward;
          const int panel = i / m.width;
          const T *w = job.packed + m.at + panel * (m.in + m.bias) * m.stride + (i - panel * m.width);
          const T *a = values + s.a * ld + r;
          T sum = m.bias ? w[m.in * m.stride] : T(0);
          for (int j = 0; j < m.in; ++j, w += m.stride, a += ld)
            if (const T weight = *w; weight != T(0)) // what is masked is not known yet
              sum += weight * *a;
          with_activation(static_cast<Activation>(s.fused), [&](auto activation) {
            values[(s.out + i) * ld + r] = activated<decltype(activation)::value>(sum, static_cast<T>(s.slope));
          });
        });
        __syncthreads();
      }
      for (int j = 0; j < dim; ++j)
        if (orders[j] == now)
          scale_raw(l, j, j + 1);
      each(dim, [&](int j, int r) {
        if (orders[j] == now)
          y[j * ld + r] = transform(l, j, r, true, x[j * ld + r], terms[j * ld + r]);
      });
      __syncthreads();
    }
    add_terms_of(dim);
  }

  // ---- backward

  __device__ __forceinline__ void backward(const DeviceWalkBack<T, tf32> &back, int tile, T *accumulator, bool add) {
    const bool context_grad = back.grad_context != nullptr;
    begin_tile(tile, view.layer_count - 1);
    const int dim = view.dim;
    const auto made = [&](int position) { return job.inputs + position * job.batch * dim; };
    read(view.layer_count == 0 ? job.x : made(view.layer_count - 1), dim, y);
    if (view.context)
      read(job.context, view.context, values);
    if (back.grad_y != nullptr)
      read(back.grad_y, dim, g, true);
    else
      each(dim, [&](int j, int r) { g[j * ld + r] = T(0); });
    if (thread < rows)
      grad_logdet[thread] = thread < valid ? back.grad_logdet[first + thread] : T(0);
    each(view.context, [&](int i, int r) { value_gradients[i * ld + r] = T(0); });
    __syncthreads();
    if (job.base) {
      each(dim, [&](int j, int r) { g[j * ld + r] -= grad_logdet[r] * y[j * ld + r]; });
      __syncthreads();
    }
    for (int position = view.layer_count - 1; position >= 0; --position) {
      const TableLayer &l = layer_at(position, position - 1);
      read(position == 0 ? job.x : made(position - 1), dim, x);
      layer_backward(l, inverse_of(l), accumulator, add, context_grad);
      T *const other = g, *const before = y;
      g = next_g, next_g = other;
      y = x, x = before;
    }
    write(g, dim, back.grad_x);
    if (context_grad)
      write(value_gradients, view.context, back.grad_context);
  }

  __device__ __forceinline__ void layer_backward(const TableLayer &l, bool inverse, T *accumulator, bool add,
                                                 bool context_grad) {
    switch (static_cast<LayerKind>(l.kind)) {
    case LayerKind::affine:
      return affine_layer_backward(l, inverse, accumulator + l.gradient, add);
    case LayerKind::permute:
      return permute(l, !inverse, g, next_g);
    case LayerKind::linear:
      return linear_backward(l, inverse, accumulator + l.gradient, add);
    case LayerKind::activation: {
      const T slope = static_cast<T>(inverse ? 1 / l.slope : l.slope);
      each(view.dim, [&](int j, int r) {
        const T d = g[j * ld + r];
        next_g[j * ld + r] = x[j * ld + r] < T(0) ? slope * d : d;
      });
      __syncthreads();
      return;
    }
    case LayerKind::coupling: {
      evaluate(l, x);
      each(l.raw_rows, [&](int i, int r) { value_gradients[(l.output_gradient + i) * ld + r] = T(0); });
      __syncthreads();
      const int *const passed = index(l, l.passed), *const transformed = index(l, l.transformed);
      each(l.passed_count, [&](int i, int r) { next_g[passed[i] * ld + r] = g[passed[i] * ld + r]; });
      each(l.transformed_count, [&](int i, int r) {
        const int at = transformed[i] * ld + r;
        next_g[at] = transform_backward(l, i, r, inverse, x[at], y[at], g[at]);
      });
      __syncthreads();
      net_backward(l, accumulator, add, context_grad);
    }
    }
  }

  // to[i] = sum over the rows of the tile, or one more of them.
  __device__ __forceinline__ void put(T *to, T value, bool add) const { *to = add ? *to + value : value; }
  template <class F> __device__ __forceinline__ void sum_rows(int count, T *to, bool add, const F &term) const {
    for (int j = thread; j < count; j += program_threads) {
      T sum = T(0);
      for (int r = 0; r < valid; ++r)
        sum += term(j, r);
      put(to + j, sum, add);
    }
  }
  __device__ __forceinline__ void sum_logdet(bool inverse, T *to, bool add) const {
    sum_rows(1, to, add, [&](int, int r) { return inverse ? -grad_logdet[r] : grad_logdet[r]; });
  }

  // to[o][i] (+)= sum over rows of d[o] a[i]; a thread has 4 x 4 of them, their columns and rows apart so that
  // neighbouring threads read neighbouring features. Rows beyond the batch have d = 0.
  __device__ __forceinline__ void plain_outer(const T *d, int out, const T *a, int in, T *to, bool add) const {
    constexpr int by = 4;
    const int across = (in + by - 1) / by, down = (out + by - 1) / by;
    for (int item = thread; item < across * down; item += program_threads) {
      const int i = item % across, o = item / across;
      T sums[by][by] = {};
      const int end = (valid + vector - 1) / vector * vector;
      for (int r = 0; r < end; r += vector) {
        Vector<T> left[by], right[by];
#pragma unroll
        for (int k = 0; k < by; ++k) { // what lies outside is read once more, and not stored
          left[k] = load_shared<Vector<T>>(d + (o + k * down < out ? o + k * down : o) * ld + r);
          right[k] = load_shared<Vector<T>>(a + (i + k * across < in ? i + k * across : i) * ld + r);
        }
#pragma unroll
        for (int p = 0; p < by; ++p)
#pragma unroll
          for (int q = 0; q < by; ++q)
#pragma unroll
            for (int k = 0; k < vector; ++k)
              sums[p][q] += left[p].at[k] * right[q].at[k];
      }
      const auto inside = [&](int p, int q) { return o + p * down < out && i + q * across < in; };
      const auto place = [&](int p, int q) { return to + (o + p * down) * in + i + q * across; };
      if (add) { // all loads under way before the first store, which nobody knows to be elsewhere
        T before[by][by];
#pragma unroll
        for (int p = 0; p < by; ++p)
#pragma unroll
          for (int q = 0; q < by; ++q)
            before[p][q] = inside(p, q) ? *place(p, q) : T(0);
#pragma unroll
        for (int p = 0; p < by; ++p)
#pragma unroll
          for (int q = 0; q < by; ++q)
            sums[p][q] += before[p][q];
      }
#pragma unroll
      for (int p = 0; p < by; ++p)
#pragma unroll
        for (int q = 0; q < by; ++q)
          if (inside(p, q))
            *place(p, q) = sums[p][q];
    }
  }

  // The same on tensor cores, for 16 rows of d from o on and tiles of 8 of a from i on.
  template <int tiles>
  __device__ __forceinline__ void tensor_outer(const T *d, int out, const T *a, int in, T *to, bool add, int o,
                                               int i) const {
    const int lane = thread % warp_lanes, group = lane / 4, pair = lane % 4;
    const auto row = [&](const T *from, int feature, int count) { // what lies outside is read again, and not stored
      return from + (feature < count ? feature : count - 1) * ld + pair;
    };
    const T *const first = row(d, o + group, out), *const second = row(d, o + group + 8, out);
    const T *columns[tiles];
#pragma unroll
    for (int j = 0; j < tiles; ++j)
      columns[j] = row(a, i + 8 * j + group, in);
    float sums[tiles][4] = {};
    for (int r = 0; r < valid; r += 8) {
      Tf32Parts left[4], right[tiles][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        left[2 * e] = tf32_parts<split>(first[r + 4 * e]), left[2 * e + 1] = tf32_parts<split>(second[r + 4 * e]);
#pragma unroll
        for (int j = 0; j < tiles; ++j)
          right[j][e] = tf32_parts<split>(columns[j][r + 4 * e]);
      }
      multiply_tf32<split>(sums, left, right);
    }
    const auto each_inside = [&](const auto &f) {
#pragma unroll
      for (int j = 0; j < tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int down = o + group + e / 2 * 8, across = i + 8 * j + 2 * pair + e % 2;
          if (down < out && across < in)
            f(to[down * in + across], sums[j][e]);
        }
    };
    if (add) // all loads under way before the first store
      each_inside([](T before, float &sum) { sum += before; });
    each_inside([](T &place, float sum) { place = sum; });
  }

  __device__ __forceinline__ void outer(const T *d, int out, const T *a, int in, T *to, bool add) const {
    if constexpr (tensor) {
      const int down = (out + 15) / 16;
      with_tiles(down, (in + 7) / 8, [&](auto tiles, int items) {
        constexpr int count = decltype(tiles)::value;
        for (int item = thread / warp_lanes; item < items; item += program_threads / warp_lanes)
          tensor_outer<count>(d, out, a, in, to, add, item % down * 16, item / down * 8 * count);
      });
    } else {
      plain_outer(d, out, a, in, to, add);
    }
  }

  // Accumulated: [dim] shifts, [dim] scales, the log-det.
  __device__ __forceinline__ void affine_layer_backward(const TableLayer &l, bool inverse, T *to, bool add) {
    const int dim = view.dim;
    const T *const scale = job.packed + l.packed, *const shift = scale + dim;
    with_order(l, inverse, [&](auto shift_first, auto backwards) {
      constexpr bool first_shift = decltype(shift_first)::value, back = decltype(backwards)::value;
      const auto gradient = [&](int j, int r) {
        const T t = first_shift ? shift[j] : T(0);
        // what is scaled; of the inverse map without what a shift that is not finite made of it
        const T scaled = back ? (first_shift ? x[j * ld + r] / scale[j] : y[j * ld + r]) : x[j * ld + r] + t;
        return affine_backward<first_shift, back>(scaled, scale[j], g[j * ld + r]);
      };
      each(dim, [&](int j, int r) { next_g[j * ld + r] = gradient(j, r).x; });
      sum_rows(dim, to, add, [&](int j, int r) { return gradient(j, r).shift; });
      sum_rows(dim, to + dim, add, [&](int j, int r) { return gradient(j, r).scale; });
    });
    sum_logdet(inverse, to + 2 * dim, add);
    __syncthreads();
  }

  // Accumulated: dL, dU as [dim, dim] each, the bias, the log-det. Of the inverse map the gradients of L, U and the
  // bias come with the opposite sign.
  __device__ __forceinline__ void linear_backward(const TableLayer &l, bool inverse, T *to, bool add) {
    const int dim = view.dim;
    const T *const lower = job.packed + l.packed, *const upper = lower + dim * dim;
    T *const h = terms, *const gh = h + dim * ld;
    const T *const input = inverse ? y : x; // of U
    triangle(upper, dim, 1, false, input, h, nullptr);
    const T *of_lower = g;
    if (inverse) {
      each(dim, [&](int j, int r) { gh[j * ld + r] = g[j * ld + r]; });
      __syncthreads();
      solve(upper, 1, dim, true, gh); // U^T gh = g
      each(dim, [&](int j, int r) { next_g[j * ld + r] = gh[j * ld + r]; });
      __syncthreads();
      solve(lower, 1, dim, false, next_g); // L^T next_g = gh
      of_lower = next_g;
    } else {
      triangle(lower, 1, dim, false, g, gh, nullptr);
      triangle(upper, 1, dim, true, gh, next_g, nullptr);
    }
    outer(of_lower, dim, h, dim, to, add);
    outer(gh, dim, input, dim, to + dim * dim, add);
    sum_rows(dim, to + 2 * dim * dim, add, [&](int j, int r) { return of_lower[j * ld + r]; });
    sum_logdet(inverse, to + 2 * dim * dim + dim, add);
    __syncthreads();
  }

  // From the gradients of the raw values to those of the weights, of the context, and of x, which are added to next_g.
  __device__ __forceinline__ void net_backward(const TableLayer &l, T *accumulator, bool add, bool context_grad) {
    for (int k = l.step_count - 1; k >= 0; --k) {
      const TableStep &s = step(l, k);
      T *const d = value_gradients + s.dout * ld, *const ga = value_gradients + s.da * ld;
      T *const gb = value_gradients + s.db * ld;
      const bool to_a = s.a >= view.context || context_grad, to_b = s.b >= view.context || context_grad;
      if (s.unread) {
        each(s.rows, [&](int i, int r) { d[i * ld + r] = T(0); });
        __syncthreads();
      }
      const auto pass = [&](T *to, int at, T value, bool add_to) { to[at] = add_to ? to[at] + value : value; };
      switch (static_cast<StepKind>(s.kind)) {
      case StepKind::dense:
        outer(d, s.rows, values + s.a * ld, s.forward.in, accumulator + s.weight_gradient, add);
        if (s.forward.bias)
          sum_rows(s.rows, accumulator + s.weight_gradient + s.rows * s.forward.in, add,
                   [&](int o, int r) { return d[o * ld + r]; });
        if (to_a)
          product(
              s.backward, d, [](auto &) {},
              [&](int i, auto sum, int r) {
                T *const to = ga + i * ld + r;
                if (s.add_a) {
                  const auto before = load_shared<decltype(sum)>(to);
#pragma unroll
                  for (int c = 0; c < sum.size; ++c)
                    sum.at[c] += before.at[c];
                }
                store_shared(sum, to);
              });
        else
          __syncthreads();
        break;
      case StepKind::context:
        if (context_grad)
          each(s.rows, [&](int i, int r) { pass(ga, i * ld + r, d[i * ld + r], true); });
        break;
      case StepKind::act:
        if (to_a)
          with_activation(static_cast<Activation>(s.activation), [&](auto activation) {
            constexpr Activation kind = decltype(activation)::value;
            const T *const at = values + (derivative_reads_input(kind) ? s.a : s.out) * ld;
            each(s.rows, [&](int i, int r) {
              const int e = i * ld + r;
              pass(ga, e, activated_backward<kind>(at[e], d[e], static_cast<T>(s.slope)), s.add_a && s.da != s.dout);
            });
          });
        break;
      case StepKind::add:
        each(s.rows, [&](int i, int r) {
          const int e = i * ld + r;
          const T value = d[e];
          if (to_a)
            pass(ga, e, value, s.add_a);
          if (to_b)
            pass(gb, e, value, s.add_b);
        });
        break;
      case StepKind::glu:
        each(s.rows, [&](int i, int r) {
          const int e = i * ld + r;
          const GateGradient<T> gradient = gated_backward(values[s.a * ld + e], values[s.b * ld + e], d[e]);
          if (to_a)
            pass(ga, e, gradient.a, s.add_a);
          if (to_b)
            pass(gb, e, gradient.gate, s.add_b);
        });
        break;
      case StepKind::concat:
        if (to_a)
          each(s.a_rows, [&](int i, int r) { pass(ga, i * ld + r, d[i * ld + r], s.add_a); });
        if (s.a == s.b) // of one value twice
          __syncthreads();
        if (to_b)
          each(s.rows - s.a_rows, [&](int i, int r) { pass(gb, i * ld + r, d[(s.a_rows + i) * ld + r], s.add_b); });
      }
      if (static_cast<StepKind>(s.kind) != StepKind::dense)
        __syncthreads();
    }
    if (l.input_has_gradient) {
      const int *const conditioning = index(l, l.index);
      each(l.index_count,
           [&](int i, int r) { next_g[conditioning[i] * ld + r] += value_gradients[(l.input_gradient + i) * ld + r]; });
      __syncthreads();
    }
  }
};

template <class T, int tf32>
__global__ void __launch_bounds__(program_threads, sizeof(T) == 4 ? 2 : 1)
    program_forward_kernel(const __grid_constant__ DeviceWalk<T, tf32> job) {
  TileWalk<T, tf32> walk(job, false, job.inverse ? list_inverse : list_forward);
  for (int tile = blockIdx.x; tile < job.tiles; tile += gridDim.x)
    walk.forward(tile);
}

template <class T, int tf32>
__global__ void __launch_bounds__(program_threads, sizeof(T) == 4 ? 2 : 1)
    program_backward_kernel(const __grid_constant__ DeviceWalkBack<T, tf32> job) {
  const int list = list_backward + (job.walk.inverse ? 1 : 0) + (job.grad_context != nullptr ? 2 : 0);
  TileWalk<T, tf32> walk(job.walk, true, list);
  T *const accumulator = job.accumulators + static_cast<int64_t>(blockIdx.x) * job.walk.view.accumulator;
  for (int tile = blockIdx.x; tile < job.walk.tiles; tile += gridDim.x)
    walk.backward(job, tile, accumulator, tile != static_cast<int>(blockIdx.x));
}

// ---- launches

// Accumulators, and blocks, of a walk back: one for each multiprocessor of an H100, or two where two blocks fit one.
template <class T, int tf32> unsigned program_accumulators(const DeviceWalk<T, tf32> &walk) {
  const int most = shared_bytes(walk.view, 1 << walk.log_rows, sizeof(T), true) <= 110 * 1024 ? 256 : 128;
  return static_cast<unsigned>(walk.tiles < most ? walk.tiles : most);
}

// `to`: aligned to 16 bytes, with room for 16 more than the table has.
template <class Launch> void launch_program_table(const Table &table, unsigned char *to, Launch &&launch) {
  const int all = static_cast<int>((table.bytes.size() + 3) / 4); // words
  for (int at = 0; at < all; at += TableChunk::size) {
    TableChunk chunk{};
    const int count = all - at < TableChunk::size ? all - at : TableChunk::size;
    const size_t first = size_t(at) * 4, left = table.bytes.size() - first;
    std::memcpy(chunk.words, table.bytes.data() + first, left < sizeof(chunk.words) ? left : sizeof(chunk.words));
    launch(program_table_kernel<>, dim3(1), dim3(program_threads), chunk, reinterpret_cast<unsigned *>(to) + at, count);
  }
}

// f(parts, how many, blocks that the largest of them needs) for launches over all parts. data(ref): where a parameter
// lies, or null; gradient(ref): where its gradient goes, or null; is_bool(ref): whether a mask is of bool.
template <class T, class Data, class Gradient, class IsBool, class F>
void each_parts(const Table &table, const Data &data, const Gradient &gradient, const IsBool &is_bool, const F &f) {
  DeviceParts<T> parts;
  int count = 0;
  int64_t largest = 0;
  const auto flush = [&] {
    const int64_t blocks = (largest + program_threads - 1) / program_threads;
    if (count > 0)
      f(parts, count, static_cast<unsigned>(blocks < 1 ? 1 : blocks < 256 ? blocks : 256));
    count = 0, largest = 0;
  };
  for (const TablePart &p : table.parts) {
    const bool dense = p.kind == TablePart::dense;
    DevicePart<T> &part = parts.parts[count++];
    part.kind = p.kind, part.in = p.in, part.out = p.out, part.panels = p.panels, part.inverted = p.inverted;
    part.bool_mask = dense && p.b.present() && is_bool(p.b), part.storage = p.storage, part.form = p.form;
    part.way = {p.forward.at, p.forward.width, p.forward.stride};
    part.back = {p.backward.at, p.backward.width, p.backward.stride};
    part.gain = p.gain, part.gain_rows = p.gain_rows, part.gain_count = p.gain_count, part.eps = p.eps;
    part.a = data(p.a), part.b = data(p.b), part.c = data(p.c), part.d = data(p.d);
    part.packed = p.packed, part.gradient = p.gradient;
    part.to_a = gradient(p.a), part.to_b = dense ? nullptr : gradient(p.b);
    part.to_c = gradient(p.c), part.to_d = gradient(p.d);
    const int64_t elements = dense                         ? static_cast<int64_t>(p.in) * p.out
                             : p.kind == TablePart::linear ? static_cast<int64_t>(p.out) * p.out
                                                           : p.out;
    largest = elements > largest ? elements : largest;
    if (count == most_parts)
      flush();
  }
  flush();
}

// Parameters to `packed`, table.packed elements.
template <class T, class Data, class IsBool, class Launch>
void launch_program_pack(const Table &table, const Data &data, const IsBool &is_bool, T *packed, Launch &&launch) {
  const auto none = [](const ParameterRef &) -> T * { return nullptr; };
  each_parts<T>(table, data, none, is_bool, [&](const DeviceParts<T> &parts, int count, unsigned blocks) {
    launch(program_pack_kernel<T>, dim3(blocks, count), dim3(program_threads), parts, packed);
  });
}

// The gradients of parameters, after launch_program_backward.
template <class T, int tf32, class Data, class Gradient, class IsBool, class Launch>
void launch_program_sum(const Table &table, const DeviceWalkBack<T, tf32> &back, const Data &data,
                        const Gradient &gradient, const IsBool &is_bool, Launch &&launch) {
  each_parts<T>(table, data, gradient, is_bool, [&](const DeviceParts<T> &parts, int count, unsigned blocks) {
    launch(program_sum_kernel<T>, dim3(blocks, count), dim3(program_threads), parts,
           static_cast<const T *>(back.walk.packed), static_cast<const T *>(back.accumulators), table.view.accumulator,
           static_cast<int>(program_accumulators(back.walk)), back.walk.inverse);
  });
}

// `blocks`: of the walk.
template <class T, int tf32, class Launch>
void launch_program_forward(const DeviceWalk<T, tf32> &walk, int *orders, unsigned blocks, Launch &&launch) {
  if (orders != nullptr)
    launch(program_order_kernel<T>, dim3(walk.view.layer_count), dim3(program_threads), walk.table, walk.view,
           static_cast<const T *>(walk.packed), orders, walk.inverse);
  const size_t bytes = shared_bytes(walk.view, 1 << walk.log_rows, sizeof(T), false);
  launch.with_shared(bytes)(program_forward_kernel<T, tf32>, dim3(blocks), dim3(program_threads), walk);
}

template <class T, int tf32, class Launch>
void launch_program_backward(const DeviceWalkBack<T, tf32> &back, Launch &&launch) {
  const size_t bytes = shared_bytes(back.walk.view, 1 << back.walk.log_rows, sizeof(T), true);
  launch.with_shared(bytes)(program_backward_kernel<T, tf32>, dim3(program_accumulators(back.walk)),
                            dim3(program_threads), back);
}

} // namespace iin_fast
