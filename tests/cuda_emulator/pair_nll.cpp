// The kernels of pair_nll, for tests/ops/test_pair_nll_cuda.py.
#include "binding.h"

#include "pair_nll/pair_nll_kernels.cuh"

using namespace iin_fast;

extern "C" const char *pair_nll(const char *type, Matrix za, Matrix zb, const void *logdet_a, const void *logdet_b,
                                const bool *shared, const int64_t *sizes, int64_t factors, void *loss, int64_t rows,
                                int64_t dim, double rho, bool normalized, LaunchPlan *plan) {
  return report([&] {
    with_type(type, [&](auto storage) {
      using Storage = decltype(storage);
      using T = compute_t<Storage>;
      const DevicePairNll<Storage> job{za.rows<Storage>(),
                                       zb.rows<Storage>(),
                                       static_cast<const T *>(logdet_a),
                                       static_cast<const T *>(logdet_b),
                                       shared,
                                       static_cast<T *>(loss),
                                       rows,
                                       dim,
                                       factors,
                                       rho,
                                       normalized};
      int launches = 0;
      launch_pair_nll(job, sizes, plan->make(rows, dim, pair_nll_vector(job), false),
                      emulator::Launch{0, false, &launches});
      plan->launches = launches;
    });
  });
}

extern "C" const char *pair_nll_backward(const char *type, Matrix za, Matrix zb, const bool *shared,
                                         const int64_t *sizes, int64_t factors, const void *grad, void *grad_za,
                                         void *grad_zb, int64_t rows, int64_t dim, double rho, LaunchPlan *plan) {
  return report([&] {
    with_type(type, [&](auto storage) {
      using Storage = decltype(storage);
      const DevicePairNllBackward<Storage> job{za.rows<Storage>(),
                                               zb.rows<Storage>(),
                                               shared,
                                               static_cast<const compute_t<Storage> *>(grad),
                                               static_cast<Storage *>(grad_za),
                                               static_cast<Storage *>(grad_zb),
                                               rows,
                                               dim,
                                               factors,
                                               rho};
      int launches = 0;
      launch_pair_nll_backward(job, sizes, plan->make(rows, dim, pair_nll_vector(job), true),
                               emulator::Launch{0, false, &launches});
      plan->launches = launches;
    });
  });
}
