// What a flow keeps from forward for backward. The numbers are those of Python's KEEP.
#pragma once

#include <cstdint>

namespace iin_fast {

enum class Keep : int64_t {
  nothing,    // flow on a GPU: backward inverts the output; flow_program: it walks forward again
  inputs,     // the input of every layer: backward computes a net again just before its gradients
  all,        // every value of every net
  output = 4, // flow_program: its output, from which backward inverts layer by layer
};

} // namespace iin_fast
