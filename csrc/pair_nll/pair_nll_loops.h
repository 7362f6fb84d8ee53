#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/isa.h"
#include "pair_nll/pair_nll.h"

namespace iin_fast {

template <class Storage> struct PairNll {
  const Storage *za, *zb;                        // [batch, dim]
  const compute_t<Storage> *logdet_a, *logdet_b; // [batch]
  const bool *shared;                            // [batch, factors]
  const int64_t *sizes;                          // [factors], sum is dim
  int64_t factors, dim;
  double rho;
  bool normalized;
  compute_t<Storage> *loss; // [batch]
};

template <class Storage> struct PairNllBackward {
  const Storage *za, *zb;         // [batch, dim]
  const bool *shared;             // [batch, factors]
  const int64_t *sizes;           // [factors]
  const compute_t<Storage> *grad; // [batch]
  int64_t factors, dim;
  double rho;
  Storage *grad_za, *grad_zb; // [batch, dim]
};

// clang-format off
IIN_FAST_DECLARE_LOOPS(
  template <class Storage> void pair_nll(const PairNll<Storage> &job, int64_t begin, int64_t end);
  template <class Storage> void pair_nll_backward(const PairNllBackward<Storage> &job, int64_t begin, int64_t end);
)
// clang-format on

} // namespace iin_fast
