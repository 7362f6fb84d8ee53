#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/isa.h"
#include "spline_coupling/spline_coupling.h"

namespace iin_fast {

// What both directions share. Parameters of element (row, feature): widths, heights, derivatives, side by side.
template <class Storage> struct SplineParameters {
  const Storage *data;
  int64_t row_stride, feature_stride; // in elements
  int64_t bins, count;                // count: raw values of one element
  Tails tails;
  Parameterization form;
  SplineLimits<double> limits;
  bool inverse;
};

template <class Storage> struct SplineForward {
  SplineParameters<Storage> parameters;
  const Storage *x;           // [rows, features]
  Storage *y;                 // [rows, features]
  compute_t<Storage> *logdet; // [rows]
  int64_t features;
};

template <class Storage> struct SplineBackward {
  SplineParameters<Storage> parameters;
  const Storage *x;                      // [rows, features], the input of the map
  const Storage *grad_y;                 // [rows, features]
  const compute_t<Storage> *grad_logdet; // [rows]
  Storage *grad_x;                       // [rows, features]
  Storage *grad_parameters;              // [rows, features, count]
  int64_t features;
};

// Numbers of scratch memory that a call of the loops needs: raw values by lane, a block's rows in the compute type, the
// block's own, and room to align the first. The glue brings it: what allocates would have one copy for all instruction
// sets.
template <class Storage> int64_t scratch_size(const SplineParameters<Storage> &p) {
  using T = compute_t<Storage>;
  return (2 * p.count + 1) * block_size<T> + spline_work<T>(p.bins);
}

// clang-format off
IIN_FAST_DECLARE_LOOPS(
  template <class Storage>
  void spline_forward(const SplineForward<Storage> &job, int64_t begin, int64_t end, compute_t<Storage> *scratch);
  template <class Storage>
  void spline_backward(const SplineBackward<Storage> &job, int64_t begin, int64_t end, compute_t<Storage> *scratch);
)
// clang-format on

} // namespace iin_fast
