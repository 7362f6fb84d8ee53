// flow on a GPU: tensor checks, memory and the launches. The kernels are in flow_kernels.cuh, flow_nets_kernels.cuh and
// flow_backward_kernels.cuh.
//
// What forward saves is bytes: stages, s, coupled values and activations of all steps (iin_fast/ops/flow/saved.py).
#include <cmath>

#include "common/cuda.h"
#include "flow/flow_backward_kernels.cuh"
#include "flow/flow_checks.h"
#include "flow/flow_ways.cuh"

namespace iin_fast {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;

unsigned char *bytes_of(Tensor &t) { return mutable_data<unsigned char>(t); }

// Bytes on the device of `like`, of the size that arrange(arena) takes, which is then called with them.
template <class F> Tensor arranged(const Tensor &like, F &&arrange) {
  Arena arena{nullptr};
  arrange(arena);
  Tensor memory = new_empty(like, {arena.used}, ScalarType::Byte);
  arena = {bytes_of(memory)};
  arrange(arena);
  return memory;
}

// Tensors of a call, made contiguous where they must be, on one device and of sizes that fit.
struct FlowTensors {
  Tensor x; // rows strided
  std::optional<Tensor> context;
  FlowParameters parameters;
  FlowSizes sizes;

  FlowTensors(const CudaCall &call, const Tensor &x_in, const std::optional<Tensor> &context_in,
              const FlowParameters &given)
      : x(with_contiguous_rows(x_in)),
        context(context_in.has_value() ? std::optional<Tensor>(contiguous(*context_in)) : std::nullopt),
        parameters{contiguous(given.loc),        contiguous(given.scale),         contiguous(given.weight_in),
                   contiguous(given.bias_in),    contiguous(given.weight_hidden), contiguous(given.bias_hidden),
                   contiguous(given.weight_out), contiguous(given.bias_out),      contiguous(given.permutation)},
        sizes(flow_sizes(x, context, parameters)) {
    constexpr int64_t most = 1 << 19; // a grid has 65535 tiles of 16 columns
    STD_TORCH_CHECK(sizes.dim < most && sizes.hidden < most && sizes.context_dim < most && sizes.n_flows < most,
                    "flow: dim, hidden, context_dim and n_flows must be less than ", most, " on a GPU");
    if (context.has_value())
      call.check_device("context", *context);
    const FlowParameters &p = parameters;
    call.check_device("loc", p.loc);
    call.check_device("scale", p.scale);
    call.check_device("weight_in", p.weight_in);
    call.check_device("bias_in", p.bias_in);
    call.check_device("weight_hidden", p.weight_hidden);
    call.check_device("bias_hidden", p.bias_hidden);
    call.check_device("weight_out", p.weight_out);
    call.check_device("bias_out", p.bias_out);
    call.check_device("permutation", p.permutation);
  }

  template <class Storage>
  FlowWalk<Storage> walk(double leaky_slope, double activation_slope, bool exact_logdet, bool inverse) const {
    const auto in = [](const Tensor &t) { return const_data<Storage>(t); };
    const FlowParameters &p = parameters;
    FlowWalk<Storage> walk{};
    walk.sizes = sizes;
    walk.weights = {in(p.loc),           in(p.scale),       in(p.weight_in),  in(p.bias_in),
                    in(p.weight_hidden), in(p.bias_hidden), in(p.weight_out), in(p.bias_out)};
    walk.permutation = const_data<int64_t>(p.permutation);
    walk.context = context.has_value() ? in(*context) : nullptr;
    walk.leaky_slope = leaky_slope, walk.activation_slope = activation_slope;
    walk.log_slope = exact_logdet ? std::log(activation_slope) : 0.0;
    walk.inverse = inverse;
    walk.x = in(x), walk.x_row = x.stride(0);
    return walk;
  }
};

std::tuple<Tensor, Tensor, Tensor> flow(const Tensor &x_in,                      // [batch, dim]
                                        const std::optional<Tensor> &context_in, // [1 or n_flows, batch, context_dim]
                                        const Tensor &loc, const Tensor &scale,  // [n_flows, dim]
                                        const Tensor &weight_in,                 // [n_flows, 2, 2, in * hidden]
                                        const Tensor &bias_in,                   // [n_flows, 2, 2, hidden]
                                        const Tensor &weight_hidden,             // [n_flows, 2, 2, depth, hidden^2]
                                        const Tensor &bias_hidden,               // [n_flows, 2, 2, depth, hidden]
                                        const Tensor &weight_out,                // [n_flows, 2, 2, hidden * out]
                                        const Tensor &bias_out,                  // [n_flows, 2, 2, out]
                                        const Tensor &permutation,               // [n_flows, dim]
                                        double leaky_slope, double activation_slope, bool exact_logdet, bool inverse,
                                        int64_t keep, bool tf32) {
  const bool save = keep != 0;
  STD_TORCH_CHECK(keep == 0 || keep == 2, "flow: keep must be 0 or 2 on a GPU");
  const CudaCall call("flow", x_in);
  const FlowTensors t(call, x_in, context_in,
                      {loc, scale, weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out, permutation});
  const ScalarType type = t.x.scalar_type();
  Tensor y = new_empty(t.x, t.x.sizes()), logdet = new_empty(t.x, {t.sizes.batch}, accumulate_type(type));
  Tensor saved = new_empty(t.x, {0}, ScalarType::Byte);
  with_device_storage("flow", type, [&](auto storage) {
    using Storage = decltype(storage);
    FlowWalk<Storage> walk = t.walk<Storage>(leaky_slope, activation_slope, exact_logdet, inverse);
    walk.y = mutable_data<Storage>(y), walk.logdet = mutable_data<compute_t<Storage>>(logdet);
    walk.every = walk.keep = save;
    walk.keep_v = save && inverse;
    Tensor steps = arranged(t.x, [&](Arena &arena) { arrange_steps(walk, arena); });
    with_precision<Storage>(tf32, [&](auto precision) {
      choose_way<decltype(precision)>(walk, call);
      const Tensor scratch = arranged(t.x, [&](Arena &arena) { arrange_forward(walk, arena); });
      launch_flow<decltype(precision)>(walk, call);
    });
    if (save)
      saved = steps;
  });
  return {y, logdet, saved};
}

using Gradients =
    std::tuple<Tensor, std::optional<Tensor>, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>,
               std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

// Gradients in the order of flow's tensors, without the permutation. `saved` may be empty: then `y`, the output of the
// map, is walked back.
Gradients flow_backward(const Tensor &grad_y_in,      // [batch, dim]
                        const Tensor &grad_logdet_in, // [batch]
                        const Tensor &y,              // [batch, dim]
                        const Tensor &saved_in,       // what flow returned
                        const std::optional<Tensor> &context_in, const Tensor &loc, const Tensor &scale,
                        const Tensor &weight_in, const Tensor &bias_in, const Tensor &weight_hidden,
                        const Tensor &bias_hidden, const Tensor &weight_out, const Tensor &bias_out,
                        const Tensor &permutation, double leaky_slope, double activation_slope, bool inverse,
                        int64_t /* keep */, bool context_grad, bool weight_grads, bool tf32) {
  const CudaCall call("flow_backward", y);
  const FlowTensors t(call, y, context_in,
                      {loc, scale, weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out, permutation});
  const ScalarType type = t.x.scalar_type(), wide = accumulate_type(type);
  call.check_device("grad_y", grad_y_in);
  call.check_device("grad_logdet", grad_logdet_in);
  call.check_device("saved", saved_in);
  STD_TORCH_CHECK(grad_y_in.dim() == 2, "flow_backward: grad_y must be [batch, dim]");
  const Tensor grad_y = with_contiguous_rows(grad_y_in), grad_logdet = contiguous(grad_logdet_in);
  check_flow_elements("grad_y", grad_y, t.sizes.batch * t.sizes.dim, type);
  STD_TORCH_CHECK(grad_logdet.numel() == t.sizes.batch && grad_logdet.scalar_type() == wide,
                  "flow_backward: grad_logdet must be [batch] in the type of the log-det");
  const FlowParameters &p = t.parameters;
  // a batch of 0 launches nothing
  const auto like = [&](const Tensor &of) {
    return t.sizes.batch == 0 ? new_zeros(of, of.sizes()) : new_empty(of, of.sizes());
  };
  Tensor grad_x = new_empty(t.x, t.x.sizes()), grad_loc = like(p.loc), grad_scale = like(p.scale);
  std::optional<Tensor> grad_context, sums;
  if (context_grad && t.context.has_value()) {
    sums = new_zeros(*t.context, t.context->sizes(), wide);
    grad_context = type == wide ? *sums : like(*t.context);
  }
  const Tensor *const weights[] = {&p.weight_in,   &p.bias_in,    &p.weight_hidden,
                                   &p.bias_hidden, &p.weight_out, &p.bias_out};
  std::optional<Tensor> grads[6];
  for (int i = 0; weight_grads && i < 6; ++i)
    grads[i] = like(*weights[i]);
  with_device_storage("flow_backward", type, [&](auto storage) {
    using Storage = decltype(storage);
    using T = compute_t<Storage>;
    const auto out = [](std::optional<Tensor> &of) { return of.has_value() ? mutable_data<Storage>(*of) : nullptr; };
    FlowBackwardWalk<Storage> back{};
    FlowWalk<Storage> &walk = back.walk;
    walk = t.walk<Storage>(leaky_slope, activation_slope, false, inverse);
    walk.keep = true, walk.every = saved_in.numel() > 0;
    walk.keep_v = !walk.every || inverse;
    back.grad_y = const_data<Storage>(grad_y), back.grad_y_row = grad_y.stride(0);
    back.grad_logdet = const_data<T>(grad_logdet);
    back.grad_x = mutable_data<Storage>(grad_x);
    back.grad_context = sums.has_value() ? mutable_data<T>(*sums) : nullptr;
    back.grads = {mutable_data<Storage>(grad_loc),
                  mutable_data<Storage>(grad_scale),
                  out(grads[0]),
                  out(grads[1]),
                  out(grads[2]),
                  out(grads[3]),
                  out(grads[4]),
                  out(grads[5])};
    Tensor steps = contiguous(saved_in);
    if (walk.every) {
      Arena arena{nullptr};
      arrange_steps(walk, arena);
      check_flow_elements("saved", steps, arena.used, ScalarType::Byte);
      arena = {bytes_of(steps)};
      arrange_steps(walk, arena);
    } else {
      steps = arranged(t.x, [&](Arena &arena) { arrange_steps(walk, arena); });
    }
    const Tensor scratch = arranged(t.x, [&](Arena &arena) { arrange_backward(back, weight_grads, arena); });
    with_precision<Storage>(tf32, [&](auto precision) { launch_flow_backward<decltype(precision)>(back, call); });
    if constexpr (!std::is_same_v<Storage, T>)
      if (grad_context.has_value() && grad_context->numel() > 0) {
        const int64_t count = grad_context->numel();
        const unsigned blocks = tiles_of(count, tile_threads);
        call(flow_narrow_kernel<Storage>, dim3(blocks < 4096 ? blocks : 4096), dim3(tile_threads), back.grad_context,
             mutable_data<Storage>(*grad_context), count);
      }
  });
  return {grad_x, grad_context, grad_loc, grad_scale, grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CUDA, m) {
  m.impl("flow", TORCH_BOX(&flow));
  m.impl("flow_backward", TORCH_BOX(&flow_backward));
}

} // namespace iin_fast
