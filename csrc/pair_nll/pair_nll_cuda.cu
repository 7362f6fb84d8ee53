// pair_nll on a GPU: tensor checks and the launch. The kernels are in pair_nll_kernels.cuh.
#include "common/cuda.h"
#include "pair_nll/pair_nll_checks.h"
#include "pair_nll/pair_nll_kernels.cuh"

namespace iin_fast {
namespace {

template <class Storage> DeviceRows<const Storage> device_rows(const Tensor &t) {
  return {const_data<Storage>(t), t.size(0) > 1 ? t.stride(0) : 0};
}

Tensor pair_nll(const Tensor &za_in, const Tensor &zb_in,             // [batch, dim]
                const Tensor &logdet_a_in, const Tensor &logdet_b_in, // [batch]
                const Tensor &shared_in,                              // [batch, factors] bool
                const std::vector<int64_t> sizes, double rho, bool normalized) {
  check_pair("pair_nll", za_in, zb_in, shared_in, sizes);
  check_row_values("pair_nll", "logdet_a", logdet_a_in, za_in);
  check_row_values("pair_nll", "logdet_b", logdet_b_in, za_in);
  const CudaCall call("pair_nll", za_in);
  call.check_device("zb", zb_in);
  call.check_device("logdet_a", logdet_a_in);
  call.check_device("logdet_b", logdet_b_in);
  call.check_device("shared", shared_in);
  const Tensor za = with_contiguous_rows(za_in), zb = with_contiguous_rows(zb_in);
  const Tensor logdet_a = torch::stable::contiguous(logdet_a_in), logdet_b = torch::stable::contiguous(logdet_b_in);
  const Tensor shared = torch::stable::contiguous(shared_in);
  const int64_t batch = za.size(0), dim = za.size(1);
  Tensor loss = torch::stable::new_empty(za, {batch}, accumulate_type(za.scalar_type()));
  with_device_storage("pair_nll", za.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    using T = compute_t<Storage>;
    const DevicePairNll<Storage> job{device_rows<Storage>(za),
                                     device_rows<Storage>(zb),
                                     const_data<T>(logdet_a),
                                     const_data<T>(logdet_b),
                                     const_data<bool>(shared),
                                     mutable_data<T>(loss),
                                     batch,
                                     dim,
                                     static_cast<int64_t>(sizes.size()),
                                     rho,
                                     normalized};
    // latents are a few thousand wide at most: a block is enough for a row
    const RowPlan plan = plan_rows(batch, dim, pair_nll_vector(job), call.multiprocessors(), false);
    launch_pair_nll(job, sizes.data(), plan, call);
  });
  return loss;
}

std::tuple<Tensor, Tensor> pair_nll_backward(const Tensor &grad_in,                    // [batch]
                                             const Tensor &za_in, const Tensor &zb_in, // [batch, dim]
                                             const Tensor &shared_in,                  // [batch, factors] bool
                                             const std::vector<int64_t> sizes, double rho) {
  check_pair("pair_nll_backward", za_in, zb_in, shared_in, sizes);
  check_row_values("pair_nll_backward", "grad", grad_in, za_in);
  const CudaCall call("pair_nll_backward", za_in);
  call.check_device("zb", zb_in);
  call.check_device("grad", grad_in);
  call.check_device("shared", shared_in);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor za = with_contiguous_rows(za_in), zb = with_contiguous_rows(zb_in);
  const Tensor shared = torch::stable::contiguous(shared_in);
  const int64_t batch = za.size(0), dim = za.size(1);
  Tensor grad_za = torch::stable::new_empty(za, {batch, dim}), grad_zb = torch::stable::new_empty(za, {batch, dim});
  with_device_storage("pair_nll_backward", za.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    const DevicePairNllBackward<Storage> job{device_rows<Storage>(za),
                                             device_rows<Storage>(zb),
                                             const_data<bool>(shared),
                                             const_data<compute_t<Storage>>(grad),
                                             mutable_data<Storage>(grad_za),
                                             mutable_data<Storage>(grad_zb),
                                             batch,
                                             dim,
                                             static_cast<int64_t>(sizes.size()),
                                             rho};
    const RowPlan plan = plan_rows(batch, dim, pair_nll_vector(job), call.multiprocessors(), true);
    launch_pair_nll_backward(job, sizes.data(), plan, call);
  });
  return {grad_za, grad_zb};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CUDA, m) {
  m.impl("pair_nll", TORCH_BOX(&pair_nll));
  m.impl("pair_nll_backward", TORCH_BOX(&pair_nll_backward));
}

} // namespace iin_fast
