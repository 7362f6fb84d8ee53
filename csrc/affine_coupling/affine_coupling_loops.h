#pragma once

#include <cstdint>

#include "affine_coupling/affine_coupling.h"
#include "common/half.h"
#include "common/isa.h"

namespace iin_fast {

// Rows of a [rows, features] matrix whose features are contiguous.
template <class T> struct Rows {
  T *data;
  int64_t stride; // elements from row to row
  IIN_FAST_INLINE T *operator[](int64_t row) const { return data + row * stride; }
};

template <class Storage> struct CouplingForward {
  Rows<const Storage> x, raw, shift; // raw.data is null for Squash::none
  Storage *y;                        // [rows, features]
  compute_t<Storage> *logdet;        // [rows]
  int64_t features;
  double clamp;
  Squash squash;
  bool inverse;
};

template <class Storage> struct CouplingBackward {
  Rows<const Storage> value, raw, grad_y;  // raw.data is null for Squash::none
  const compute_t<Storage> *grad_logdet;   // [rows]
  Storage *grad_x, *grad_raw, *grad_shift; // [rows, features]; grad_raw is null for Squash::none
  int64_t features;
  double clamp;
  Squash squash;
  bool inverse;
};

// clang-format off
IIN_FAST_DECLARE_LOOPS(
  template <class Storage> void coupling_forward(const CouplingForward<Storage> &job, int64_t begin, int64_t end);
  template <class Storage> void coupling_backward(const CouplingBackward<Storage> &job, int64_t begin, int64_t end);
)
// clang-format on

} // namespace iin_fast
