// What the kernels of the flow's backward do, tile by tile, whichever kernel calls it. Terms: flow_kernels.cuh.
//
// g [batch, dim] is the gradient of what a step put out. A backward step: the last layers' input
// gradients, whose factor comes from the coupling's backward; the hidden layers'; the first layers', with the
// coupling's direct part, the transition to the previous step, and ActNorm's backward. Gradients of weights need
// only activations and the gradients of activations, so they may wait.
#pragma once

#include "flow/flow_kernels.cuh"

namespace iin_fast {

// Rows of a matrix, `row` elements apart.
template <class T> struct Strided {
  const T *data;
  int64_t row;
};

template <class Storage> struct FlowBackwardWalk {
  using T = compute_t<Storage>;
  FlowWalk<Storage> walk; // every: all steps were saved; else they are walked again, in the other direction, from x
  const Storage *grad_y;  // [batch, dim], rows grad_y_row apart
  int64_t grad_y_row;
  const T *grad_logdet;       // [batch]
  Storage *grad_x;            // [batch, dim]
  T *grad_context;            // [context_count, batch, context_dim], added to, or null
  FlowWeights<Storage> grads; // weight_in is null if those of the nets are not wanted
  T *gs;                      // [2, batch, dim]
  T *loc_parts, *scale_parts; // [n_flows, row_tiles, dim]
  Storage *d_out, *d;         // [group, 2, batch, transformed], [group, 2, depth + 1, batch, hidden]
  int group, row_tiles;

  __host__ __device__ T *g(int i) const { return gs + i % 2 * walk.sizes.batch * walk.sizes.dim; }
  __host__ __device__ Storage *d_of(int step, int net, int layer) const {
    return d + ((step % group * 2 + net) * static_cast<int64_t>(walk.depth() + 1) + layer) * walk.sizes.batch *
                   walk.sizes.hidden;
  }
  __host__ __device__ Storage *d_out_of(int step, int net) const {
    return d_out + (step % group * 2 + net) * walk.sizes.batch * walk.transformed();
  }
  // The transformed columns that a step of the forward map gets (given), or puts out. A stage holds what the walk that
  // filled it got, v what that walk put out.
  __host__ __device__ Strided<T> coupled(int step, bool given) const {
    if (given == (walk.inverse != walk.every))
      return {walk.stage(step) + walk.conditioning(), walk.sizes.dim};
    return {walk.of_step(walk.v, step), walk.transformed()};
  }
  __host__ __device__ int step_of(int walked) const { return walk.inverse ? walked : walk.steps() - 1 - walked; }
  // The transition of gradients, opposite to the map's: its pass names what is undone, so denormalize stands for the
  // gradient of normalize.
  __host__ __device__ Transition transition(int step) const {
    return walk.inverse ? walk.onward(step) : walk.back(step);
  }
};

// The gradient g of a column in a transition. value: what ActNorm put out (transition.pass denormalize) or its
// inverse (normalize). Adds to the gradients of loc and scale.
template <class Storage, class T = compute_t<Storage>>
__device__ __forceinline__ T pass_gradient(const FlowWalk<Storage> &walk, const Transition &transition, int column,
                                           int to, T g, T value, T grad_logdet, T &grad_loc, T &grad_scale) {
  if (transition.pass == Pass::keep)
    return g;
  const int64_t at =
      static_cast<int64_t>(transition.block) * walk.dim() + (transition.pass == Pass::normalize ? to : column);
  const T scale = widen(__ldg(walk.weights.scale + at)), slope = static_cast<T>(walk.activation_slope);
  if (transition.pass == Pass::denormalize) {
    const T through = value < T(0) ? g * slope : g;
    const AffineGradient<T> e = affine_backward<true, false>(leaky_inverse(value, slope) / scale, scale, through);
    grad_loc += e.shift, grad_scale += e.scale + grad_logdet / scale;
    return e.x;
  }
  const T shifted = value + widen(__ldg(walk.weights.loc + at));
  const AffineGradient<T> e = affine_backward<true, true>(shifted, scale, g);
  grad_loc += e.shift, grad_scale += e.scale - grad_logdet / scale;
  return scale * shifted < T(0) ? e.x / slope : e.x;
}

// g of the first step from the gradient of the output: a column of `rows` rows, whose sums are part `tile` of those of
// loc and scale.
template <class Storage>
__device__ __forceinline__ void enter_backward_column(const FlowBackwardWalk<Storage> &back, int64_t tile, int rows,
                                                      int column) {
  using T = compute_t<Storage>;
  const FlowWalk<Storage> &walk = back.walk;
  const Transition transition = walk.inverse
                                    ? Transition{Move::keep, 0, Pass::normalize, 0}
                                    : Transition{Move::table, static_cast<int>(walk.sizes.n_flows) - 1, Pass::keep, 0};
  const int to = move_column(walk, transition, column);
  const int64_t row0 = tile * rows;
  T grad_loc = 0, grad_scale = 0;
  for (int64_t row = row0; row < row0 + rows && row < walk.sizes.batch; ++row) {
    const T g = widen(back.grad_y[row * back.grad_y_row + column]), value = widen(walk.x[row * walk.x_row + column]);
    back.g(0)[row * walk.dim() + to] =
        pass_gradient(walk, transition, column, to, g, value, back.grad_logdet[row], grad_loc, grad_scale);
  }
  if (walk.inverse) {
    back.loc_parts[tile * walk.dim() + to] = grad_loc;
    back.scale_parts[tile * walk.dim() + to] = grad_scale;
  }
}

// Shapes of blocks: tiles of weights lie turned, as rows of outputs, so a step of the depth stays inside a panel.
template <class P> constexpr int panel_depth = depth_of<P>(256) < panel_width ? depth_of<P>(256) : panel_width;
template <class P, bool wide, int buffers = wide ? 2 : 3, bool even = false>
using BackTile = std::conditional_t<wide, Tile<P, 64, 64, depth_of<P>(128), 1, 2, 2, 1, buffers, false, true>,
                                    Tile<P, 32, 16, panel_depth<P>, 1, 1, 1, 4, buffers, false, true, even>>;
template <class P, bool wide>
using FirstBackTile =
    std::conditional_t<wide, Tile<P, 64, 32, depth_of<P>(128), 1, 4, 1, 1, 2, false, true>, BackTile<P, false>>;
template <class P, bool even = false>
using OuterTile = Tile<P, 64, 64, depth_of<P>(128), 1, 2, 2, 1, 2, true, false, even>;

// Tile of a weight [inside, outside] in panels: inputs from input0 on, and outputs from k on, that lie in one panel.
template <class Tile>
__device__ __forceinline__ void load_turned(typename Tile::Storage *to, const typename Tile::Storage *weight,
                                            int inside, int outside, int input0, int k) {
  const int start = k / panel_width * panel_width,
            width = outside - start < panel_width ? outside - start : panel_width;
  const typename Tile::Storage *const from =
      weight + static_cast<int64_t>(start) * inside + static_cast<int64_t>(input0) * width + (k - start);
  load_tile<Tile::columns, Tile::depth, Tile::ldw, Tile::always_wide>(to, from, width, inside - input0,
                                                                      width - (k - start), copies_wide(from, width));
}

enum class Layers : int { first, hidden, last };

// What the first layers' tile does with the sum over both nets: coupling, the transition to the previous step,
// ActNorm.
template <class Tile>
__device__ __forceinline__ void leave_backward(const FlowBackwardWalk<typename Tile::Storage> &back,
                                               unsigned char *shared, int step, int walked, int row_tile, int column0) {
  using T = typename Tile::T;
  constexpr int columns = Tile::columns, groups = tile_threads / columns;
  const FlowWalk<typename Tile::Storage> &walk = back.walk;
  const int inside = walk.inside(), transformed = walk.transformed(), conditioning = walk.conditioning();
  const int64_t row0 = static_cast<int64_t>(row_tile) * Tile::rows, rows = walk.sizes.batch - row0;
  const Transition transition = back.transition(step);
  const bool at_end = walked == walk.steps() - 1;
  T *const target = at_end ? nullptr : back.g(walked + 1);
  const T *const g = back.g(walked), *const s = walk.of_step(walk.s, step), *const stage = walk.stage(step);
  const Strided<T> values = back.coupled(step, transition.pass != Pass::normalize);
  T *const grad_context =
      back.grad_context == nullptr
          ? nullptr
          : back.grad_context + (walk.sizes.context_count > 1 ? step / 2 : 0) * walk.sizes.batch * walk.context_dim();
  const int j = column0 + threadIdx.x % columns, group = threadIdx.x / columns;
  const bool has_u = j < conditioning, has_v = j < transformed;
  const int to_u = has_u ? move_column(walk, transition, j) : 0,
            to_v = has_v ? move_column(walk, transition, conditioning + j) : 0;
  const auto put = [&](int64_t row, int to, T value) {
    if (at_end)
      narrow(value, back.grad_x[row * walk.dim() + to]);
    else
      target[row * walk.dim() + to] = value;
  };
  T sums[4] = {}; // of the gradients of loc and scale, for both columns
  for (int at = group; at < Tile::rows && at < rows; at += groups) {
    const int64_t row = row0 + at;
    const T acc = Tile::result(shared, 0, at, j - column0), gl = back.grad_logdet[row];
    if (has_u)
      put(row, to_u,
          pass_gradient(walk, transition, j, to_u, acc + g[row * walk.dim() + j], stage[row * walk.dim() + j], gl,
                        sums[0], sums[1]));
    if (has_v) {
      const T st = s[row * transformed + j];
      const T gv = g[row * walk.dim() + conditioning + j] * math::exp(walk.inverse ? -st : st);
      put(row, to_v,
          pass_gradient(walk, transition, conditioning + j, to_v, gv, values.data[row * values.row + j], gl, sums[2],
                        sums[3]));
    }
    if (grad_context != nullptr && !has_u && j < inside)
      grad_context[row * walk.context_dim() + j - conditioning] += acc;
  }
  if (transition.pass == Pass::keep)
    return;
  T *const all = reinterpret_cast<T *>(shared); // [groups, 4, columns]
  __syncthreads();
  for (int i = 0; i < 4; ++i)
    all[(group * 4 + i) * columns + threadIdx.x % columns] = sums[i];
  __syncthreads();
  if (group != 0)
    return;
  const int64_t part = (static_cast<int64_t>(transition.block) * back.row_tiles + row_tile) * walk.dim();
  for (int i = 0; i < 4; ++i) {
    if (!(i < 2 ? has_u : has_v))
      continue;
    T sum = 0;
    for (int other = 0; other < groups; ++other)
      sum += all[(other * 4 + i) * columns + threadIdx.x];
    const int column = i < 2 ? j : conditioning + j, to = i < 2 ? to_u : to_v;
    (i % 2 ? back.scale_parts : back.loc_parts)[part + (transition.pass == Pass::normalize ? to : column)] = sum;
  }
}

// Gradient of the input of a layer. layer: the hidden layer (0 … depth - 1) of net `net`, or depth for the last one,
// whose output's gradient comes from the coupling's backward and is stored by the tile of the first inputs; both pass
// the LeakyReLU that gave the input. -1: the first layers of both nets. `kind` says the same; where it is constant, one
// kind is compiled.
template <class Tile>
__device__ __forceinline__ void backward_tile(const FlowBackwardWalk<typename Tile::Storage> &back,
                                              unsigned char *shared, Layers kind, int step, int layer, int walked,
                                              int net, int row_tile, int input0, Do what = Do::all) {
  using Storage = typename Tile::Storage;
  using T = typename Tile::T;
  const FlowWalk<Storage> &walk = back.walk;
  const bool first = kind == Layers::first, last = kind == Layers::last;
  const int hidden = walk.hidden(), transformed = walk.transformed();
  const int inside = first ? walk.inside() : hidden, outside = last ? transformed : hidden;
  const int64_t row0 = static_cast<int64_t>(row_tile) * Tile::rows, rows = walk.sizes.batch - row0;
  const int64_t weight_size = static_cast<int64_t>(inside) * outside, nets = 2 * static_cast<int64_t>(step);
  const T *const g = back.g(walked) + walk.conditioning(), *const s = walk.of_step(walk.s, step);
  const Strided<T> v = back.coupled(step, true);
  const int parts = (outside + Tile::depth - 1) / Tile::depth; // of a net
  const auto load = [&](int, int part, Storage *a_tile, Storage *w_tile) {
    const int of_net = !first ? net : part < parts ? 0 : 1, k = (part - (first ? of_net * parts : 0)) * Tile::depth;
    if (w_tile != nullptr) {
      const Storage *const weight =
          first  ? walk.weights.weight_in + (nets + of_net) * weight_size
          : last ? walk.weights.weight_out + (nets + of_net) * weight_size
                 : walk.weights.weight_hidden + ((nets + of_net) * walk.depth() + layer) * weight_size;
      load_turned<Tile>(w_tile, weight, inside, outside, input0, k);
    }
    if (a_tile == nullptr)
      return;
    if (last)
      compute_tile<Tile::rows, Tile::depth, Tile::lda>(a_tile, rows, outside - k, [&](int at, int j) {
        const int64_t row = row0 + at;
        j += k;
        const T gy = g[row * walk.dim() + j], st = s[row * transformed + j], vt = v.data[row * v.row + j];
        const T gl = back.grad_logdet[row], derivative = T(1) - st * st;
        const CouplingGradient<T> e = walk.inverse ? couple_by_backward<true>(st, derivative, vt, gy, gl)
                                                   : couple_by_backward<false>(st, derivative, vt, gy, gl);
        return net == 0 ? e.raw : e.shift;
      });
    else {
      const Storage *const d = back.d_of(step, of_net, layer + 1) + row0 * hidden;
      load_tile<Tile::rows, Tile::depth, Tile::lda, Tile::always_wide>(a_tile, d + k, hidden, rows, hidden - k,
                                                                       copies_wide(d, hidden));
    }
  };
  const int all_parts = first ? 2 * parts : parts;
  if (what == Do::fetch)
    return Tile::fetch(shared, all_parts, load);
  int visited = 0;
  Tile::run(shared, all_parts, load, what == Do::rest, [&](const Storage *a_tile, const Storage *) {
    if (!last || input0 != 0)
      return;
    Storage *const d_out = back.d_out_of(step, net) + row0 * transformed;
    for (int at = threadIdx.x; at < Tile::rows * Tile::depth; at += tile_threads) {
      const int row = at / Tile::depth, column = at % Tile::depth, j = visited + column;
      if (row < rows && j < transformed)
        d_out[static_cast<int64_t>(row) * transformed + j] = a_tile[row * Tile::lda + column];
    }
    visited += Tile::depth;
  });
  if (first)
    return leave_backward<Tile>(back, shared, step, walked, row_tile, input0);
  const Storage *const a = walk.activation(step, layer) + net * walk.activation_net() + row0 * hidden;
  Storage *const out = back.d_of(step, net, layer) + row0 * hidden;
  const T leaky = static_cast<T>(walk.leaky_slope);
  for (int at = threadIdx.x; at < Tile::rows * Tile::columns; at += tile_threads) {
    const int row = at / Tile::columns, column = input0 + at % Tile::columns;
    if (row < rows && column < hidden) {
      const T value = Tile::result(shared, 0, row, at % Tile::columns);
      const int64_t to = static_cast<int64_t>(row) * hidden + column;
      narrow(widen(a[to]) > T(0) ? value : value * leaky, out[to]);
    }
  }
}

// Gradients of weights and, where input0 is 0, of biases of a layer: input × gradient of the output, summed over rows.
// `layer` counts the hidden ones.
template <class Precision, bool even>
__device__ __forceinline__ void weight_gradient_tile(const FlowBackwardWalk<typename Precision::Storage> &back,
                                                     unsigned char *shared, Layers kind, int step, int layer, int net,
                                                     int input0, int output0) {
  using Tile = OuterTile<Precision, even>;
  using Storage = typename Tile::Storage;
  using T = typename Tile::T;
  const FlowWalk<Storage> &walk = back.walk;
  const bool first = kind == Layers::first;
  const int hidden = walk.hidden(), depth = walk.depth(), conditioning = walk.conditioning();
  const int inside = first ? walk.inside() : hidden, outside = kind == Layers::last ? walk.transformed() : hidden;
  const int64_t net_at = 2 * static_cast<int64_t>(step) + net, batch = walk.sizes.batch;
  const Storage *d;
  Storage *weight, *bias;
  const Storage *a = nullptr;
  if (first) {
    d = back.d_of(step, net, 0);
    weight = back.grads.weight_in + net_at * inside * hidden, bias = back.grads.bias_in + net_at * hidden;
  } else if (kind == Layers::hidden) {
    d = back.d_of(step, net, layer + 1);
    weight = back.grads.weight_hidden + (net_at * depth + layer) * hidden * hidden;
    bias = back.grads.bias_hidden + (net_at * depth + layer) * hidden;
    a = walk.activation(step, layer) + net * walk.activation_net() + input0;
  } else {
    d = back.d_out_of(step, net);
    weight = back.grads.weight_out + net_at * hidden * outside, bias = back.grads.bias_out + net_at * outside;
    a = walk.activation(step, depth) + net * walk.activation_net() + input0;
  }
  d += output0;
  const T *const stage = walk.stage(step);
  const Storage *const context = walk.context_dim() > 0 ? walk.context_of(step / 2) : nullptr;
  const bool wide_a = !first && copies_wide(a, hidden), wide_d = copies_wide(d, outside);
  const int column = threadIdx.x % Tile::columns, share = threadIdx.x / Tile::columns;
  constexpr int shares = tile_threads / Tile::columns;
  T total = 0; // of a column of d, for the bias
  Tile::run(
      shared, static_cast<int>((batch + Tile::depth - 1) / Tile::depth),
      [&](int, int part, Storage *a_tile, Storage *d_tile) {
        const int64_t row0 = static_cast<int64_t>(part) * Tile::depth, rows = batch - row0;
        load_tile<Tile::depth, Tile::columns, Tile::ldw, Tile::always_wide>(d_tile, d + row0 * outside, outside, rows,
                                                                            outside - output0, wide_d);
        if (first)
          compute_tile<Tile::depth, Tile::rows, Tile::lda>(a_tile, rows, inside - input0, [&](int at, int input) {
            const int64_t row = row0 + at;
            input += input0;
            return input < conditioning ? stage[row * walk.dim() + input]
                                        : widen(context[row * walk.context_dim() + input - conditioning]);
          });
        else
          load_tile<Tile::depth, Tile::rows, Tile::lda, Tile::always_wide>(a_tile, a + row0 * hidden, hidden, rows,
                                                                           inside - input0, wide_a);
      },
      false,
      [&](const Storage *, const Storage *d_tile) {
        if (input0 == 0)
          for (int row = share; row < Tile::depth; row += shares)
            total += widen(d_tile[row * Tile::ldw + column]);
      });
  const int start = output0 / panel_width * panel_width;
  const int width = outside - start < panel_width ? outside - start : panel_width;
  weight += static_cast<int64_t>(start) * inside + (output0 - start);
  for (int at = threadIdx.x; at < Tile::rows * Tile::columns; at += tile_threads) {
    const int input = input0 + at / Tile::columns, output = at % Tile::columns;
    if (input < inside && output0 + output < outside)
      narrow(Tile::result(shared, 0, at / Tile::columns, output), weight[static_cast<int64_t>(input) * width + output]);
  }
  if (input0 != 0)
    return;
  T *const totals = reinterpret_cast<T *>(shared);
  __syncthreads();
  totals[threadIdx.x] = total;
  __syncthreads();
  if (share == 0 && output0 + column < outside) {
    for (int other = 1; other < shares; ++other)
      total += totals[other * Tile::columns + column];
    narrow(total, bias[output0 + column]);
  }
}

// Gradients of loc and scale at `at` of [n_flows, dim]: the parts of the row tiles, in order.
template <class Storage>
__device__ __forceinline__ void finish_backward_column(const FlowBackwardWalk<Storage> &back, int64_t at) {
  using T = compute_t<Storage>;
  const int64_t dim = back.walk.dim(), part = at / dim * back.row_tiles * dim + at % dim;
  T loc = 0, scale = 0;
  for (int tile = 0; tile < back.row_tiles; ++tile) {
    loc += back.loc_parts[part + tile * dim];
    scale += back.scale_parts[part + tile * dim];
  }
  narrow(loc, back.grads.loc[at]);
  narrow(scale, back.grads.scale[at]);
}

} // namespace iin_fast
