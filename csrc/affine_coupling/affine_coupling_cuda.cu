// affine_coupling on a GPU: tensor checks and the launch. The kernels are in affine_coupling_kernels.cuh.
#include "affine_coupling/affine_coupling_checks.h"
#include "affine_coupling/affine_coupling_kernels.cuh"
#include "common/cuda.h"

namespace iin_fast {
namespace {

template <class Storage> DeviceRows<const Storage> device_rows(const std::optional<Tensor> &t) {
  if (!t)
    return {nullptr, 0};
  return {const_data<Storage>(*t), t->size(0) > 1 ? t->stride(0) : 0};
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor &x_in,                  // [batch, ...]
                                           const std::optional<Tensor> &raw_in, // [batch, ...]
                                           const Tensor &shift_in,              // [batch, ...]
                                           int64_t squash, double clamp, bool inverse) {
  check_coupling(x_in, raw_in, shift_in, squash);
  const CudaCall call("affine_coupling", x_in);
  call.check_device("shift", shift_in);
  const Tensor x = with_contiguous_rows(x_in), shift = with_contiguous_rows(shift_in);
  std::optional<Tensor> raw;
  if (raw_in.has_value()) {
    call.check_device("raw_scale", *raw_in);
    raw = with_contiguous_rows(*raw_in);
  }
  const int64_t rows = row_count(x), features = feature_count(x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor logdet = torch::stable::new_empty(x, {rows}, accumulate_type(x.scalar_type()));
  with_device_storage("affine_coupling", x.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    using T = compute_t<Storage>;
    DeviceCouplingForward<Storage> job{device_rows<Storage>(x),
                                       device_rows<Storage>(raw),
                                       device_rows<Storage>(shift),
                                       mutable_data<Storage>(y),
                                       mutable_data<T>(logdet),
                                       nullptr,
                                       rows,
                                       features,
                                       clamp,
                                       static_cast<Squash>(squash),
                                       inverse};
    const RowPlan plan = plan_rows(rows, features, coupling_vector(job), call.multiprocessors(), true);
    std::optional<Tensor> partial;
    if (plan.parts > 1) {
      partial = torch::stable::new_empty(logdet, {rows, static_cast<int64_t>(plan.parts)});
      job.partial = mutable_data<T>(*partial);
    }
    launch_coupling_forward(job, plan, call);
  });
  return {y, logdet};
}

std::tuple<Tensor, std::optional<Tensor>, Tensor>
affine_coupling_backward(const Tensor &grad_y_in,      // [batch, ...]
                         const Tensor &grad_logdet_in, // [batch]
                         const Tensor &value_in,       // [batch, ...]: x of the forward map, y of the inverse map
                         const std::optional<Tensor> &raw_in, // [batch, ...]
                         int64_t squash, double clamp, bool inverse) {
  check_coupling_backward(grad_y_in, grad_logdet_in, value_in, raw_in, squash);
  const CudaCall call("affine_coupling_backward", value_in);
  call.check_device("grad_y", grad_y_in);
  call.check_device("grad_logdet", grad_logdet_in);
  const Tensor grad_y = with_contiguous_rows(grad_y_in), value = with_contiguous_rows(value_in);
  const Tensor grad_logdet = torch::stable::contiguous(grad_logdet_in);
  std::optional<Tensor> raw, grad_raw;
  if (raw_in.has_value()) {
    call.check_device("raw_scale", *raw_in);
    raw = with_contiguous_rows(*raw_in);
    grad_raw = torch::stable::new_empty(value, value.sizes());
  }
  const int64_t rows = row_count(value), features = feature_count(value);
  Tensor grad_x = torch::stable::new_empty(value, value.sizes());
  Tensor grad_shift = torch::stable::new_empty(value, value.sizes());
  with_device_storage("affine_coupling_backward", value.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    const DeviceCouplingBackward<Storage> job{device_rows<Storage>(value),
                                              device_rows<Storage>(raw),
                                              device_rows<Storage>(grad_y),
                                              const_data<compute_t<Storage>>(grad_logdet),
                                              mutable_data<Storage>(grad_x),
                                              grad_raw ? mutable_data<Storage>(*grad_raw) : nullptr,
                                              mutable_data<Storage>(grad_shift),
                                              rows,
                                              features,
                                              clamp,
                                              static_cast<Squash>(squash),
                                              inverse};
    launch_coupling_backward(job, plan_rows(rows, features, coupling_vector(job), call.multiprocessors(), true), call);
  });
  return {grad_x, grad_raw, grad_shift};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CUDA, m) {
  m.impl("affine_coupling", TORCH_BOX(&affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
}

} // namespace iin_fast
