// spline_coupling on a GPU: tensor checks and the launch. The kernels are in spline_coupling_kernels.cuh.
#include <climits>

#include "common/cuda.h"
#include "spline_coupling/spline_coupling_checks.h"
#include "spline_coupling/spline_coupling_kernels.cuh"

namespace iin_fast {
namespace {

template <class Storage> DeviceRows<const Storage> device_rows(const Tensor &t) {
  return {const_data<Storage>(t), t.size(0) > 1 ? t.stride(0) : 0};
}

// Widths, heights and derivatives, in one tensor or in three.
template <class Storage, class Data>
void device_values(DeviceSplineValues<Storage> (&to)[3], const SplineTensors &tensors, size_t count,
                   const SplineOptions &options, Data &&data) {
  int64_t before = 0; // in the same tensor
  for (size_t i = 0; i < 3; ++i) {
    Tensor t = tensors[count == 3 ? i : 0];
    const int64_t values = options.count(3, i);
    to[i] = {data(t) + before, t.stride(0), t.stride(1), static_cast<int>(values)};
    before += count == 3 ? 0 : values;
  }
}

template <class Storage>
DeviceSpline<Storage> device_spline(const char *op, const Tensor &x, const SplineTensors &values,
                                    const SplineOptions &options, bool inverse) {
  using T = compute_t<Storage>;
  STD_TORCH_CHECK(options.count() <= INT_MAX, op, ": ", options.bins, " bins are more than a GPU's kernels can count");
  const SplineLimits<double> l = options.limits();
  DeviceSpline<Storage> spline{{},
                               x.size(0),
                               x.size(1),
                               static_cast<int>(options.bins),
                               static_cast<int>(options.count()),
                               static_cast<Tails>(options.tails),
                               static_cast<Parameterization>(options.form),
                               {T(l.left), T(l.right), T(l.bottom), T(l.top), T(l.min_width), T(l.min_height),
                                T(l.min_derivative), T(l.softness)},
                               inverse};
  device_values(spline.values, values, values.size(), options, [](const Tensor &t) { return const_data<Storage>(t); });
  return spline;
}

// The raw values of a call on the device of its first tensor.
SplineTensors device_tensors(const CudaCall &call, const SplineTensors &values) {
  for (const Tensor &t : values)
    call.check_device("a tensor of raw values", t);
  return with_contiguous_values(values);
}

std::tuple<Tensor, Tensor>
spline_coupling(const Tensor &x_in,                          // [rows, features]
                const Tensor &parameters_in,                 // [rows, features, 2 bins + derivatives], or widths
                const std::optional<Tensor> &heights_in,     // [rows, features, bins]
                const std::optional<Tensor> &derivatives_in, // [rows, features, …]
                int64_t bins, int64_t tails, int64_t form, double left, double right, double bottom, double top,
                double min_width, double min_height, double min_derivative, bool inverse) {
  const char *op = "spline_coupling";
  const SplineOptions options{bins, tails, form, left, right, bottom, top, min_width, min_height, min_derivative};
  const SplineTensors values_in = spline_tensors(op, parameters_in, heights_in, derivatives_in);
  check_spline(op, x_in, values_in, options);
  const CudaCall call(op, x_in);
  const Tensor x = with_contiguous_rows(x_in);
  const SplineTensors values = device_tensors(call, values_in);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor logdet = torch::stable::new_empty(x, {x.size(0)}, accumulate_type(x.scalar_type()));
  with_device_storage(op, x.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    using T = compute_t<Storage>;
    DeviceSplineForward<Storage> job{device_spline<Storage>(op, x, values, options, inverse), device_rows<Storage>(x),
                                     mutable_data<Storage>(y), mutable_data<T>(logdet), nullptr};
    const SplinePlan plan = plan_spline<Storage>(job.spline, nullptr, call.multiprocessors());
    std::optional<Tensor> partial;
    if (plan.parts > 1) {
      partial = torch::stable::new_empty(logdet, {x.size(0), static_cast<int64_t>(plan.parts)});
      job.partial = mutable_data<T>(*partial);
    }
    launch_spline_forward(job, plan, call);
  });
  return {y, logdet};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
spline_coupling_backward(const Tensor &grad_y_in,                 // [rows, features]
                         const Tensor &grad_logdet_in,            // [rows]
                         const Tensor &x_in,                      // [rows, features]: the input of the map
                         const Tensor &parameters_in,             // [rows, features, 2 bins + derivatives], or widths
                         const std::optional<Tensor> &heights_in, // [rows, features, bins]
                         const std::optional<Tensor> &derivatives_in, // [rows, features, …]
                         int64_t bins, int64_t tails, int64_t form, double left, double right, double bottom,
                         double top, double min_width, double min_height, double min_derivative, bool inverse) {
  const char *op = "spline_coupling_backward";
  const SplineOptions options{bins, tails, form, left, right, bottom, top, min_width, min_height, min_derivative};
  const SplineTensors values_in = spline_tensors(op, parameters_in, heights_in, derivatives_in);
  check_spline_backward(op, grad_y_in, grad_logdet_in, x_in, values_in, options);
  const CudaCall call(op, x_in);
  call.check_device("grad_y", grad_y_in);
  call.check_device("grad_logdet", grad_logdet_in);
  const Tensor x = with_contiguous_rows(x_in);
  const SplineTensors values = device_tensors(call, values_in);
  const Tensor grad_y = with_contiguous_rows(grad_y_in), grad_logdet = torch::stable::contiguous(grad_logdet_in);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  const SplineTensors grads =
      empty_gradients(values, [](const auto &like, auto sizes) { return torch::stable::new_empty(like, sizes); });
  with_device_storage(op, x.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    DeviceSplineBackward<Storage> job{device_spline<Storage>(op, x, values, options, inverse),
                                      device_rows<Storage>(x),
                                      device_rows<Storage>(grad_y),
                                      const_data<compute_t<Storage>>(grad_logdet),
                                      mutable_data<Storage>(grad_x),
                                      {}};
    device_values(job.grads, grads, values.size(), options, [](Tensor &t) { return mutable_data<Storage>(t); });
    launch_spline_backward(job, plan_spline(job.spline, &job.grads, call.multiprocessors()), call);
  });
  return {grad_x, grads[0], grads[1], grads[2]};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CUDA, m) {
  m.impl("spline_coupling", TORCH_BOX(&spline_coupling));
  m.impl("spline_coupling_backward", TORCH_BOX(&spline_coupling_backward));
}

} // namespace iin_fast
