// The kernels of spline_coupling, for tests/ops/test_spline_coupling_cuda.py.
#include "binding.h"

#include "spline_coupling/spline_coupling_kernels.cuh"

using namespace iin_fast;

// [rows, features, count], strides in elements.
struct Values {
  void *data;
  int64_t row_stride, feature_stride, count;
};

template <class Storage> void device_values(const Values (&from)[3], DeviceSplineValues<Storage> (&to)[3]) {
  for (int i = 0; i < 3; ++i)
    to[i] = {static_cast<Storage *>(from[i].data), from[i].row_stride, from[i].feature_stride,
             static_cast<int>(from[i].count)};
}

// A call's raw values and its options, as the test has them.
struct Spline {
  Values values[3];
  int64_t rows, features, bins, count, tails, form;
  double left, right, bottom, top, min_width, min_height, min_derivative, softness;
  bool inverse;

  template <class Storage> DeviceSpline<Storage> device() const {
    using T = compute_t<Storage>;
    DeviceSpline<Storage> spline{
        {},
        rows,
        features,
        static_cast<int>(bins),
        static_cast<int>(count),
        static_cast<Tails>(tails),
        static_cast<Parameterization>(form),
        {T(left), T(right), T(bottom), T(top), T(min_width), T(min_height), T(min_derivative), T(softness)},
        inverse};
    device_values(values, spline.values);
    return spline;
  }
};

// What a test asks of a launch, and learns of it.
struct SplineLaunch {
  int64_t multiprocessors; // asked
  int64_t threads, tile_rows, tile_features, pitch, wide_in, wide_out, pieces_in, pieces_out, blocks, parts, launches;

  template <class Storage>
  SplinePlan make(const DeviceSpline<Storage> &spline, const DeviceSplineValues<Storage> (*grads)[3]) {
    const SplinePlan plan = plan_spline(spline, grads, static_cast<int>(multiprocessors));
    threads = plan.threads, tile_rows = plan.tile_rows, tile_features = plan.tile_features, pitch = plan.pitch;
    wide_in = plan.in.wide, wide_out = plan.out.wide, blocks = plan.blocks, parts = plan.parts;
    pieces_in = plan.in.pieces, pieces_out = plan.out.pieces;
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
                                       const void *grad_logdet, void *grad_x, const Values (*grads)[3],
                                       SplineLaunch *launch) {
  return report([&] {
    with_type(type, [&](auto storage) {
      using Storage = decltype(storage);
      DeviceSplineBackward<Storage> job{
          spline->device<Storage>(),      x.rows<Storage>(),
          grad_y.rows<Storage>(),         static_cast<const compute_t<Storage> *>(grad_logdet),
          static_cast<Storage *>(grad_x), {}};
      device_values(*grads, job.grads);
      int launches = 0;
      launch_spline_backward(job, launch->make<Storage>(job.spline, &job.grads), emulator::Launch{0, false, &launches});
      launch->launches = launches;
    });
  });
}
