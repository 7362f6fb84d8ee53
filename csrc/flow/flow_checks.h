// What the glue of both devices checks before it calls the loops or kernels.
#pragma once

#include "common/tensor.h"
#include "flow/flow.h"

namespace iin_fast {

// The parameters of a flow, contiguous; shapes as in iin_fast/ops/flow/reference.py.
struct FlowParameters {
  Tensor loc, scale, weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out, permutation;
};

inline void check_flow_elements(const char *name, const Tensor &t, int64_t expected, ScalarType type) {
  STD_TORCH_CHECK(t.numel() == expected, "flow: ", name, " has ", t.numel(), " elements, expected ", expected);
  STD_TORCH_CHECK(t.scalar_type() == type, "flow: ", name, " must have the dtype of x");
}

// The sizes that x [batch, dim] and the parameters imply, checked against all of them: the loops and kernels trust
// these.
inline FlowSizes flow_sizes(const Tensor &x, const std::optional<Tensor> &context, const FlowParameters &p) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 2, "flow: x must be [batch, dim] with dim of at least 2");
  STD_TORCH_CHECK(p.loc.dim() == 2 && p.bias_in.dim() == 4 && p.bias_hidden.dim() == 5,
                  "flow: loc must be [n_flows, dim], bias_in [n_flows, 2, 2, hidden], bias_hidden "
                  "[n_flows, 2, 2, depth, hidden]");
  FlowSizes s{};
  s.batch = x.size(0), s.dim = x.size(1), s.n_flows = p.loc.size(0);
  s.hidden = p.bias_in.size(3), s.depth = p.bias_hidden.size(3);
  STD_TORCH_CHECK(s.n_flows >= 1 && s.hidden >= 1, "flow: n_flows and hidden must be at least 1");
  if (context.has_value()) {
    STD_TORCH_CHECK(context->dim() == 3 && (context->size(0) == 1 || context->size(0) == s.n_flows) &&
                        context->size(1) == s.batch && context->scalar_type() == type,
                    "flow: context must be [1 or n_flows, batch, context_dim] in the dtype of x");
    s.context_count = context->size(0), s.context_dim = context->size(2);
  }
  const int64_t nets = s.n_flows * 4, out = s.dim / 2, in = s.dim - out + (s.context_count ? s.context_dim : 0);
  check_flow_elements("loc", p.loc, s.n_flows * s.dim, type);
  check_flow_elements("scale", p.scale, s.n_flows * s.dim, type);
  check_flow_elements("weight_in", p.weight_in, nets * in * s.hidden, type);
  check_flow_elements("bias_in", p.bias_in, nets * s.hidden, type);
  check_flow_elements("weight_hidden", p.weight_hidden, nets * s.depth * s.hidden * s.hidden, type);
  check_flow_elements("bias_hidden", p.bias_hidden, nets * s.depth * s.hidden, type);
  check_flow_elements("weight_out", p.weight_out, nets * s.hidden * out, type);
  check_flow_elements("bias_out", p.bias_out, nets * out, type);
  check_flow_elements("permutation", p.permutation, s.n_flows * s.dim, ScalarType::Long);
  return s;
}

} // namespace iin_fast
