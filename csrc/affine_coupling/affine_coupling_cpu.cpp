// affine_coupling on the CPU: tensor checks and the parallel loop. The loops are in affine_coupling_loops.cpp.
#include "affine_coupling/affine_coupling_checks.h"
#include "affine_coupling/affine_coupling_loops.h"

namespace iin_fast {
namespace {

template <class Storage> Rows<const Storage> const_rows(const Tensor &t) {
  return {static_cast<const Storage *>(t.const_data_ptr()), t.size(0) > 1 ? t.stride(0) : 0};
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor &x_in,                  // [batch, ...]
                                           const std::optional<Tensor> &raw_in, // [batch, ...]
                                           const Tensor &shift_in,              // [batch, ...]
                                           int64_t squash, double clamp, bool inverse) {
  check_coupling(x_in, raw_in, shift_in, squash);
  const Tensor x = with_contiguous_rows(x_in), shift = with_contiguous_rows(shift_in);
  std::optional<Tensor> raw;
  if (raw_in.has_value())
    raw = with_contiguous_rows(*raw_in);
  const int64_t rows = row_count(x), features = feature_count(x);
  Tensor y = cpu_empty(x, x.sizes());
  Tensor logdet = cpu_empty(x, {rows}, accumulate_type(x.scalar_type()));
  with_storage("affine_coupling", x.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    const CouplingForward<Storage> job{const_rows<Storage>(x),
                                       raw ? const_rows<Storage>(*raw) : Rows<const Storage>{nullptr, 0},
                                       const_rows<Storage>(shift),
                                       static_cast<Storage *>(y.mutable_data_ptr()),
                                       static_cast<compute_t<Storage> *>(logdet.mutable_data_ptr()),
                                       features,
                                       clamp,
                                       static_cast<Squash>(squash),
                                       inverse};
    const auto loop = IIN_FAST_LOOP(coupling_forward<Storage>);
    torch::stable::parallel_for(0, rows, row_grain(features),
                                [&](int64_t begin, int64_t end) { loop(job, begin, end); });
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
  const Tensor grad_y = with_contiguous_rows(grad_y_in), value = with_contiguous_rows(value_in);
  const Tensor grad_logdet = torch::stable::contiguous(grad_logdet_in);
  std::optional<Tensor> raw, grad_raw;
  if (raw_in.has_value()) {
    raw = with_contiguous_rows(*raw_in);
    grad_raw = cpu_empty(value, value.sizes());
  }
  const int64_t rows = row_count(value), features = feature_count(value);
  Tensor grad_x = cpu_empty(value, value.sizes());
  Tensor grad_shift = cpu_empty(value, value.sizes());
  with_storage("affine_coupling_backward", value.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    const CouplingBackward<Storage> job{const_rows<Storage>(value),
                                        raw ? const_rows<Storage>(*raw) : Rows<const Storage>{nullptr, 0},
                                        const_rows<Storage>(grad_y),
                                        static_cast<const compute_t<Storage> *>(grad_logdet.const_data_ptr()),
                                        static_cast<Storage *>(grad_x.mutable_data_ptr()),
                                        raw ? static_cast<Storage *>(grad_raw->mutable_data_ptr()) : nullptr,
                                        static_cast<Storage *>(grad_shift.mutable_data_ptr()),
                                        features,
                                        clamp,
                                        static_cast<Squash>(squash),
                                        inverse};
    const auto loop = IIN_FAST_LOOP(coupling_backward<Storage>);
    torch::stable::parallel_for(0, rows, row_grain(features),
                                [&](int64_t begin, int64_t end) { loop(job, begin, end); });
  });
  return {grad_x, grad_raw, grad_shift};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) {
  m.def("affine_coupling(Tensor x, Tensor? raw_scale, Tensor shift, int squash, float clamp, bool inverse)"
        " -> (Tensor, Tensor)");
  m.def("affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor value, Tensor? raw_scale, int squash,"
        " float clamp, bool inverse) -> (Tensor, Tensor?, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
}

} // namespace iin_fast
