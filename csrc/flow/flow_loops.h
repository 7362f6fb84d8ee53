// The whole flow on the CPU: what the glue (flow_cpu.cpp) hands to the loops (flow_loops.cpp). No torch here.
#pragma once

#include "common/isa.h"
#include "common/keep.h"
#include "flow/flow.h"

namespace iin_fast {

// Runs body(begin, end, data) on pieces of [0, count), on several threads.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t, int64_t, void *), void *data);

template <class T> struct FlowJob {
  FlowSizes sizes;
  FlowWeights<const T> weights;
  const int64_t *permutation; // [n_flows, dim]
  const T *context;           // [context_count, batch, context_dim]
  T leaky_slope, activation_slope;
  bool exact_logdet, inverse;

  const T *x; // [batch, dim]
  T *y;       // [batch, dim]
  T *logdet;  // [batch]
  Keep keep;  // inputs are those of every half
  T *saved;   // flow_saved_size elements

  T *workspace; // as many elements as flow_forward_workspace or flow_backward_workspace says, aligned to 64 bytes
  int64_t threads;
  ParallelFor parallel_for;
};

// The backward of either direction. Where nothing was kept it inverts block by block from `forward.y`, the output.
template <class T> struct FlowBackwardJob {
  FlowJob<T> forward;
  const T *grad_y;      // [batch, dim]
  const T *grad_logdet; // [batch]
  T *grad_x;            // [batch, dim]
  T *grad_context;      // like context, or null if not wanted
  FlowWeights<T> grads; // null for the conditioners if not wanted
};

// flow_sharing: how many of `threads` share every step of the walk; 1 where each walks alone.
IIN_FAST_DECLARE_LOOPS(template <class T> int64_t flow_saved_size(const FlowSizes &sizes, Keep keep);
                       template <class T> int64_t flow_sharing(const FlowSizes &sizes, int64_t threads);
                       template <class T>
                       int64_t flow_forward_workspace(const FlowSizes &sizes, int64_t threads, Keep keep);
                       template <class T> int64_t flow_backward_workspace(const FlowSizes &sizes, int64_t threads,
                                                                          Keep keep, bool weight_grads);
                       template <class T> void flow_forward(const FlowJob<T> &job);
                       template <class T> void flow_backward(const FlowBackwardJob<T> &job);)

} // namespace iin_fast
