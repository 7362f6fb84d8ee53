// pair_nll on the CPU: tensor checks and the parallel loop. The loops are in pair_nll_loops.cpp.
#include "pair_nll/pair_nll_checks.h"
#include "pair_nll/pair_nll_loops.h"

namespace iin_fast {
namespace {

Tensor pair_nll(const Tensor &za_in, const Tensor &zb_in,             // [batch, dim]
                const Tensor &logdet_a_in, const Tensor &logdet_b_in, // [batch]
                const Tensor &shared_in,                              // [batch, factors] bool
                const std::vector<int64_t> sizes, double rho, bool normalized) {
  check_pair("pair_nll", za_in, zb_in, shared_in, sizes);
  check_row_values("pair_nll", "logdet_a", logdet_a_in, za_in);
  check_row_values("pair_nll", "logdet_b", logdet_b_in, za_in);
  const Tensor za = torch::stable::contiguous(za_in), zb = torch::stable::contiguous(zb_in);
  const Tensor logdet_a = torch::stable::contiguous(logdet_a_in), logdet_b = torch::stable::contiguous(logdet_b_in);
  const Tensor shared = torch::stable::contiguous(shared_in);
  const int64_t batch = za.size(0), dim = za.size(1);
  Tensor loss = cpu_empty(za, {batch}, accumulate_type(za.scalar_type()));
  with_storage("pair_nll", za.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    using T = compute_t<Storage>;
    const PairNll<Storage> job{static_cast<const Storage *>(za.const_data_ptr()),
                               static_cast<const Storage *>(zb.const_data_ptr()),
                               static_cast<const T *>(logdet_a.const_data_ptr()),
                               static_cast<const T *>(logdet_b.const_data_ptr()),
                               static_cast<const bool *>(shared.const_data_ptr()),
                               sizes.data(),
                               static_cast<int64_t>(sizes.size()),
                               dim,
                               rho,
                               normalized,
                               static_cast<T *>(loss.mutable_data_ptr())};
    const auto loop = IIN_FAST_LOOP(pair_nll<Storage>);
    torch::stable::parallel_for(0, batch, row_grain(dim), [&](int64_t begin, int64_t end) { loop(job, begin, end); });
  });
  return loss;
}

std::tuple<Tensor, Tensor> pair_nll_backward(const Tensor &grad_in,                    // [batch]
                                             const Tensor &za_in, const Tensor &zb_in, // [batch, dim]
                                             const Tensor &shared_in,                  // [batch, factors] bool
                                             const std::vector<int64_t> sizes, double rho) {
  check_pair("pair_nll_backward", za_in, zb_in, shared_in, sizes);
  check_row_values("pair_nll_backward", "grad", grad_in, za_in);
  const Tensor grad = torch::stable::contiguous(grad_in);
  const Tensor za = torch::stable::contiguous(za_in), zb = torch::stable::contiguous(zb_in);
  const Tensor shared = torch::stable::contiguous(shared_in);
  const int64_t batch = za.size(0), dim = za.size(1);
  Tensor grad_za = cpu_empty(za, {batch, dim}), grad_zb = cpu_empty(za, {batch, dim});
  with_storage("pair_nll_backward", za.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    const PairNllBackward<Storage> job{static_cast<const Storage *>(za.const_data_ptr()),
                                       static_cast<const Storage *>(zb.const_data_ptr()),
                                       static_cast<const bool *>(shared.const_data_ptr()),
                                       sizes.data(),
                                       static_cast<const compute_t<Storage> *>(grad.const_data_ptr()),
                                       static_cast<int64_t>(sizes.size()),
                                       dim,
                                       rho,
                                       static_cast<Storage *>(grad_za.mutable_data_ptr()),
                                       static_cast<Storage *>(grad_zb.mutable_data_ptr())};
    const auto loop = IIN_FAST_LOOP(pair_nll_backward<Storage>);
    torch::stable::parallel_for(0, batch, row_grain(dim), [&](int64_t begin, int64_t end) { loop(job, begin, end); });
  });
  return {grad_za, grad_zb};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) {
  m.def("pair_nll(Tensor za, Tensor zb, Tensor logdet_a, Tensor logdet_b, Tensor shared, int[] sizes, float rho,"
        " bool normalized) -> Tensor");
  m.def("pair_nll_backward(Tensor grad, Tensor za, Tensor zb, Tensor shared, int[] sizes, float rho)"
        " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CPU, m) {
  m.impl("pair_nll", TORCH_BOX(&pair_nll));
  m.impl("pair_nll_backward", TORCH_BOX(&pair_nll_backward));
}

} // namespace iin_fast
