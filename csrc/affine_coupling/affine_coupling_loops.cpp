// Affine coupling on the CPU: one pass over each row, log-det summed on the way.
//
// Forward reads x, raw and shift and writes y: 16 bytes an element in float32; backward reads value, raw and grad_y and
// writes three gradients: 24 bytes. Both are bound by memory for tensors beyond the cache and by the elementary
// functions within it. Rows are the unit of parallel work; a row is summed in one thread, in one order.
#include "affine_coupling/affine_coupling_loops.h"

#include "common/sum.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

template <Squash squash, bool inverse, class Storage>
void forward_rows(const CouplingForward<Storage> &job, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const T clamp = static_cast<T>(job.clamp);
  T x_block[buffer_elements<Storage>], raw_block[buffer_elements<Storage>], shift_block[buffer_elements<Storage>];
  for (int64_t row = begin; row < end; ++row) {
    CompensatedSum<double> sum;
    for (int64_t start = 0; start < job.features; start += block_elements<Storage>) {
      const int64_t rest = job.features - start,
                    count = rest < block_elements<Storage> ? rest : block_elements<Storage>;
      Storage *y_row = job.y + row * job.features + start;
      const T *x = load(job.x[row] + start, x_block, count);
      const T *raw = squash == Squash::none ? x : load(job.raw[row] + start, raw_block, count);
      const T *shift = load(job.shift[row] + start, shift_block, count);
      T *y = output(y_row, x_block);
      add_terms<T>(sum, count, [&](int64_t i) __attribute__((always_inline)) {
        T logdet;
        y[i] = couple<squash, inverse>(x[i], raw[i], shift[i], clamp, logdet);
        return logdet;
      });
      store(y, y_row, count);
    }
    job.logdet[row] = static_cast<T>(sum.total());
  }
}

template <Squash squash, bool inverse, class Storage>
void backward_rows(const CouplingBackward<Storage> &job, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const T clamp = static_cast<T>(job.clamp);
  T value_block[buffer_elements<Storage>], raw_block[buffer_elements<Storage>], grad_block[buffer_elements<Storage>];
  for (int64_t row = begin; row < end; ++row) {
    const T grad_logdet = job.grad_logdet[row];
    for (int64_t start = 0; start < job.features; start += block_elements<Storage>) {
      const int64_t rest = job.features - start,
                    count = rest < block_elements<Storage> ? rest : block_elements<Storage>;
      const int64_t at = row * job.features + start;
      const T *value = load(job.value[row] + start, value_block, count);
      const T *raw = squash == Squash::none ? value : load(job.raw[row] + start, raw_block, count);
      const T *grad_y = load(job.grad_y[row] + start, grad_block, count);
      T *grad_x = output(job.grad_x + at, value_block);
      T *grad_shift = output(job.grad_shift + at, grad_block);
      T *grad_raw = squash == Squash::none ? nullptr : output(job.grad_raw + at, raw_block);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const CouplingGradient<T> g = couple_backward<squash, inverse>(value[i], raw[i], clamp, grad_y[i], grad_logdet);
        grad_x[i] = g.x;
        grad_shift[i] = g.shift;
        if constexpr (squash != Squash::none)
          grad_raw[i] = g.raw;
      }
      store(grad_x, job.grad_x + at, count);
      store(grad_shift, job.grad_shift + at, count);
      if constexpr (squash != Squash::none)
        store(grad_raw, job.grad_raw + at, count);
    }
  }
}

} // namespace

template <class Storage> void coupling_forward(const CouplingForward<Storage> &job, int64_t begin, int64_t end) {
  with_constants(job.squash, job.inverse, [&](auto squash, auto inverse) {
    forward_rows<decltype(squash)::value, decltype(inverse)::value>(job, begin, end);
  });
}

template <class Storage> void coupling_backward(const CouplingBackward<Storage> &job, int64_t begin, int64_t end) {
  with_constants(job.squash, job.inverse, [&](auto squash, auto inverse) {
    backward_rows<decltype(squash)::value, decltype(inverse)::value>(job, begin, end);
  });
}

#define IIN_FAST_INSTANTIATE(Storage)                                                                                  \
  template void coupling_forward(const CouplingForward<Storage> &, int64_t, int64_t);                                  \
  template void coupling_backward(const CouplingBackward<Storage> &, int64_t, int64_t);
IIN_FAST_INSTANTIATE(float)
IIN_FAST_INSTANTIATE(double)
IIN_FAST_INSTANTIATE(BFloat16)
IIN_FAST_INSTANTIATE(Half)

} // namespace IIN_FAST_ISA
} // namespace iin_fast
