#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/isa.h"
#include "spline_coupling/spline_coupling.h"

namespace iin_fast {

// Some of the raw values of each element, side by side; `end` is behind the last one of all.
template <class Storage> struct SplineValues {
  const Storage *data, *end;
  int64_t row_stride, feature_stride, count; // in elements
};

// What both directions share. Raw values of an element: widths, heights, derivatives, in one tensor or in three.
template <class Storage> struct SplineParameters {
  SplineValues<Storage> values[3];
  int tensors;         // 1 or 3
  int64_t bins, count; // count: raw values of one element
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
  Storage *grad_values[3];               // as SplineParameters::values, contiguous
  int64_t features;
};

// Elements of scratch memory that a call of the loops needs: raw values by lane, a block's rows in the compute type and
// a vector behind them, the block's own, and room to align the first. The glue brings it: what allocates would have one
// copy for all instruction sets.
template <class Storage> int64_t scratch_size(const SplineParameters<Storage> &p) {
  using T = compute_t<Storage>;
  return (2 * p.count + 2) * block_size<T> + spline_work<T>(p.bins);
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
