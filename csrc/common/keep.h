// What a flow keeps from forward for backward. The numbers are those of Python's KEEP.
#pragma once

#include <cstdint>

namespace iin_fast {

enum class Keep : int64_t {
  nothing, // flow: backward inverts the output; flow_program: it walks a tile forward again
  inputs,  // the input of every layer: backward computes a net again just before its gradients
  all,     // every value of every net
};

} // namespace iin_fast
