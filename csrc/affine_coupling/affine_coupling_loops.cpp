// Affine coupling on the CPU: one pass over each row, log-det summed on the way.
//
// Forward reads x, raw and shift and writes y: 16 bytes an element in float32; backward reads value, raw and grad_y and
// writes three gradients: 24 bytes. Both are bound by memory for tensors beyond the cache and by the elementary
// functions within it. Rows are the unit of parallel work; a row is summed in one thread, in one order.
#include "affine_coupling/affine_coupling_loops.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

template <Squash squash, bool inverse, class Storage>
void forward_rows(const CouplingForward<Storage> &job, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const T clamp = static_cast<T>(job.clamp);
  for (int64_t row = begin; row < end; ++row) {
    const Storage *__restrict x = job.x[row];
    const Storage *__restrict raw = squash == Squash::none ? x : job.raw[row];
    const Storage *__restrict shift = job.shift[row];
    Storage *__restrict y = job.y + row * job.features;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < job.features; ++i) {
      T logdet;
      y[i] = Storage(couple<squash, inverse>(T(x[i]), T(raw[i]), T(shift[i]), clamp, logdet));
      sum += logdet;
    }
    job.logdet[row] = sum;
  }
}

template <Squash squash, bool inverse, class Storage>
void backward_rows(const CouplingBackward<Storage> &job, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const T clamp = static_cast<T>(job.clamp);
  for (int64_t row = begin; row < end; ++row) {
    const Storage *__restrict value = job.value[row];
    const Storage *__restrict raw = squash == Squash::none ? value : job.raw[row];
    const Storage *__restrict grad_y = job.grad_y[row];
    Storage *__restrict grad_x = job.grad_x + row * job.features;
    Storage *__restrict grad_shift = job.grad_shift + row * job.features;
    Storage *__restrict grad_raw = squash == Squash::none ? nullptr : job.grad_raw + row * job.features;
    const T grad_logdet = job.grad_logdet[row];
#pragma omp simd
    for (int64_t i = 0; i < job.features; ++i) {
      const CouplingGradient<T> g =
          couple_backward<squash, inverse>(T(value[i]), T(raw[i]), clamp, T(grad_y[i]), grad_logdet);
      grad_x[i] = Storage(g.x);
      grad_shift[i] = Storage(g.shift);
      if constexpr (squash != Squash::none)
        grad_raw[i] = Storage(g.raw);
    }
  }
}

// Calls f with the squash and the direction as compile-time constants.
template <class F> void with_constants(Squash squash, bool inverse, F &&f) {
  const auto with_squash = [&](auto s) {
    if (inverse)
      f(s, std::true_type());
    else
      f(s, std::false_type());
  };
  switch (squash) {
  case Squash::identity:
    return with_squash(std::integral_constant<Squash, Squash::identity>());
  case Squash::tanh:
    return with_squash(std::integral_constant<Squash, Squash::tanh>());
  case Squash::atan:
    return with_squash(std::integral_constant<Squash, Squash::atan>());
  case Squash::sigmoid:
    return with_squash(std::integral_constant<Squash, Squash::sigmoid>());
  case Squash::none:
    return with_squash(std::integral_constant<Squash, Squash::none>());
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
