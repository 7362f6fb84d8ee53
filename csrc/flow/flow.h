// The sizes and parameters of a flow, for host and device.
#pragma once

#include <cstdint>

namespace iin_fast {

constexpr int panel_width = 64; // outputs of a panel of weights: PANEL in iin_fast/ops/flow/layout.py

struct FlowSizes {
  int64_t batch, dim, n_flows, hidden, depth; // depth: hidden layers between the first and the last of a net
  int64_t context_dim, context_count;         // 0: no context; 1: one for all blocks; n_flows: one each
};

// The arrays that belong to weights; shapes as in iin_fast/ops/flow/reference.py. T is const for the weights
// themselves.
template <class T> struct FlowWeights {
  T *loc, *scale;                 // [n_flows, dim]
  T *weight_in, *bias_in;         // [n_flows, 2, 2, in * hidden], [n_flows, 2, 2, hidden]
  T *weight_hidden, *bias_hidden; // [n_flows, 2, 2, depth, hidden * hidden], [n_flows, 2, 2, depth, hidden]
  T *weight_out, *bias_out;       // [n_flows, 2, 2, hidden * out], [n_flows, 2, 2, out]
};

} // namespace iin_fast
