// Before and after the walk of a flow on a GPU (flow_program_kernels.cuh): the table to the device, parameters packed
// as the walk reads them, the order of autoregressive layers, and gradients from the accumulators of a walk back.
#pragma once

#include "common/rows.cuh"
#include "flow/flow.h"
#include "flow_program/elementwise.h"
#include "flow_program/flow_program_table.h"

namespace iin_fast {

// Of a TableMatrix what the packing of its panels needs.
struct DevicePanels {
  int at, width, stride;
};

// A TablePart with its tensors.
template <class T> struct DevicePart {
  int kind, in, out, panels, bool_mask, storage, form, inverted;
  DevicePanels way, back;    // dense: the weight, and the same transposed
  int gain_rows, gain_count; // see TablePart
  const void *a, *b, *c, *d; // see TablePart; null: absent
  int64_t packed;
  int64_t gradient;
  T *to_a, *to_b, *to_c, *to_d; // gradients; null: not wanted
  double eps, gain;
};

constexpr int most_parts = 24; // of a launch: arguments of a kernel have 4 KiB
template <class T> struct DeviceParts {
  DevicePart<T> parts[most_parts];
};

// Where element (o, i) of a dense weight lies.
template <class T> __device__ __forceinline__ int64_t weight_at(const DevicePart<T> &p, int o, int i) {
  if (!p.panels)
    return static_cast<int64_t>(o) * p.in + i;
  const int first = o / panel_width * panel_width, left = p.out - first;
  const int width = left < panel_width ? left : panel_width;
  return static_cast<int64_t>(first) * p.in + static_cast<int64_t>(i) * width + (o - first);
}
template <class T> __device__ __forceinline__ T mask_at(const DevicePart<T> &p, int64_t at) {
  if (p.b == nullptr)
    return T(1);
  if (p.bool_mask)
    return T(static_cast<const uint8_t *>(p.b)[at] != 0);
  return static_cast<const T *>(p.b)[at];
}

template <class T> __device__ __forceinline__ T gain_of(const DevicePart<T> &p, int o) {
  return o % p.gain_count < p.gain_rows ? static_cast<T>(p.gain) : T(1);
}

// Sum of v(j) over j below count, in order, by one thread.
template <class T, class F> __device__ __forceinline__ T sum_of(int count, const F &v) {
  CompensatedSum<T> sum;
  for (int j = 0; j < count; ++j)
    sum.add(v(j));
  return sum.total();
}

// Parameters as the walk reads them. A row of blocks for each part.
template <class T>
__global__ void __launch_bounds__(program_threads, 1)
    program_pack_kernel(const __grid_constant__ DeviceParts<T> job, T *packed) {
  const DevicePart<T> &p = job.parts[blockIdx.y];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * program_threads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * program_threads;
  const T *const a = static_cast<const T *>(p.a), *const b = static_cast<const T *>(p.b);
  const T *const c = static_cast<const T *>(p.c), *const d = static_cast<const T *>(p.d);
  T *const to = packed + p.packed;
  const int dim = p.out;
  const T eps = static_cast<T>(p.eps);
  const ScaleForm form = static_cast<ScaleForm>(p.form);
  switch (p.kind) {
  case TablePart::dense: {
    const auto weight = [&](int o, int i) { // or the bias, behind the last column
      const int64_t at = weight_at(p, o, i);
      return gain_of(p, o) * (i < p.in ? a[at] * mask_at(p, at) : c[o]);
    };
    const auto panels = [&](const DevicePanels &m, int rows, int columns, const auto &element) {
      const int panel = m.stride * rows;
      const int64_t all = static_cast<int64_t>((columns + m.width - 1) / m.width) * panel;
      for (int64_t e = first; e < all; e += step) {
        const int within = static_cast<int>(e % m.stride), column = static_cast<int>(e / panel) * m.width + within;
        const int row = static_cast<int>(e % panel) / m.stride;
        packed[m.at + e] = within < m.width && column < columns ? element(column, row) : T(0);
      }
    };
    panels(p.way, p.in + (c != nullptr ? 1 : 0), p.out, weight);
    panels(p.back, p.out, p.in, [&](int i, int o) { return weight(o, i); });
    break;
  }
  case TablePart::index:
    for (int64_t e = first; e < p.out; e += step) { // what is no index would lead out of shared memory
      const int64_t index = static_cast<const int64_t *>(p.a)[e];
      reinterpret_cast<int64_t *>(to)[e] = index >= 0 && index < p.out ? index : 0;
    }
    break;
  case TablePart::affine: {
    const auto scale = [&](int j) { return b == nullptr ? T(1) : scale_of(form, b[j], eps); };
    for (int64_t j = first; j < dim; j += step)
      to[j] = scale(static_cast<int>(j)), to[dim + j] = a == nullptr ? T(0) : a[j];
    if (first == 0)
      to[2 * dim] = sum_of<T>(dim, [&](int j) { return b == nullptr ? T(0) : log_scale(form, b[j], scale(j)); });
    break;
  }
  case TablePart::linear: {
    const int64_t square = static_cast<int64_t>(dim) * dim;
    const auto raw = [&](int i) { return p.storage == 0 ? c[i] : a[static_cast<int64_t>(i) * dim + i]; };
    const auto diagonal = [&](int i) { return scale_of(form, raw(i), eps); };
    for (int64_t e = first; e < square; e += step) {
      const int64_t i = e / dim, j = e % dim;
      to[e] = i == j ? T(1) : j > i ? T(0) : p.storage == 0 ? a[i * (i - 1) / 2 + j] : a[e];
      to[square + e] = j < i            ? T(0)
                       : i == j         ? diagonal(static_cast<int>(i))
                       : p.storage == 0 ? b[i * dim - i * (i + 1) / 2 + j - i - 1]
                                        : a[e];
    }
    for (int64_t j = first; j < dim; j += step)
      to[2 * square + j] = d == nullptr ? T(0) : d[j];
    if (first == 0)
      to[2 * square + dim] = sum_of<T>(dim, [&](int i) { return log_scale(form, raw(i), diagonal(i)); });
  }
  }
}

// Gradients of the parameters: accumulators are added in order. A row of blocks for each part.
template <class T>
__global__ void __launch_bounds__(program_threads, 1)
    program_sum_kernel(const __grid_constant__ DeviceParts<T> job, const T *packed, const T *accumulators,
                       int64_t stride, int count, bool inverse_run) {
  const DevicePart<T> &p = job.parts[blockIdx.y];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * program_threads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * program_threads;
  const auto total = [&](int64_t at) {
    const T *from = accumulators + p.gradient + at;
    T sum = T(0);
#pragma unroll 8
    for (int k = 0; k < count; ++k, from += stride)
      sum += *from;
    return sum;
  };
  const int dim = p.out;
  const ScaleForm form = static_cast<ScaleForm>(p.form);
  switch (p.kind) {
  case TablePart::dense:
    for (int64_t e = first; p.to_a != nullptr && e < static_cast<int64_t>(p.in) * p.out; e += step) {
      const int64_t at = weight_at(p, static_cast<int>(e / p.in), static_cast<int>(e % p.in));
      const T mask = mask_at(p, at);
      p.to_a[at] = mask == T(0) ? T(0) : gain_of(p, static_cast<int>(e / p.in)) * mask * total(e);
    }
    for (int64_t o = first; p.to_c != nullptr && o < p.out; o += step)
      p.to_c[o] = gain_of(p, static_cast<int>(o)) * total(static_cast<int64_t>(p.in) * p.out + o);
    break;
  case TablePart::affine: {
    const T *const scale = packed + p.packed, *const raw = static_cast<const T *>(p.b);
    for (int64_t j = first; p.to_a != nullptr && j < dim; j += step)
      p.to_a[j] = total(j);
    for (int64_t j = first; p.to_b != nullptr && j < dim; j += step)
      p.to_b[j] = scale_gradient(form, raw[j], scale[j], total(dim + j), total(2 * dim));
    break;
  }
  case TablePart::linear: {
    const int64_t square = static_cast<int64_t>(dim) * dim;
    const T sign = (p.inverted != 0) != inverse_run ? T(-1) : T(1);
    const T *const upper = packed + p.packed + square;
    for (int64_t e = first; e < square; e += step) {
      const int64_t i = e / dim, j = e % dim;
      if (j < i) {
        if (p.to_a != nullptr)
          p.to_a[p.storage == 0 ? i * (i - 1) / 2 + j : e] = sign * total(e);
      } else if (j > i) {
        if (T *const to = p.storage == 0 ? p.to_b : p.to_a)
          to[p.storage == 0 ? i * dim - i * (i + 1) / 2 + j - i - 1 : e] = sign * total(square + e);
      } else if (T *const to = p.storage == 0 ? p.to_c : p.to_a) {
        const T raw = p.storage == 0 ? static_cast<const T *>(p.c)[i] : static_cast<const T *>(p.a)[e];
        to[p.storage == 0 ? i : e] =
            scale_gradient(form, raw, upper[e], sign * total(square + e), total(2 * square + dim));
      }
    }
    for (int64_t j = first; p.to_d != nullptr && j < dim; j += step)
      p.to_d[j] = sign * total(2 * square + j);
  }
  }
}

// Of each autoregressive layer that runs by its inverse: when each feature, and each row of each value, is known. A
// block for each layer of the program.
template <class T>
__global__ void __launch_bounds__(program_threads)
    program_order_kernel(const unsigned char *table, const __grid_constant__ TableView view, const T *packed,
                         int *orders, bool inverse) {
  constexpr int unknown = 1 << 30;
  const TableRecord record = reinterpret_cast<const TableRecord *>(table + view.records)[blockIdx.x];
  const TableLayer &l = *reinterpret_cast<const TableLayer *>(table + record.at);
  if (static_cast<LayerKind>(l.kind) != LayerKind::coupling || !l.autoregressive || (l.inverted != 0) == inverse)
    return;
  const TableStep *const steps = reinterpret_cast<const TableStep *>(&l + 1);
  const int thread = threadIdx.x, dim = view.dim;
  int *const features = orders + l.orders, *const rows = features + dim;
  for (int i = thread; i < dim; i += program_threads)
    features[i] = unknown, rows[l.input + i] = unknown;
  for (int i = thread; i < view.context; i += program_threads)
    rows[i] = 0;
  for (int k = 0; k < l.step_count; ++k)
    for (int i = thread; i < steps[k].rows; i += program_threads)
      rows[steps[k].out + i] = unknown;
  __syncthreads();
  for (int now = 0; now < dim; ++now) {
    for (int k = 0; k < l.step_count; ++k) {
      const TableStep &s = steps[k];
      const StepKind kind = static_cast<StepKind>(s.kind);
      for (int i = thread; i < s.rows; i += program_threads) {
        if (rows[s.out + i] <= now || (s.a == s.out && kind == StepKind::act))
          continue;
        bool known = true;
        if (kind == StepKind::dense) {
          const TableMatrix &m = s.forward;
          const int panel = i / m.width;
          const T *w = packed + m.at + panel * (m.in + m.bias) * m.stride + (i - panel * m.width);
          for (int j = 0; j < m.in && known; ++j, w += m.stride)
            known = rows[s.a + j] <= now || *w == T(0);
        } else if (kind == StepKind::concat) {
          known = rows[i < s.a_rows ? s.a + i : s.b + i - s.a_rows] <= now;
        } else {
          known = rows[s.a + i] <= now && (kind == StepKind::act || rows[s.b + i] <= now);
        }
        if (known)
          rows[s.out + i] = now;
      }
      __syncthreads();
    }
    for (int j = thread; j < dim; j += program_threads) {
      if (features[j] <= now)
        continue;
      const auto raw = [&](int i) { return rows[l.output + i] <= now; };
      bool known = true;
      if (static_cast<TransformerKind>(l.transformer) == TransformerKind::affine) {
        const TableAffine &t = l.affine;
        known = raw(t.shift_at + j * t.shift_step) && (t.scale_at < 0 || raw(t.scale_at + j * t.scale_step));
      } else {
        for (int i = 0; i < l.spline.count && known; ++i)
          known = raw(j * l.spline.count + i);
      }
      if (known)
        features[j] = now, rows[l.input + j] = now + 1;
    }
    __syncthreads();
  }
}

// A table to where the walk reads it, as an argument of a launch: a copy that a CUDA graph can hold.
struct TableChunk {
  static constexpr int size = 992;
  unsigned words[size];
};
template <int = 0> // a kernel of a header
__global__ void __launch_bounds__(program_threads)
    program_table_kernel(const __grid_constant__ TableChunk chunk, unsigned *to, int count) {
  for (int i = threadIdx.x; i < count; i += program_threads)
    to[i] = chunk.words[i];
}

} // namespace iin_fast
