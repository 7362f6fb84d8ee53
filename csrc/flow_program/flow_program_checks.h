// What the glue of flow_program checks of its tensors, for the CPU and for GPUs.
#pragma once

#include "common/tensor.h"
#include "flow_program/flow_program_plan.h"

namespace iin_fast {

// The tensors of a call as the loops read them.
struct Inputs {
  Tensor x;
  std::optional<Tensor> context;
  std::vector<Tensor> parameters;
  std::vector<const void *> data;
  std::vector<uint8_t> bool_mask;
};

// `here`: whether a tensor is where that of x must be.
template <class Here>
Inputs checked(const Plan &plan, const Tensor &x, const std::optional<Tensor> &context,
               const std::vector<Tensor> &parameters, const Here &here) {
  const ProgramView &p = plan.view;
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "flow_program: x must be float32 or float64");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == p.dim, "flow_program: x must be [batch, ", p.dim, "]");
  STD_TORCH_CHECK(context.has_value() == (p.context > 0), "flow_program: the program has a context of ", p.context,
                  " features");
  if (context.has_value())
    STD_TORCH_CHECK(context->dim() == 2 && context->size(0) == x.size(0) && context->size(1) == p.context &&
                        context->scalar_type() == type && here(*context),
                    "flow_program: context must be [", x.size(0), ", ", p.context, "] in the dtype of x");
  STD_TORCH_CHECK(static_cast<int64_t>(parameters.size()) == p.tensors, "flow_program: got ", parameters.size(),
                  " parameters, expected ", p.tensors);
  Inputs in{torch::stable::contiguous(x), std::nullopt, {}, {}, std::vector<uint8_t>(p.tensors)};
  if (context.has_value())
    in.context = torch::stable::contiguous(*context);
  in.parameters.reserve(p.tensors), in.data.reserve(p.tensors);
  for (int64_t i = 0; i < p.tensors; ++i) {
    const Tensor &t = parameters[i];
    STD_TORCH_CHECK(here(t), "flow_program: parameter ", i, " is on another device than x");
    STD_TORCH_CHECK(t.numel() >= plan.needed[i], "flow_program: parameter ", i, " has ", t.numel(),
                    " elements, the program reads ", plan.needed[i]);
    in.bool_mask[i] = t.scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(in.bool_mask[i] || t.scalar_type() == type || t.scalar_type() == ScalarType::Long,
                    "flow_program: parameter ", i, " must have the dtype of x");
    in.parameters.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    in.data.push_back(in.parameters.back().const_data_ptr());
  }
  for (const ParameterUse &use : plan.uses) {
    const bool integers = in.parameters[use.ref.tensor].scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(use.kind == ParameterUse::mask || !in.bool_mask[use.ref.tensor], "flow_program: parameter ",
                    use.ref.tensor, " of layer ", use.layer, " is of bool, which a mask alone may be");
    STD_TORCH_CHECK((use.kind == ParameterUse::index) == integers, "flow_program: parameter ", use.ref.tensor,
                    " of layer ", use.layer,
                    integers ? " is of int64, which an index alone may be" : " must be of int64");
  }
  return in;
}

inline void check_gradients(const Plan &plan, const Inputs &in, const std::optional<Tensor> &grad_y,
                            const Tensor &grad_logdet, const std::string &wanted) {
  STD_TORCH_CHECK(!grad_y.has_value() ||
                      (grad_y->dim() == 2 && grad_y->size(0) == in.x.size(0) && grad_y->size(1) == plan.view.dim &&
                       grad_y->scalar_type() == in.x.scalar_type()),
                  "flow_program: grad_y must be like x");
  STD_TORCH_CHECK(grad_logdet.numel() == in.x.size(0) && grad_logdet.scalar_type() == in.x.scalar_type(),
                  "flow_program: grad_logdet must be like the rows of x");
  STD_TORCH_CHECK(wanted.size() == in.parameters.size(), "flow_program: wanted must name every parameter");
}

template <class F> void with_type(ScalarType type, F &&f) {
  if (type == ScalarType::Double)
    f(double());
  else
    f(float());
}

} // namespace iin_fast
