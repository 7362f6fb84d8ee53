// The kernels of affine_coupling, for tests/ops/test_affine_coupling_cuda.py.
#include "binding.h"

#include "affine_coupling/affine_coupling_kernels.cuh"

using namespace iin_fast;

extern "C" const char *coupling_forward(const char *type, Matrix x, Matrix raw, Matrix shift, void *y, void *logdet,
                                        int64_t rows, int64_t features, double clamp, int64_t squash, bool inverse,
                                        LaunchPlan *plan) {
  return report([&] {
    with_type(type, [&](auto storage) {
      using Storage = decltype(storage);
      using T = compute_t<Storage>;
      DeviceCouplingForward<Storage> job{x.rows<Storage>(),
                                         raw.rows<Storage>(),
                                         shift.rows<Storage>(),
                                         static_cast<Storage *>(y),
                                         static_cast<T *>(logdet),
                                         nullptr,
                                         rows,
                                         features,
                                         clamp,
                                         static_cast<Squash>(squash),
                                         inverse};
      const RowPlan row_plan = plan->make(rows, features, coupling_vector(job), true);
      std::vector<T> partial(row_plan.parts > 1 ? rows * row_plan.parts : 0);
      job.partial = partial.data();
      int launches = 0;
      launch_coupling_forward(job, row_plan, emulator::Launch{0, false, &launches});
      plan->launches = launches;
    });
  });
}

extern "C" const char *coupling_backward(const char *type, Matrix value, Matrix raw, Matrix grad_y,
                                         const void *grad_logdet, void *grad_x, void *grad_raw, void *grad_shift,
                                         int64_t rows, int64_t features, double clamp, int64_t squash, bool inverse,
                                         LaunchPlan *plan) {
  return report([&] {
    with_type(type, [&](auto storage) {
      using Storage = decltype(storage);
      const DeviceCouplingBackward<Storage> job{value.rows<Storage>(),
                                                raw.rows<Storage>(),
                                                grad_y.rows<Storage>(),
                                                static_cast<const compute_t<Storage> *>(grad_logdet),
                                                static_cast<Storage *>(grad_x),
                                                static_cast<Storage *>(grad_raw),
                                                static_cast<Storage *>(grad_shift),
                                                rows,
                                                features,
                                                clamp,
                                                static_cast<Squash>(squash),
                                                inverse};
      int launches = 0;
      launch_coupling_backward(job, plan->make(rows, features, coupling_vector(job), true),
                               emulator::Launch{0, false, &launches});
      plan->launches = launches;
    });
  });
}
