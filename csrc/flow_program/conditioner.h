// The nets of a coupling on many rows at once, for the wide walk: what flow_program_loops.cpp hands to
// conditioner_loops.cpp. Rows of the batch are rows of a matrix here, weights lie in panels
// (iin_fast/ops/flow/layout.py).
#pragma once

#include "common/isa.h"
#include "common/simd.h"
#include "flow_program/flow_program_loops.h"

namespace iin_fast {

// One layer of one net; gradients are null where not wanted.
template <class T> struct PanelLayer {
  const T *weight, *bias; // bias or null
  T *grad_weight, *grad_bias;
  int64_t in, out;
};

// Nets of equal sizes, LeakyReLU between their layers, all with the same input.
template <class T> struct Conditioner {
  const PanelLayer<T> *dense; // [nets, layers]
  int64_t nets, layers;
  T slope;
  bool past; // gradients of weights, those of all nets together, are larger than the caches
};

template <class T> struct ConditionerRows {
  int64_t rows;
  const T *u; // [rows, in]
  // Hidden activations. Layer l of a net is [capacity, out], the first of `rows` is `first`.
  T *activations;
  int64_t capacity, first;
  bool keep; // all layers, for backward; or two in turn
  T *raw;    // [nets][rows, out of the last layer]
  int64_t raw_stride;
};

IIN_FAST_DECLARE_LOOPS(
    // raw from u
    template <class T>
    void conditioner_forward(const Team &team, const Conditioner<T> &nets, const ConditionerRows<T> &at);
    // From d [nets][rows, out], the gradients of raw. d and other are two buffers, used in turn; gives the one that
    // then holds the gradients of u, [nets][rows, in]. `add`: to what the gradients of weights hold.
    template <class T> T * conditioner_backward(const Team &team, const Conditioner<T> &nets,
                                                const ConditionerRows<T> &at, T *d, T *other, int64_t d_stride,
                                                bool add);)

namespace IIN_FAST_ISA {
namespace {

// Elements from one row of such a matrix to the next: whole cache lines, an odd number of them, since rows a power of
// two apart would share the sets of the first cache. Products may write the padding.
template <class T> IIN_FAST_INLINE int64_t row_stride(int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(larger(width, 1), line) | 1) * line;
}

// Elements of a row of all hidden layers of a net.
template <class T> IIN_FAST_INLINE int64_t hidden_stride(const PanelLayer<T> *dense, int64_t layers) {
  int64_t stride = 0;
  for (int64_t l = 0; l + 1 < layers; ++l)
    stride += row_stride<T>(dense[l].out);
  return stride;
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
