// A net for all rows, step by step: threads share the panels of a dense step, or the rows where those are too few, and
// the rows of all other steps. Each result comes from one thread in one order, so it doesn't depend on which thread ran
// what.
//
// Weights in panels (iin_fast/ops/flow/layout.py) are read where they lie. Those that torch keeps, [out, in], forward
// turns in blocks of 64 x 64 on the way to the product, as backward does with panels; masks are applied there as well.
#include "flow_program/wide_net.h"

#include "flow_program/gemm.h"
#include "flow_program/steps.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

constexpr int64_t side = panel_width; // of a block of weights
constexpr int64_t deep = 4 * side;    // so many of them are turned for one product, which then loads its sums once

template <class T> alignas(64) constexpr T zeros[side] = {};

// to[columns] (+)= the sum of rows
template <class T> void add_rows(const T *d, int64_t ldd, int64_t rows, int64_t columns, T *to, bool add) {
  constexpr int n = lanes<T>;
  alignas(64) T sum[side];
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

template <class T> class Net {
public:
  Net(const Team &team, const WideNet<T> &net, const NetRows<T> &at)
      : team_(team), net_(net), layer_(net.layer), at_(at) {}

  void forward() const {
    const ProgramLayer &l = layer_;
    if (l.chains > 1 && team_.threads <= l.chains) { // a chain each: no waiting between steps
      const int64_t each = (l.step_count - l.chain) / l.chains;
      for (int64_t k = 0; k < l.chain; ++k)
        forward_element(k, 0, at_.rows);
      return run(team_, l.chains, [&](int64_t begin, int64_t end) {
        for (int64_t k = l.chain + begin * each; k < l.chain + end * each; ++k) {
          if (l.steps[k].kind != StepKind::dense) {
            if (!l.steps[k].joined)
              forward_element(k, 0, at_.rows);
            continue;
          }
          for (int64_t panel = 0; panel < panels_of(k); ++panel)
            forward_dense(k, panel, 0, at_.rows);
        }
      });
    }
    for (int64_t i = 0; i < l.wave_count; ++i) {
      const ProgramWave &wave = l.waves[i];
      over_rows(wave.first, wave.dense, [&](int64_t k, int64_t from, int64_t to) { forward_element(k, from, to); });
      int64_t panels = 0;
      for (int64_t j = wave.dense; j < wave.end; ++j)
        panels += panels_of(l.by_wave[j]);
      if (panels == 0)
        continue;
      // rows are split only where panels are too few for the threads
      const int64_t groups =
          panels >= team_.threads ? 1 : smaller(ceil_div(at_.rows, 32), ceil_div(team_.threads, panels));
      run(team_, panels * groups, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          int64_t panel = task / groups, j = wave.dense;
          for (; panel >= panels_of(l.by_wave[j]); ++j)
            panel -= panels_of(l.by_wave[j]);
          const int64_t group = task % groups;
          forward_dense(l.by_wave[j], panel, group * at_.rows / groups, (group + 1) * at_.rows / groups);
        }
      });
    }
  }

  void backward(bool add, bool of_context) const {
    const ProgramLayer &l = layer_;
    for (int64_t i = l.wave_count - 1; i >= 0; --i) {
      const ProgramWave &wave = l.waves[i];
      bool any = wave.first < wave.dense;
      for (int64_t j = wave.dense; j < wave.end; ++j)
        any = any || l.steps[l.by_wave[j]].act_first || l.steps[l.by_wave[j]].unread;
      if (any)
        over_rows(wave.first, wave.end,
                  [&](int64_t k, int64_t from, int64_t to) { backward_element(k, from, to, of_context); });
      // where steps share a weight, one comes after the other: they add to its gradient
      for (int64_t first = wave.dense, end; first < wave.end; first = end) {
        end = net_.shared ? first + 1 : wave.end;
        backward_dense_steps(first, end, add, of_context);
      }
    }
  }

private:
  const T *value(int64_t id) const {
    return id == 0 ? at_.features : id == 1 ? at_.context : value_at(layer_, at_, id);
  }
  T *gradient(int64_t id) const { return gradient_at(layer_, at_, id); }
  int64_t stride(int64_t id) const { return row_place<T>(layer_, id).stride; }
  int64_t panels_of(int64_t k) const { return ceil_div(layer_.steps[k].out, side); }
  int64_t blocks_of(int64_t k, int64_t width) const { return ceil_div(layer_.steps[k].in, width); }
  // Whether none of the dense steps from `first` on reads the same value before it.
  bool leads(int64_t first, int64_t j) const {
    for (int64_t other = first; other < j; ++other)
      if (layer_.steps[layer_.by_wave[other]].a == layer_.steps[layer_.by_wave[j]].a)
        return false;
    return true;
  }
  const T *parameter(const ParameterRef &r) const {
    return r.present() ? static_cast<const T *>(net_.parameters[r.tensor]) + r.offset : nullptr;
  }
  T *grad(const ParameterRef &r) const {
    return r.present() && net_.grads[r.tensor] != nullptr ? net_.grads[r.tensor] + r.offset : nullptr;
  }

  // f(step, from, to) for steps of `by_wave`, on parts of the rows.
  template <class F> void over_rows(int64_t first, int64_t end, const F &f) const {
    if (first == end)
      return;
    const int64_t groups = smaller(ceil_div(at_.rows, 16), team_.threads);
    run(team_, groups, [&](int64_t begin, int64_t last) {
      for (int64_t j = first; j < end; ++j)
        f(layer_.by_wave[j], begin * at_.rows / groups, last * at_.rows / groups);
    });
  }

  // f(mask, [out, in], of what type) for a step that has one.
  template <class F> void with_mask(const ProgramStep &s, int64_t offset, const F &f) const {
    const void *const data = net_.parameters[s.mask.tensor];
    if (net_.bool_mask[s.mask.tensor])
      f(static_cast<const uint8_t *>(data) + s.mask.offset + offset);
    else
      f(static_cast<const T *>(data) + s.mask.offset + offset);
  }

  static T factor(T mask) { return mask; }
  static T factor(uint8_t mask) { return T(mask != 0); }

  // The block of a weight [out, in] that begins at `offset`, with its mask: [outs, side].
  void copy_block(const ProgramStep &s, int64_t offset, int64_t outs, int64_t ins, T *to) const {
    const T *const from = parameter(s.weight) + offset;
    if (s.mask.present())
      return with_mask(s, offset, [&](const auto *mask) {
        for (int64_t o = 0; o < outs; ++o)
#pragma omp simd
          for (int64_t i = 0; i < ins; ++i)
            to[o * side + i] = from[o * s.in + i] * factor(mask[o * s.in + i]);
      });
    for (int64_t o = 0; o < outs; ++o)
      copy(from + o * s.in, to + o * side, ins);
  }

  void forward_dense(int64_t k, int64_t panel, int64_t from, int64_t to) const {
    const ProgramStep &s = layer_.steps[k];
    const int64_t column = panel * side, columns = smaller(side, s.out - column), ldc = stride(2 + k);
    const T *const bias = s.bias.present() ? parameter(s.bias) + column : zeros<T>;
    Product<T> p{};
    p.lda = stride(s.a);
    p.a = value(s.a) + from * p.lda;
    p.c = value_at(layer_, at_, 2 + k) + from * ldc + column;
    p.ldc = ldc;
    Finish finish = Finish::store;
    if (s.act >= 0) {
      const ProgramStep &act = layer_.steps[s.act];
      finish = act.activation == Activation::relu ? Finish::relu : Finish::leaky;
      p.slope = static_cast<T>(act.slope);
    }
    if (s.panels) {
      p.w = parameter(s.weight) + column * s.in;
      p.ldw = columns;
      p.k = s.in;
      p.start = bias;
      p.finish = finish;
      multiply_panel(p, to - from, columns, false);
    } else {
      alignas(64) T block[side * side], turned[deep * side];
      p.w = turned;
      p.ldw = side;
      for (int64_t row = 0; row < s.in; row += deep) {
        const int64_t rows = smaller(deep, s.in - row);
        for (int64_t part = 0; part < rows; part += side) {
          const int64_t ins = smaller(side, rows - part), offset = column * s.in + row + part;
          const T *source = parameter(s.weight) + offset;
          int64_t source_stride = s.in;
          if (s.mask.present())
            copy_block(s, offset, columns, ins, block), source = block, source_stride = side;
          transpose_panel(source, source_stride, columns, ins, turned + part * side, side);
        }
        p.k = rows;
        p.start = row == 0 ? bias : nullptr;
        p.finish = row + rows < s.in ? Finish::store : finish;
        multiply_panel(p, to - from, columns, true);
        p.a += rows;
      }
    }
    if (at_.kept && column + columns == s.out) // what is saved has no random parts
      for (int64_t row = 0; row < to - from; ++row)
        for (int64_t j = columns; j < ldc - column; ++j)
          p.c[row * ldc + j] = T(0);
  }

  // The steps [first, end) of `by_wave`. Those that read the same value add to one gradient, so one thread takes a
  // block of it in all of them.
  void backward_dense_steps(int64_t first, int64_t end, bool add, bool of_context) const {
    const int64_t *const steps = layer_.by_wave;
    const auto blocks_at = [&](int64_t width) {
      int64_t blocks = 0;
      for (int64_t j = first; j < end; ++j)
        blocks += leads(first, j) ? blocks_of(steps[j], width) : 0;
      return blocks;
    };
    int64_t width = side; // of inputs; whole vectors, so that tasks don't share one
    while (width > 16 && blocks_at(width) < team_.threads)
      width /= 2;
    run(team_, blocks_at(width), [&](int64_t begin, int64_t last) {
      for (int64_t task = begin; task < last; ++task) {
        int64_t block = task, j = first;
        for (;; ++j) {
          if (!leads(first, j))
            continue;
          const int64_t here = blocks_of(steps[j], width);
          if (block < here)
            break;
          block -= here;
        }
        for (int64_t other = j; other < end; ++other)
          if (layer_.steps[steps[other]].a == layer_.steps[steps[j]].a)
            backward_dense(steps[other], block * width, width, add, of_context);
      }
      if (net_.past)
        stream_end();
    });
  }

  // Gradients of the inputs [first, first + width), and of what weighs them.
  void backward_dense(int64_t k, int64_t first, int64_t width, bool add, bool of_context) const {
    const ProgramStep &s = layer_.steps[k];
    const int64_t ins = smaller(width, s.in - first), ldd = stride(2 + k), lda = stride(s.a);
    const T *const d = gradient(2 + k), *const a = value(s.a) + first;
    T *const grad_weight = grad(s.weight), *const grad_bias = grad(s.bias);
    const bool passes = s.a != 1 || of_context;
    alignas(64) T block[side * side];
    for (int64_t column = 0; column < s.out; column += side) {
      const int64_t outs = smaller(side, s.out - column);
      const int64_t offset = s.panels ? column * s.in + first * outs : column * s.in + first;
      if (grad_weight != nullptr)
        backward_weight(s, {a, lda, d + column, ldd, at_.rows, grad_weight + offset, 0, 0, add, net_.past}, offset,
                        outs, ins);
      if (grad_bias != nullptr && first == 0)
        add_rows(d + column, ldd, at_.rows, outs, grad_bias + column, add);
      if (!passes)
        continue;
      Product<T> p{};
      p.a = d + column;
      p.lda = ldd;
      p.k = outs;
      p.w = block;
      p.ldw = side;
      if (s.panels)
        transpose_panel(parameter(s.weight) + offset, outs, ins, outs, block, side);
      else if (s.mask.present() || s.in % lanes<T> != 0)
        copy_block(s, offset, outs, ins, block);
      else
        p.w = parameter(s.weight) + offset, p.ldw = s.in;
      p.c = gradient(s.a) + first;
      p.ldc = lda;
      p.start = column == 0 && !s.add_a ? zeros<T> : nullptr;
      p.finish = Finish::store;
      if (s.undo >= 0 && column + outs == s.out) {
        const ProgramStep &act = layer_.steps[s.undo];
        p.finish = act.activation == Activation::relu ? Finish::relu_mask : Finish::mask;
        p.slope = static_cast<T>(act.slope);
        p.mask = a;
        p.ldmask = lda;
      }
      if (s.panels && column + outs < s.out) // the block's weights in the next panel
        p.ahead = reinterpret_cast<const char *>(parameter(s.weight) + offset + outs * s.in);
      multiply_panel(p, at_.rows, ins, true);
    }
  }

  void backward_weight(const ProgramStep &s, Outer<T> p, int64_t offset, int64_t outs, int64_t ins) const {
    if (s.panels) {
      p.ldw = p.columns = outs;
      return outer_product(p, ins, outs);
    }
    const Outer<T> turned{p.d, p.ldd, p.a, p.lda, p.rows, p.w, s.in, ins, p.add, p.past};
    if (!s.mask.present())
      return outer_product(turned, outs, ins);
    alignas(64) T block[side * side];
    Outer<T> to_block = turned;
    to_block.w = block, to_block.ldw = side, to_block.add = to_block.past = false;
    outer_product(to_block, outs, ins);
    with_mask(s, offset, [&](const auto *mask) {
      for (int64_t o = 0; o < outs; ++o) {
        T *const to = p.w + o * s.in;
#pragma omp simd
        for (int64_t i = 0; i < ins; ++i) {
          const T f = factor(mask[o * s.in + i]), term = math::select(f != T(0), f * block[o * side + i], T(0));
          to[i] = p.add ? to[i] + term : term;
        }
      }
    });
  }

  void forward_element(int64_t k, int64_t from, int64_t to) const {
    const ProgramStep &s = layer_.steps[k];
    const int64_t ld = stride(2 + k), lda = stride(s.a), ldb = stride(s.b), width = layer_.values[2 + k].rows;
    const int64_t rows = to - from, count = rows * ld;
    T *const out = value_at(layer_, at_, 2 + k) + from * ld;
    const T *const a = value(s.a) + from * lda;
    switch (s.kind) {
    case StepKind::act:
      return activate<T>(s.activation, static_cast<T>(s.slope), a, out, count);
    case StepKind::add:
      return add_values(a, value(s.b) + from * ldb, out, count);
    case StepKind::glu:
      return gate_values(a, value(s.b) + from * ldb, out, count);
    case StepKind::context:
      return copy_columns(a + s.first, lda, rows, width, out, ld, ld - width);
    case StepKind::concat: {
      const int64_t first = layer_.values[s.a].rows;
      copy_columns(a, lda, rows, first, out, ld, 0);
      return copy_columns(value(s.b) + from * ldb, ldb, rows, width - first, out + first, ld, ld - width);
    }
    case StepKind::dense:
      return;
    }
  }

  static void undo(const ProgramStep &act, const T *x, const T *y, const T *d, T *to, int64_t count, bool add) {
    activate_backward<T>(act.activation, static_cast<T>(act.slope), x, y, d, to, count, add);
  }

  // With `padding` zeros behind.
  static void copy_columns(const T *from, int64_t from_stride, int64_t rows, int64_t columns, T *to, int64_t to_stride,
                           int64_t padding) {
    for (int64_t row = 0; row < rows; ++row) {
      copy(from + row * from_stride, to + row * to_stride, columns);
      begin(to + row * to_stride + columns, padding, false);
    }
  }
  static void pass_columns(const T *from, int64_t from_stride, int64_t rows, int64_t columns, T *to, int64_t to_stride,
                           bool add) {
    for (int64_t row = 0; row < rows; ++row)
      pass_gradient(from + row * from_stride, to + row * to_stride, columns, add);
  }

  void backward_element(int64_t k, int64_t from, int64_t to, bool of_context) const {
    const ProgramStep &s = layer_.steps[k];
    const int64_t ld = stride(2 + k), lda = stride(s.a), ldb = stride(s.b), width = layer_.values[2 + k].rows;
    const int64_t rows = to - from, count = rows * ld;
    T *const d = gradient(2 + k) + from * ld;
    if (s.unread)
      begin(d, count, false);
    const T *const made = value_at(layer_, at_, 2 + k) + from * ld;
    if (s.kind == StepKind::dense) {
      if (s.act_first)
        undo(layer_.steps[s.act], made, made, d, d, count, false);
      return;
    }
    const auto wanted = [&](int64_t id) { return id != 1 || of_context; };
    T *const ga = wanted(s.a) ? gradient(s.a) + from * lda : nullptr;
    T *const gb = wanted(s.b) ? gradient(s.b) + from * ldb : nullptr;
    switch (s.kind) {
    case StepKind::act:
      if (ga != nullptr)
        undo(s, value(s.a) + from * lda, made, d, ga, count, s.add_a);
      return;
    case StepKind::add:
      if (ga != nullptr)
        pass_gradient(d, ga, count, s.add_a);
      if (gb != nullptr)
        pass_gradient(d, gb, count, s.add_b);
      return;
    case StepKind::glu:
      return gate_backward(value(s.a) + from * lda, value(s.b) + from * ldb, d, ga, count, s.add_a, gb, s.add_b);
    case StepKind::context:
      if (ga != nullptr) {
        if (!s.add_a)
          begin(ga, rows * lda, false); // a part of it
        pass_columns(d, ld, rows, width, ga + s.first, lda, true);
      }
      return;
    case StepKind::concat: {
      const int64_t first = layer_.values[s.a].rows;
      if (ga != nullptr)
        pass_columns(d, ld, rows, first, ga, lda, s.add_a);
      if (gb != nullptr)
        pass_columns(d + first, ld, rows, width - first, gb, ldb, s.add_b);
      return;
    }
    case StepKind::dense:
      return;
    }
  }

  const Team team_;
  const WideNet<T> &net_;
  const ProgramLayer &layer_;
  const NetRows<T> &at_;
};

} // namespace

template <class T> void wide_net_forward(const Team &team, const WideNet<T> &net, const NetRows<T> &at) {
  Net<T>(team, net, at).forward();
}

template <class T>
void wide_net_backward(const Team &team, const WideNet<T> &net, const NetRows<T> &at, bool add, bool of_context) {
  Net<T>(team, net, at).backward(add, of_context);
}

#define IIN_FAST_INSTANTIATE(T)                                                                                        \
  template void wide_net_forward<T>(const Team &, const WideNet<T> &, const NetRows<T> &);                             \
  template void wide_net_backward<T>(const Team &, const WideNet<T> &, const NetRows<T> &, bool, bool);
IIN_FAST_INSTANTIATE(float)
IIN_FAST_INSTANTIATE(double)

} // namespace IIN_FAST_ISA
} // namespace iin_fast
