// The net of a coupling on many rows at once, for the wide walk: what flow_program_loops.cpp hands to
// wide_net_loops.cpp. Rows of the batch are rows of a matrix here: a value of the net is [rows, stride], see RowPlace.
#pragma once

#include "common/isa.h"
#include "common/simd.h"
#include "flow_program/flow_program_loops.h"

namespace iin_fast {

// A net, its parameters, and the gradients of all tensors: null in forward, and each null where it is not wanted.
template <class T> struct WideNet {
  const ProgramLayer &layer;
  const void *const *parameters;
  const uint8_t *bool_mask;
  T *const *grads;
  bool shared; // two steps may read the same element of a parameter
  bool past;   // gradients of weights, those of all nets together, are larger than the caches
};

// Some rows on their way through a net.
template <class T> struct NetRows {
  int64_t rows;
  const T *features, *context; // values 0 and 1
  // The others are [capacity, stride] each; the first of `rows` is `first`. `kept`: as backward needs them.
  T *values;
  int64_t capacity, first;
  bool kept;
  T *gradients; // [rows, stride] of all values
};

IIN_FAST_DECLARE_LOOPS(template <class T>
                       void wide_net_forward(const Team &team, const WideNet<T> &net, const NetRows<T> &at);
                       // From the gradients of the outputs to those of features, context and weights. `add`: to what
                       // the gradients of weights hold. `of_context`: whether anyone wants that one.
                       template <class T> void wide_net_backward(const Team &team, const WideNet<T> &net,
                                                                 const NetRows<T> &at, bool add, bool of_context);)

namespace IIN_FAST_ISA {
namespace {

template <class T> constexpr int row_type = sizeof(T) == 4 ? 0 : 1;

// Elements from one row of a value to the next: whole cache lines, an odd number of them, since rows a power of two
// apart would share the sets of the first cache. Products may write the padding.
template <class T> IIN_FAST_INLINE int64_t row_stride(int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(larger(width, 1), line) | 1) * line;
}

template <class T> IIN_FAST_INLINE const RowPlace &row_place(const ProgramLayer &l, int64_t id) {
  return l.values[id].row[row_type<T>];
}
// Values from 2 on.
template <class T> IIN_FAST_INLINE T *value_at(const ProgramLayer &l, const NetRows<T> &at, int64_t id) {
  const RowPlace &place = row_place<T>(l, id);
  return at.values + at.capacity * (at.kept ? place.kept : place.work) + at.first * place.stride;
}
template <class T> IIN_FAST_INLINE T *gradient_at(const ProgramLayer &l, const NetRows<T> &at, int64_t id) {
  return at.gradients + at.rows * row_place<T>(l, id).gradient;
}

// Calls f(begin, end) on parts of [0, count), on the threads of a team.
template <class F> void run(const Team &team, int64_t count, const F &f) {
  if (team.threads <= 1 || count <= 1)
    return f(int64_t(0), count);
  team.parallel(
      count, [](int64_t begin, int64_t end, void *data) { (*static_cast<const F *>(data))(begin, end); },
      const_cast<void *>(static_cast<const void *>(&f)));
}

} // namespace
} // namespace IIN_FAST_ISA
} // namespace iin_fast
