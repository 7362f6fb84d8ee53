// Rational-quadratic splines on the CPU: one pass over the raw parameters of each element.
//
// With K bins and linear tails an element reads 3K - 1 raw values and x and writes y: 4 (3K + 1) bytes in float32, 100
// at K = 8; backward reads grad_y as well and writes the gradients: 4 (6K + 1), 196 at K = 8. A block is one vector
// register of elements (64 bytes), an element to a lane: its raw values are turned to [value][lane] on the way in, and
// gradients back on the way out. Rows are the unit of parallel work; blocks run across rows, so that one feature fills
// lanes too. What is done with a block is in spline_block.h.
#include "spline_coupling/spline_coupling_loops.h"

#include "common/simd.h"
#include "common/sum.h"
#include "spline_coupling/spline_block.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

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

// Turns `count` values of each of `lanes<T>` rows to columns: column[k * column_stride + i] = row[i][k]. The last
// square overlaps the one before; a row of less than a vector is read to the vector's end.
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
      if (i < count)
        store(column + (k + i) * column_stride, square[i]);
    if (k + n >= count)
      break;
  }
}

// And back: row i is at rows + i * count. Of a row of less than a vector, the rest of the vector is written, too, as
// long as it ends before `end`: rows that follow, which are written later.
template <class T>
IIN_FAST_INLINE void columns_to_rows(const T *column, int64_t column_stride, int64_t count, T *rows, const T *end) {
  constexpr int n = lanes<T>;
  for (int64_t k = 0;; k = smaller(k + n, count - n)) {
    vec<T> square[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      square[i] = i < count ? load(column + (k + i) * column_stride) : vec<T>{};
    transpose_stage<T, 1>(square);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      T *const to = rows + i * count + k;
      if (to + n <= end) {
        store(to, square[i]);
        continue;
      }
      alignas(64) T last[n];
      store(last, square[i]);
      for (int64_t j = 0; j < smaller(n, count); ++j)
        to[j] = last[j];
    }
    if (k + n >= count)
      break;
  }
}

// raw[k][lane] for a block. `buffer` takes its rows where they have to be converted, or end too near the tensor's end.
template <class Storage, class T>
IIN_FAST_INLINE void gather(const SplineValues<Storage> &p, int64_t row, int64_t feature, int64_t features, int valid,
                            T *raw, T *buffer) {
  constexpr int block = block_size<T>;
  const T *at[block];
  for (int l = 0; l < block; ++l) {
    const Storage *const from = p.data + row * p.row_stride + feature * p.feature_stride;
    at[l] = iin_fast::load(from, buffer + l * p.count, p.count);
    if (sizeof(Storage) == sizeof(T) && p.count < lanes<T> && p.end - from < lanes<T>) {
      for (int64_t k = 0; k < p.count; ++k)
        buffer[l * p.count + k] = at[l][k];
      at[l] = buffer + l * p.count;
    }
    if (l + 1 < valid && ++feature == features) {
      feature = 0;
      ++row;
    }
  }
  if (p.count > 0)
    for (int first = 0; first < block; first += lanes<T>)
      rows_to_columns(at + first, p.count, raw + first, block);
}

template <class Storage, class T>
IIN_FAST_INLINE void gather(const SplineParameters<Storage> &p, int64_t row, int64_t feature, int64_t features,
                            int valid, T *raw, T *buffer) {
  for (int i = 0; i < p.tensors; ++i) {
    gather(p.values[i], row, feature, features, valid, raw, buffer);
    raw += p.values[i].count * block_size<T>;
  }
}

// Gradients raw[k][lane] of the first `valid` elements of a block, side by side from `out` on.
template <class Storage, class T>
IIN_FAST_INLINE void scatter(const T *raw, int64_t count, int valid, Storage *out, T *buffer) {
  constexpr int block = block_size<T>;
  T *rows = output(out, buffer);
  int done = 0;
  if (count > 0)
    for (; done + lanes<T> <= valid; done += lanes<T>)
      columns_to_rows(raw + done, block, count, rows + done * count, rows + valid * count);
  for (int l = done; l < valid; ++l)
    for (int64_t k = 0; k < count; ++k)
      rows[l * count + k] = raw[k * block + l];
  iin_fast::store(rows, out, valid * count);
}

// Values of [rows, features] by lane.
template <class Storage, class T> IIN_FAST_INLINE void take(const Storage *values, int64_t element, int valid, T *out) {
  for (int l = 0; l < block_size<T>; ++l)
    out[l] = widen(values + element + (l < valid ? l : valid - 1));
}

template <Parameterization form, bool inverse, class Storage>
void forward_rows(const SplineForward<Storage> &job, int64_t begin, int64_t end, compute_t<Storage> *raw) {
  using T = compute_t<Storage>;
  constexpr int block = block_size<T>;
  const SplineParameters<Storage> &p = job.parameters;
  const auto shape = spline_shape<T>(p.bins, p.tails, p.limits);
  T *const buffer = raw + p.count * block, *const work = buffer + p.count * block;
  alignas(64) T x[block], y[block], logdet[block];
  const int64_t features = job.features, stop = end * features;
  if (features == 0)
    for (int64_t row = begin; row < end; ++row)
      job.logdet[row] = T(0);
  int64_t row = begin, feature = 0; // of the next term of the log-det
  CompensatedSum<double> sum;
  for (int64_t element = begin * features; element < stop; element += block) {
    const int valid = stop - element < block ? static_cast<int>(stop - element) : block;
    gather(p, row, feature, features, valid, raw, buffer);
    take(job.x, element, valid, x);
    spline_block_forward<form, inverse>(shape, raw, block, x, y, logdet, work);
    for (int l = 0; l < valid; ++l)
      narrow(y[l], job.y + element + l);
    if (features == 1) { // nothing to add up
      for (int l = 0; l < valid; ++l)
        job.logdet[element + l] = logdet[l];
      row += valid;
      continue;
    }
    for (int l = 0; l < valid;) {
      const int count = static_cast<int>(smaller(valid - l, features - feature));
      add_terms<T>(sum, count, [&](int64_t i) __attribute__((always_inline)) { return logdet[l + i]; });
      l += count;
      feature += count;
      if (feature == features) {
        job.logdet[row++] = static_cast<T>(sum.total());
        sum = {};
        feature = 0;
      }
    }
  }
}

template <Parameterization form, bool inverse, class Storage>
void backward_rows(const SplineBackward<Storage> &job, int64_t begin, int64_t end, compute_t<Storage> *raw) {
  using T = compute_t<Storage>;
  constexpr int block = block_size<T>;
  const SplineParameters<Storage> &p = job.parameters;
  const auto shape = spline_shape<T>(p.bins, p.tails, p.limits);
  T *const buffer = raw + p.count * block, *const work = buffer + p.count * block;
  alignas(64) T x[block], grad_y[block], grad_logdet[block], grad_x[block];
  const int64_t features = job.features, stop = end * features;
  for (int64_t element = begin * features; element < stop; element += block) {
    const int valid = stop - element < block ? static_cast<int>(stop - element) : block;
    int64_t row = element / features, feature = element % features;
    gather(p, row, feature, features, valid, raw, buffer);
    take(job.x, element, valid, x);
    take(job.grad_y, element, valid, grad_y);
    for (int l = 0; l < block; ++l) {
      grad_logdet[l] = job.grad_logdet[row];
      if (l + 1 < valid && ++feature == features) {
        feature = 0;
        ++row;
      }
    }
    spline_block_backward<form, inverse>(shape, raw, block, x, grad_y, grad_logdet, raw, block, grad_x, work);
    for (int l = 0; l < valid; ++l)
      narrow(grad_x[l], job.grad_x + element + l);
    const T *from = raw;
    for (int i = 0; i < p.tensors; ++i) {
      const int64_t count = p.values[i].count;
      scatter(from, count, valid, job.grad_values[i] + element * count, buffer);
      from += count * block;
    }
  }
}

// The first address in `scratch` that a vector can be read from without crossing a cache line.
template <class T> IIN_FAST_INLINE T *aligned(T *scratch) {
  return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
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
