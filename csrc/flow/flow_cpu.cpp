// flow on the CPU: tensor checks, memory, and torch's threads. The walk is in flow_loops.cpp.
#include "flow/flow_loops.h"

#include "common/tensor.h"
#include "common/thread_team.h"
#include "flow/flow_checks.h"

namespace iin_fast {
namespace {

using torch::stable::contiguous;
using torch::stable::new_zeros;

// The team that the calling thread leads, if any.
thread_local ThreadTeam *leading = nullptr;

void parallel(int64_t count, void (*body)(int64_t, int64_t, void *), void *data) {
  if (leading != nullptr)
    leading->run(count, body, data);
  else
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, data); });
}

// Calls walk() in this thread, with `threads` threads of torch's pool awake for its steps.
template <class F> void with_team(int64_t threads, const F &walk) {
  if (threads <= 1)
    return walk();
  ThreadTeam team;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    if (begin != 0)
      return team.work();
    team.start();
    leading = &team;
    walk();
    leading = nullptr;
    team.close();
  });
}

// A wrong permutation would take the loops out of bounds.
void check_permutation(const FlowSizes &s, const Tensor &t) {
  const int64_t *permutation = static_cast<const int64_t *>(t.const_data_ptr());
  std::vector<int64_t> seen(s.dim, -1);
  for (int64_t i = 0; i < s.n_flows * s.dim; ++i) {
    const int64_t to = permutation[i], block = i / s.dim;
    STD_TORCH_CHECK(to >= 0 && to < s.dim && seen[to] != block, "flow: permutation[", block,
                    "] is not a permutation of 0 .. ", s.dim - 1);
    seen[to] = block;
  }
}

FlowSizes checked(const Tensor &x, const std::optional<Tensor> &context, const FlowParameters &p) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "flow: x must be float32 or float64");
  const FlowSizes s = flow_sizes(x, context, p);
  check_permutation(s, p.permutation);
  return s;
}

Keep checked_keep(int64_t keep) {
  STD_TORCH_CHECK(keep >= 0 && keep <= 2, "flow: keep must be 0, 1 or 2");
  return static_cast<Keep>(keep);
}

template <class T> const T *in(const Tensor &t) { return static_cast<const T *>(t.const_data_ptr()); }
template <class T> T *out(const Tensor &t) { return static_cast<T *>(t.mutable_data_ptr()); }

template <class T>
FlowJob<T> job_of(const FlowSizes &s, const FlowParameters &p, const std::optional<Tensor> &context) {
  FlowJob<T> job{};
  job.sizes = s;
  job.weights = {in<T>(p.loc),           in<T>(p.scale),       in<T>(p.weight_in),  in<T>(p.bias_in),
                 in<T>(p.weight_hidden), in<T>(p.bias_hidden), in<T>(p.weight_out), in<T>(p.bias_out)};
  job.permutation = in<int64_t>(p.permutation);
  job.context = context.has_value() ? in<T>(*context) : nullptr;
  job.threads = torch::stable::get_num_threads();
  job.parallel_for = parallel;
  return job;
}

template <class F> void with_type(ScalarType type, F &&f) {
  if (type == ScalarType::Double)
    f(double());
  else
    f(float());
}

template <class T> T *aligned(const Tensor &t) {
  return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + 63) / 64 * 64);
}

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
                                        int64_t keep_in, bool /* tf32 */) {
  const Keep keep = checked_keep(keep_in);
  const Tensor x = contiguous(x_in);
  const std::optional<Tensor> context =
      context_in.has_value() ? std::optional<Tensor>(contiguous(*context_in)) : std::nullopt;
  const FlowParameters p{contiguous(loc),        contiguous(scale),         contiguous(weight_in),
                         contiguous(bias_in),    contiguous(weight_hidden), contiguous(bias_hidden),
                         contiguous(weight_out), contiguous(bias_out),      contiguous(permutation)};
  const FlowSizes s = checked(x, context, p);
  Tensor y = cpu_empty(x, {s.batch, s.dim}), logdet = cpu_empty(x, {s.batch}), saved = x;
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    saved = cpu_empty(x, {IIN_FAST_LOOP(flow_saved_size<T>)(s, keep)});
    if (s.batch == 0)
      return;
    FlowJob<T> job = job_of<T>(s, p, context);
    const Tensor workspace = cpu_empty(x, {IIN_FAST_LOOP(flow_forward_workspace<T>)(s, job.threads, keep) + 64});
    job.leaky_slope = static_cast<T>(leaky_slope), job.activation_slope = static_cast<T>(activation_slope);
    job.exact_logdet = exact_logdet, job.inverse = inverse;
    job.x = in<T>(x), job.y = out<T>(y), job.logdet = out<T>(logdet);
    job.keep = keep, job.saved = out<T>(saved);
    job.workspace = aligned<T>(workspace);
    with_team(IIN_FAST_LOOP(flow_sharing<T>)(s, job.threads), [&] { IIN_FAST_LOOP(flow_forward<T>)(job); });
  });
  return {y, logdet, saved};
}

using Gradients =
    std::tuple<Tensor, std::optional<Tensor>, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>,
               std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>;

// Gradients in the order of flow's tensors, without the permutation. With Keep::nothing `y`, the output of the map, is
// inverted block by block.
Gradients flow_backward(const Tensor &grad_y_in,      // [batch, dim]
                        const Tensor &grad_logdet_in, // [batch]
                        const Tensor &y_in,           // [batch, dim]
                        const Tensor &saved,          // what flow returned
                        const std::optional<Tensor> &context_in, const Tensor &loc, const Tensor &scale,
                        const Tensor &weight_in, const Tensor &bias_in, const Tensor &weight_hidden,
                        const Tensor &bias_hidden, const Tensor &weight_out, const Tensor &bias_out,
                        const Tensor &permutation, double leaky_slope, double activation_slope, bool inverse,
                        int64_t keep_in, bool context_grad, bool weight_grads, bool /* tf32 */) {
  const Keep keep = checked_keep(keep_in);
  const Tensor y = contiguous(y_in), grad_y = contiguous(grad_y_in), grad_logdet = contiguous(grad_logdet_in);
  const std::optional<Tensor> context =
      context_in.has_value() ? std::optional<Tensor>(contiguous(*context_in)) : std::nullopt;
  const FlowParameters p{contiguous(loc),        contiguous(scale),         contiguous(weight_in),
                         contiguous(bias_in),    contiguous(weight_hidden), contiguous(bias_hidden),
                         contiguous(weight_out), contiguous(bias_out),      contiguous(permutation)};
  const FlowSizes s = checked(y, context, p);
  check_flow_elements("grad_y", grad_y, s.batch * s.dim, y.scalar_type());
  check_flow_elements("grad_logdet", grad_logdet, s.batch, y.scalar_type());
  Tensor grad_x = cpu_empty(y, {s.batch, s.dim});
  std::optional<Tensor> grad_context;
  if (context_grad && context.has_value())
    grad_context = new_zeros(*context, context->sizes());
  const Tensor grad_loc = new_zeros(p.loc, p.loc.sizes()), grad_scale = new_zeros(p.scale, p.scale.sizes());
  const Tensor *const weights[] = {&p.weight_in,   &p.bias_in,    &p.weight_hidden,
                                   &p.bias_hidden, &p.weight_out, &p.bias_out};
  std::optional<Tensor> grads[6];
  for (int i = 0; weight_grads && i < 6; ++i)
    grads[i] = s.batch == 0 ? new_zeros(*weights[i], weights[i]->sizes()) : cpu_empty(*weights[i], weights[i]->sizes());
  with_type(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    check_flow_elements("saved", saved, IIN_FAST_LOOP(flow_saved_size<T>)(s, keep), y.scalar_type());
    if (s.batch == 0)
      return;
    FlowBackwardJob<T> job{};
    job.forward = job_of<T>(s, p, context);
    const int64_t size = IIN_FAST_LOOP(flow_backward_workspace<T>)(s, job.forward.threads, keep, weight_grads);
    const Tensor workspace = cpu_empty(y, {size + 64});
    job.forward.leaky_slope = static_cast<T>(leaky_slope);
    job.forward.activation_slope = static_cast<T>(activation_slope);
    job.forward.inverse = inverse;
    job.forward.y = out<T>(y);                                  // only read
    job.forward.keep = keep, job.forward.saved = out<T>(saved); // only read
    job.forward.workspace = aligned<T>(workspace);
    job.grad_y = in<T>(grad_y), job.grad_logdet = in<T>(grad_logdet);
    job.grad_x = out<T>(grad_x);
    job.grad_context = grad_context.has_value() ? out<T>(*grad_context) : nullptr;
    job.grads = {out<T>(grad_loc), out<T>(grad_scale), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    if (weight_grads) {
      job.grads.weight_in = out<T>(*grads[0]), job.grads.bias_in = out<T>(*grads[1]);
      job.grads.weight_hidden = out<T>(*grads[2]), job.grads.bias_hidden = out<T>(*grads[3]);
      job.grads.weight_out = out<T>(*grads[4]), job.grads.bias_out = out<T>(*grads[5]);
    }
    with_team(IIN_FAST_LOOP(flow_sharing<T>)(s, job.forward.threads), [&] { IIN_FAST_LOOP(flow_backward<T>)(job); });
  });
  return {grad_x, grad_context, grad_loc, grad_scale, grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) {
  m.def("flow(Tensor x, Tensor? context, Tensor loc, Tensor scale, Tensor weight_in, Tensor bias_in,"
        " Tensor weight_hidden, Tensor bias_hidden, Tensor weight_out, Tensor bias_out, Tensor permutation,"
        " float leaky_slope, float activation_slope, bool exact_logdet, bool inverse, int keep, bool tf32=False)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("flow_backward(Tensor grad_y, Tensor grad_logdet, Tensor y, Tensor saved, Tensor? context, Tensor loc,"
        " Tensor scale, Tensor weight_in, Tensor bias_in, Tensor weight_hidden, Tensor bias_hidden, Tensor weight_out,"
        " Tensor bias_out, Tensor permutation, float leaky_slope, float activation_slope, bool inverse, int keep,"
        " bool context_grad, bool weight_grads, bool tf32=False)"
        " -> (Tensor, Tensor?, Tensor, Tensor, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CPU, m) {
  m.impl("flow", TORCH_BOX(&flow));
  m.impl("flow_backward", TORCH_BOX(&flow_backward));
}

} // namespace iin_fast
