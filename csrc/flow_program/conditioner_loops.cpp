// The nets of a coupling (conditioner.h), forward and backward.
//
// Forward, two threads take a net each; more share each layer, one parallel step over (net, panel of outputs, group of
// rows). The backward of a layer is one parallel step over (net, block of inputs): the task that owns a block of inputs
// reads each weight of the block once, for dA and dW together, and nothing is summed across tasks, so results don't
// depend on which thread ran what.
#include "flow_program/conditioner.h"

#include "flow_program/gemm.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

// Where layer l of a net begins.
template <class T> T *activations_of(const Conditioner<T> &nets, const ConditionerRows<T> &at, int64_t net, int64_t l) {
  int64_t all = 0, before = 0, widest = 0;
  for (int64_t i = 0; i + 1 < nets.layers; ++i) {
    const int64_t stride = row_stride<T>(nets.dense[i].out);
    before += i < l ? stride : 0;
    all += stride, widest = larger(widest, stride);
  }
  const int64_t rows = at.keep ? net * all + before : (2 * net + (l & 1)) * widest;
  return at.activations + at.capacity * rows + at.first * row_stride<T>(nets.dense[l].out);
}

template <class T> alignas(64) constexpr T zeros[panel_width] = {};

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

} // namespace

template <class T>
void conditioner_forward(const Team &team, const Conditioner<T> &nets, const ConditionerRows<T> &at) {
  const int64_t last = nets.layers - 1, rows = at.rows;
  const auto compute = [&](int64_t l, int64_t net, int64_t panel, int64_t from, int64_t to) {
    const PanelLayer<T> &layer = nets.dense[net * nets.layers + l];
    const int64_t out = layer.out, column = panel * panel_width, columns = smaller(panel_width, out - column);
    const int64_t lda = row_stride<T>(layer.in), ldc = row_stride<T>(out);
    Product<T> p{};
    p.a = (l == 0 ? at.u : activations_of(nets, at, net, l - 1)) + from * lda;
    p.lda = lda;
    p.w = layer.weight + column * layer.in;
    p.ldw = columns;
    p.k = layer.in;
    p.c = (l == last ? at.raw + net * at.raw_stride : activations_of(nets, at, net, l)) + from * ldc + column;
    p.ldc = ldc;
    p.start = layer.bias == nullptr ? zeros<T> : layer.bias + column;
    p.finish = l == last ? Finish::store : Finish::leaky;
    p.slope = nets.slope;
    multiply_panel(p, to - from, columns, false);
    if (at.keep && column + columns == out) // what is saved has no random parts
      for (int64_t row = 0; row < to - from; ++row)
        for (int64_t j = out - column; j < ldc - column; ++j)
          p.c[row * ldc + j] = T(0);
  };
  const auto panels_of = [&](int64_t l) { return ceil_div(nets.dense[l].out, panel_width); };
  if (team.threads <= nets.nets) { // a net each: no waiting between layers
    run(team, nets.nets, [&](int64_t begin, int64_t end) {
      for (int64_t net = begin; net < end; ++net)
        for (int64_t l = 0; l < nets.layers; ++l)
          for (int64_t panel = 0; panel < panels_of(l); ++panel)
            compute(l, net, panel, 0, rows);
    });
    return;
  }
  for (int64_t l = 0; l < nets.layers; ++l) {
    const int64_t panels = panels_of(l), all = nets.nets * panels;
    // rows are split only where nets and panels are too few for the threads
    const int64_t row_groups = all >= team.threads ? 1 : smaller(ceil_div(rows, 32), ceil_div(team.threads, all));
    run(team, all * row_groups, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t net = task / (panels * row_groups), panel = task / row_groups % panels, group = task % row_groups;
        compute(l, net, panel, group * rows / row_groups, (group + 1) * rows / row_groups);
      }
    });
  }
}

template <class T>
T *conditioner_backward(const Team &team, const Conditioner<T> &nets, const ConditionerRows<T> &at, T *d, T *other,
                        int64_t d_stride, bool add) {
  static constexpr int64_t most = panel_width;
  const int64_t rows = at.rows;
  for (int64_t l = nets.layers - 1; l >= 0; --l) {
    const int64_t in = nets.dense[l].in, out = nets.dense[l].out;
    int64_t block = most; // of inputs; whole vectors, so that tasks don't share one
    while (block > 16 && nets.nets * ceil_div(in, block) < team.threads)
      block /= 2;
    const int64_t blocks = ceil_div(in, block), ldd = row_stride<T>(out), lda = row_stride<T>(in);
    run(team, nets.nets * blocks, [&](int64_t begin, int64_t end) {
      alignas(64) T turned[most * most];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t net = task / blocks, k = task % blocks * block, k_count = smaller(block, in - k);
        const PanelLayer<T> &layer = nets.dense[net * nets.layers + l];
        const T *a = (l == 0 ? at.u : activations_of(nets, at, net, l - 1)) + k;
        const T *dc = d + net * d_stride;
        T *da = other + net * d_stride + k;
        for (int64_t column = 0; column < out; column += panel_width) {
          const int64_t columns = smaller(panel_width, out - column);
          const int64_t offset = column * in + k * columns;
          if (layer.grad_weight != nullptr)
            outer_product(
                Outer<T>{a, lda, dc + column, ldd, rows, layer.grad_weight + offset, columns, columns, add, nets.past},
                k_count, columns);
          if (layer.grad_bias != nullptr && k == 0)
            add_rows(dc + column, ldd, rows, columns, layer.grad_bias + column, add);
          transpose_panel(layer.weight + offset, columns, k_count, columns, turned, most);
          Product<T> p{};
          p.a = dc + column;
          p.lda = ldd;
          p.w = turned;
          p.ldw = most;
          p.k = columns;
          p.c = da;
          p.ldc = lda;
          p.start = column == 0 ? zeros<T> : nullptr;
          p.finish = l == 0 || column + columns < out ? Finish::store : Finish::mask;
          p.slope = nets.slope;
          p.mask = l == 0 ? nullptr : a;
          p.ldmask = lda;
          if (column + columns < out) // the block's weights in the next panel
            p.ahead = reinterpret_cast<const char *>(layer.weight + offset + columns * in);
          multiply_panel(p, rows, k_count, true);
        }
      }
      if (nets.past)
        stream_end();
    });
    T *swap = d;
    d = other;
    other = swap;
  }
  return d;
}

#define IIN_FAST_INSTANTIATE(T)                                                                                        \
  template void conditioner_forward<T>(const Team &, const Conditioner<T> &, const ConditionerRows<T> &);              \
  template T *conditioner_backward<T>(const Team &, const Conditioner<T> &, const ConditionerRows<T> &, T *, T *,      \
                                      int64_t, bool);
IIN_FAST_INSTANTIATE(float)
IIN_FAST_INSTANTIATE(double)

} // namespace IIN_FAST_ISA
} // namespace iin_fast
