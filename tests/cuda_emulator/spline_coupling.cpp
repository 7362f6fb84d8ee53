// The kernels of spline_coupling, for tests/ops/test_spline_coupling_cuda.py.
#include "binding.h"

#include "spline_coupling/spline_coupling_kernels.cuh"

using namespace iin_fast;

// A call's tensors of parameters and its options, as the test has them.
struct Spline {
  const void *parameters;
  int64_t row_stride, feature_stride, rows, features, bins, count, tails, form;
  double left, right, bottom, top, min_width, min_height, min_derivative, softness;
  bool inverse;

  template <class Storage> DeviceSpline<Storage> device() const {
    using T = compute_t<Storage>;
    return {static_cast<const Storage *>(parameters),
            row_stride,
            feature_stride,
            rows,
            features,
            static_cast<int>(bins),
            static_cast<int>(count),
            static_cast<Tails>(tails),
            static_cast<Parameterization>(form),
            {T(left), T(right), T(bottom), T(top), T(min_width), T(min_height), T(min_derivative), T(softness)},
            inverse};
  }
};

// What a test asks of a launch, and learns of it.
struct SplineLaunch {
  int64_t max_blocks, multiprocessors; // asked
  int64_t threads, tile_rows, tile_features, pitch, wide_in, wide_out, blocks, parts, launches;

  template <class Storage> SplinePlan make(const DeviceSpline<Storage> &spline, const Storage *gradients) {
    const SplinePlan plan = plan_spline(spline, gradients, static_cast<int>(multiprocessors), max_blocks);
    threads = plan.threads, tile_rows = plan.tile_rows, tile_features = plan.tile_features, pitch = plan.pitch;
    wide_in = plan.wide_in, wide_out = plan.wide_out, blocks = plan.blocks, parts = plan.parts;
    return plan;
  }
};

extern "C" const char *spline_forward(const char *type, const Spline *spline, Matrix x, void *y, void *logdet,
                                      SplineLaunch *launch) {
  return report([&] {
    with_type(type, [&](auto storage) {
      using Storage = decltype(storage);
      using T = compute_t<Storage>;
      DeviceSplineForward<Storage> job{spline->device<Storage>(), x.rows<Storage>(), static_cast<Storage *>(y),
                                       static_cast<T *>(logdet), nullptr};
      const SplinePlan plan = launch->make<Storage>(job.spline, nullptr);
      std::vector<T> partial(plan.parts > 1 ? spline->rows * plan.parts : 0);
      job.partial = partial.data();
      int launches = 0;
      launch_spline_forward(job, plan, emulator::Launch{0, false, &launches});
      launch->launches = launches;
    });
  });
}

extern "C" const char *spline_backward(const char *type, const Spline *spline, Matrix x, Matrix grad_y,
                                       const void *grad_logdet, void *grad_x, void *grad_parameters,
                                       SplineLaunch *launch) {
  return report([&] {
    with_type(type, [&](auto storage) {
      using Storage = decltype(storage);
      const DeviceSplineBackward<Storage> job{
          spline->device<Storage>(),      x.rows<Storage>(),
          grad_y.rows<Storage>(),         static_cast<const compute_t<Storage> *>(grad_logdet),
          static_cast<Storage *>(grad_x), static_cast<Storage *>(grad_parameters)};
      int launches = 0;
      launch_spline_backward(job, launch->make<Storage>(job.spline, job.grad_parameters),
                             emulator::Launch{0, false, &launches});
      launch->launches = launches;
    });
  });
}
