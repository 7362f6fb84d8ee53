// The factor loss on the CPU: both samples of a pair in one pass.
//
// Forward reads 8 bytes an element in float32 and writes one number a pair; backward reads 8 and writes 8. Pairs are
// the unit of parallel work; a pair is summed in one thread, in one order.
#include "pair_nll/pair_nll_loops.h"

#include "common/sum.h"

namespace iin_fast {
namespace IIN_FAST_ISA {

template <class Storage> void pair_nll(const PairNll<Storage> &job, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  constexpr double log_two_pi = 1.8378770664093454836;
  const FactorWeights<T> unshared, when_shared = shared_weights<T>(job.rho);
  const double log_variance = half_log_variance(job.rho);
  T a_block[buffer_elements<Storage>], b_block[buffer_elements<Storage>];
  for (int64_t row = begin; row < end; ++row) {
    CompensatedSum<double> sum;
    for (int64_t k = 0, start = 0; k < job.factors; start += job.sizes[k++]) {
      const bool shared = job.shared[row * job.factors + k];
      const FactorWeights<T> w = shared ? when_shared : unshared;
      for (int64_t at = row * job.dim + start, end = at + job.sizes[k]; at < end; at += block_elements<Storage>) {
        const int64_t count = end - at < block_elements<Storage> ? end - at : block_elements<Storage>;
        const T *a = load(job.za + at, a_block, count), *b = load(job.zb + at, b_block, count);
        add_terms<T>(sum, count, [&](int64_t i) __attribute__((always_inline)) { return pair_energy(a[i], b[i], w); });
      }
      if (job.normalized)
        sum.add(double(job.sizes[k]) * (log_two_pi + (shared ? log_variance : 0.0)));
    }
    sum.add(-double(job.logdet_a[row]));
    sum.add(-double(job.logdet_b[row]));
    job.loss[row] = static_cast<T>(sum.total());
  }
}

template <class Storage> void pair_nll_backward(const PairNllBackward<Storage> &job, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const FactorWeights<T> unshared, when_shared = shared_weights<T>(job.rho);
  T a_block[buffer_elements<Storage>], b_block[buffer_elements<Storage>];
  for (int64_t row = begin; row < end; ++row) {
    const T grad = job.grad[row];
    for (int64_t k = 0, start = 0; k < job.factors; start += job.sizes[k++]) {
      const FactorWeights<T> w = job.shared[row * job.factors + k] ? when_shared : unshared;
      for (int64_t at = row * job.dim + start, end = at + job.sizes[k]; at < end; at += block_elements<Storage>) {
        const int64_t count = end - at < block_elements<Storage> ? end - at : block_elements<Storage>;
        const T *a = load(job.za + at, a_block, count), *b = load(job.zb + at, b_block, count);
        T *grad_a = output(job.grad_za + at, a_block), *grad_b = output(job.grad_zb + at, b_block);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          T ga, gb;
          pair_energy_backward(a[i], b[i], w, grad, ga, gb);
          grad_a[i] = ga;
          grad_b[i] = gb;
        }
        store(grad_a, job.grad_za + at, count);
        store(grad_b, job.grad_zb + at, count);
      }
    }
  }
}

#define IIN_FAST_INSTANTIATE(Storage)                                                                                  \
  template void pair_nll(const PairNll<Storage> &, int64_t, int64_t);                                                  \
  template void pair_nll_backward(const PairNllBackward<Storage> &, int64_t, int64_t);
IIN_FAST_INSTANTIATE(float)
IIN_FAST_INSTANTIATE(double)
IIN_FAST_INSTANTIATE(BFloat16)
IIN_FAST_INSTANTIATE(Half)

} // namespace IIN_FAST_ISA
} // namespace iin_fast
