// The schema of flow, an op of GPUs: on the CPU the same map is a program (iin_fast/ops/flow/program.py).
#include "common/tensor.h"

namespace iin_fast {

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

} // namespace iin_fast
