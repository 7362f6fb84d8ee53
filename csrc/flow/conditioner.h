// Both nets (s and t) of a coupling on a chunk of rows, forward and backward.
//
// Forward, two threads take a net each; more share each layer, one parallel step over (net, panel of outputs, group of
// rows). The backward of a layer is one parallel step over (net, block of inputs): the task that owns a block of inputs
// reads each weight of the block once, for dA and dW together, and nothing is summed across tasks, so results don't
// depend on which thread ran what.
#pragma once

#include "flow/flow_loops.h"
#include "flow/gemm.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

// The threads of a common/thread_team.h that share a step: all of the call's, or one, when the rows themselves are
// split over threads.
struct Team {
  int64_t threads;
  ParallelFor parallel_for;

  template <class F> void run(int64_t count, const F &f) const {
    if (threads <= 1 || count <= 1)
      f(int64_t(0), count);
    else
      parallel_for(
          count, [](int64_t begin, int64_t end, void *data) { (*static_cast<const F *>(data))(begin, end); },
          const_cast<void *>(static_cast<const void *>(&f)));
  }
};

// Gradients of weights of more bytes than this leave the caches before anyone reads them.
constexpr int64_t cached_gradients = 16 * 1024 * 1024;

// Widths that follow from the sizes.
template <class T> struct Widths {
  int64_t dim, conditioning, transformed;                    // dim = conditioning + transformed
  int64_t context, in, hidden, depth;                        // in = conditioning + context
  int64_t row;                                               // of a stage: conditioning | context | transformed
  int64_t ld_row, ld_in, ld_hidden, ld_out, ld_dim, ld_wide; // padded; ld_wide: of any layer's input or output
  int64_t layers;                                            // depth + 2
  int64_t weights;                                           // of all nets

  explicit Widths(const FlowSizes &s)
      : dim(s.dim), conditioning(s.dim - s.dim / 2), transformed(s.dim / 2),
        context(s.context_count ? s.context_dim : 0), in(conditioning + context), hidden(s.hidden), depth(s.depth),
        row(in + transformed), ld_row(padded<T>(row)), ld_in(padded<T>(in)), ld_hidden(padded<T>(hidden)),
        ld_out(padded<T>(transformed)), ld_dim(padded<T>(dim)), ld_wide(larger(ld_hidden, larger(ld_in, ld_out))),
        layers(depth + 2), weights(4 * s.n_flows * hidden * (in + depth * hidden + transformed)) {}
};

// One layer of one net.
template <class T> struct Layer {
  T *weight, *bias;
  int64_t in, out;
};

template <class T, class U>
Layer<T> layer_of(const FlowWeights<T> &weights, const Widths<U> &w, int64_t net, int64_t layer) {
  if (layer == 0)
    return {weights.weight_in + net * w.in * w.hidden, weights.bias_in + net * w.hidden, w.in, w.hidden};
  if (layer == w.layers - 1)
    return {weights.weight_out + net * w.hidden * w.transformed, weights.bias_out + net * w.transformed, w.hidden,
            w.transformed};
  const int64_t i = net * w.depth + layer - 1;
  return {weights.weight_hidden + i * w.hidden * w.hidden, weights.bias_hidden + i * w.hidden, w.hidden, w.hidden};
}

// Hidden activations of both nets on a chunk of rows: layer l of net n begins at at(n, l).
template <class T> struct Activations {
  T *base;
  int64_t net_stride, layer_stride; // layer_stride 0 would let layers overwrite each other: see keep
  bool keep;                        // all layers (for backward), or two in turn
  T *at(int64_t net, int64_t layer) const {
    return base + net * net_stride + (keep ? layer : layer & 1) * layer_stride;
  }
};

// raw[net][rows, transformed] = net(u). Net indices count (block, half, net).
template <class T>
void conditioner_forward(const Team &team, const FlowWeights<const T> &weights, const Widths<T> &w, int64_t first_net,
                         const T *u, const Activations<T> &activations, T *raw, int64_t raw_stride, int64_t rows,
                         T slope) {
  const auto width = [&](int64_t l) { return l == w.layers - 1 ? w.transformed : w.hidden; };
  const auto compute = [&](int64_t l, int64_t net, int64_t panel, int64_t from, int64_t to) {
    const Layer<const T> layer = layer_of(weights, w, first_net + net, l);
    const int64_t out = width(l), column = panel * panel_width, columns = smaller(panel_width, out - column);
    const int64_t lda = l == 0 ? w.ld_row : w.ld_hidden, ldc = l == w.layers - 1 ? w.ld_out : w.ld_hidden;
    Product<T> p{};
    p.a = (l == 0 ? u : activations.at(net, l - 1)) + from * lda;
    p.lda = lda;
    p.w = layer.weight + column * layer.in;
    p.ldw = columns;
    p.k = layer.in;
    p.c = (l == w.layers - 1 ? raw + net * raw_stride : activations.at(net, l)) + from * ldc + column;
    p.ldc = ldc;
    p.start = layer.bias + column;
    p.finish = l == w.layers - 1 ? Finish::store : Finish::leaky;
    p.slope = slope;
    multiply_panel(p, to - from, columns, false);
    if (activations.keep && l < w.layers - 1 && column + columns == out) // what is saved has no random parts
      for (int64_t row = 0; row < to - from; ++row)
        for (int64_t j = out - column; j < ldc - column; ++j)
          p.c[row * ldc + j] = T(0);
  };
  if (team.threads <= 2) { // a net each: no waiting between layers
    team.run(2, [&](int64_t begin, int64_t end) {
      for (int64_t net = begin; net < end; ++net)
        for (int64_t l = 0; l < w.layers; ++l)
          for (int64_t panel = 0; panel < ceil_div(width(l), panel_width); ++panel)
            compute(l, net, panel, 0, rows);
    });
    return;
  }
  for (int64_t l = 0; l < w.layers; ++l) {
    const int64_t panels = ceil_div(width(l), panel_width);
    // rows are split only where nets and panels are too few for the threads
    const int64_t row_groups =
        2 * panels >= team.threads ? 1 : smaller(ceil_div(rows, 32), ceil_div(team.threads, 2 * panels));
    team.run(2 * panels * row_groups, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t net = task / (panels * row_groups), panel = task / row_groups % panels, group = task % row_groups;
        compute(l, net, panel, group * rows / row_groups, (group + 1) * rows / row_groups);
      }
    });
  }
}

// to[columns] (+)= the sum of rows
template <class T> void add_rows(const T *d, int64_t ldd, int64_t rows, int64_t columns, T *to, bool add) {
  constexpr int n = lanes<T>;
  alignas(64) T sum[panel_width];
  for (int64_t j = 0; j < columns; j += n) { // the last vector may reach into the padding of d
    vec<T> even{}, odd{};
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) {
      even += load(d + row * ldd + j);
      odd += load(d + (row + 1) * ldd + j);
    }
    if (row < rows)
      even += load(d + row * ldd + j);
    store(sum + j, even + odd);
  }
  for (int64_t j = 0; j < columns; ++j)
    to[j] = (add ? to[j] : T(0)) + sum[j];
}

// Gradients of both nets from d[net][rows, transformed], the gradient of what they put out. On return d holds the
// gradient of u in [rows, in] per net, row stride ld_in. d and other are two buffers of ld_wide per row, used in turn.
// Returns which of the two holds the result.
template <class T>
T *conditioner_backward(const Team &team, const FlowWeights<const T> &weights, const FlowWeights<T> &grads, bool add,
                        const Widths<T> &w, int64_t first_net, const T *u, const Activations<T> &activations, T *d,
                        T *other, int64_t d_stride, int64_t rows, T slope) {
  static constexpr int64_t most = panel_width;
  alignas(64) static const T zeros[most] = {};
  const bool past = w.weights * (int64_t)sizeof(T) > cached_gradients;
  for (int64_t l = w.layers - 1; l >= 0; --l) {
    const int64_t in = l == 0 ? w.in : w.hidden, out = l == w.layers - 1 ? w.transformed : w.hidden;
    int64_t block = most; // of inputs; whole vectors, so that tasks don't share one
    while (block > 16 && 2 * ceil_div(in, block) < team.threads)
      block /= 2;
    const int64_t blocks = ceil_div(in, block), ldd = l == w.layers - 1 ? w.ld_out : w.ld_hidden;
    const int64_t lda = l == 0 ? w.ld_row : w.ld_hidden, ldc = l == 0 ? w.ld_in : w.ld_hidden;
    team.run(2 * blocks, [&](int64_t begin, int64_t end) {
      alignas(64) T turned[most * most];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t net = task / blocks, k = task % blocks * block, k_count = smaller(block, in - k);
        const Layer<const T> layer = layer_of(weights, w, first_net + net, l);
        const T *a = (l == 0 ? u : activations.at(net, l - 1)) + k;
        const T *dc = d + net * d_stride;
        T *da = other + net * d_stride + k;
        for (int64_t column = 0; column < out; column += panel_width) {
          const int64_t columns = smaller(panel_width, out - column);
          const int64_t offset = column * in + k * columns;
          if (grads.weight_in != nullptr) {
            const Layer<T> grad = layer_of(grads, w, first_net + net, l);
            outer_product(Outer<T>{a, lda, dc + column, ldd, rows, grad.weight + offset, columns, columns, add, past},
                          k_count, columns);
            if (k == 0)
              add_rows(dc + column, ldd, rows, columns, grad.bias + column, add);
          }
          transpose_panel(layer.weight + offset, columns, k_count, columns, turned, most);
          Product<T> p{};
          p.a = dc + column;
          p.lda = ldd;
          p.w = turned;
          p.ldw = most;
          p.k = columns;
          p.c = da;
          p.ldc = ldc;
          p.start = column == 0 ? zeros : nullptr;
          p.finish = l == 0 || column + columns < out ? Finish::store : Finish::mask;
          p.slope = slope;
          p.mask = l == 0 ? nullptr : a;
          p.ldmask = lda;
          if (column + columns < out) // the block's weights in the next panel
            p.ahead = reinterpret_cast<const char *>(layer.weight + offset + columns * in);
          multiply_panel(p, rows, k_count, true);
        }
      }
      if (past)
        stream_end();
    });
    T *swap = d;
    d = other;
    other = swap;
  }
  return d;
}

} // namespace
} // namespace IIN_FAST_ISA
} // namespace iin_fast
