// The backward of the flow on a GPU, both directions, layer by layer. Terms: flow_kernels.cuh.
//
// g [batch, dim] is the gradient of what a step put out. For each step, in the opposite order of the map's: the last
// layers' input gradients, whose factor comes from the coupling's backward; the hidden layers'; the first layers', with
// the coupling's direct part, the way back to the previous step, and ActNorm's backward. Gradients of activations wait
// until the weight gradients of several steps are computed at once (pending_bytes).
//
// Launches: 2 n (depth + 2) + 3, and 2 or 3 for the weights of each group of steps; where nothing was saved, the nets
// again. Bytes: weights once for every `rows` of a tile, read through tiles that lie turned in shared memory;
// activations and their gradients twice; weight gradients written once. Sums over rows are kept for each tile of rows
// and added in order: results repeat bit for bit.
#pragma once

#include "flow/flow_kernels.cuh"

namespace iin_fast {

constexpr int64_t pending_bytes = 64 << 20;

// Rows of a matrix, `row` elements apart.
template <class T> struct Strided {
  const T *data;
  int64_t row;
};

template <class Storage> struct FlowBackwardWalk {
  using T = compute_t<Storage>;
  FlowWalk<Storage> walk; // every: all steps were saved; else they are walked again, the other way round, from x
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
  // The way of gradients, opposite to the map's: its pass names what is undone, so denormalize stands for the gradient
  // of normalize.
  __host__ __device__ Way way(int step) const { return walk.inverse ? walk.onward(step) : walk.back(step); }
};

// The gradient g of a column on its way. value: what ActNorm put out (way.pass denormalize) or its inverse (normalize).
// Adds to the gradients of loc and scale.
template <class Storage, class T = compute_t<Storage>>
__device__ __forceinline__ T pass_gradient(const FlowWalk<Storage> &walk, const Way &way, int column, int to, T g,
                                           T value, T grad_logdet, T &grad_loc, T &grad_scale) {
  if (way.pass == Pass::keep)
    return g;
  const int64_t at = static_cast<int64_t>(way.block) * walk.dim() + (way.pass == Pass::normalize ? to : column);
  const T scale = widen(__ldg(walk.weights.scale + at)), slope = static_cast<T>(walk.activation_slope);
  if (way.pass == Pass::denormalize) {
    const T before = value < T(0) ? value / slope : value;
    g = value < T(0) ? g * slope : g;
    grad_scale += (g * before + grad_logdet) / scale;
    g *= scale;
    grad_loc += g;
    return g;
  }
  const T shifted = value + widen(__ldg(walk.weights.loc + at));
  grad_scale -= (g * shifted + grad_logdet) / scale;
  grad_loc -= g;
  g /= scale;
  return scale * shifted < T(0) ? g / slope : g;
}

// g of the first step from the gradient of the output; a block has a tile of rows, a thread a column of it.
template <class Storage>
__global__ void __launch_bounds__(tile_threads, 4)
    flow_enter_backward_kernel(const FlowBackwardWalk<Storage> back, const int rows) {
  using T = compute_t<Storage>;
  const FlowWalk<Storage> &walk = back.walk;
  const int column = blockIdx.y * tile_threads + threadIdx.x;
  if (column >= walk.dim())
    return;
  const Way way = walk.inverse ? Way{Move::keep, 0, Pass::normalize, 0}
                               : Way{Move::table, static_cast<int>(walk.sizes.n_flows) - 1, Pass::keep, 0};
  const int to = move_column(walk, way, column);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * rows;
  T grad_loc = 0, grad_scale = 0;
  for (int64_t row = row0; row < row0 + rows && row < walk.sizes.batch; ++row) {
    const T g = widen(back.grad_y[row * back.grad_y_row + column]), value = widen(walk.x[row * walk.x_row + column]);
    back.g(0)[row * walk.dim() + to] =
        pass_gradient(walk, way, column, to, g, value, back.grad_logdet[row], grad_loc, grad_scale);
  }
  if (walk.inverse) {
    back.loc_parts[blockIdx.x * static_cast<int64_t>(walk.dim()) + to] = grad_loc;
    back.scale_parts[blockIdx.x * static_cast<int64_t>(walk.dim()) + to] = grad_scale;
  }
}

// Shapes of blocks: tiles of weights lie turned, as rows of outputs, so a step of the depth stays inside a panel.
template <class P> constexpr int panel_depth = depth_of<P>(256) < flow_panel ? depth_of<P>(256) : flow_panel;
template <class P, bool wide>
using BackTile = std::conditional_t<wide, Tile<P, 64, 64, depth_of<P>(128), 1, 2, 2, 1, 2, false, true>,
                                    Tile<P, 32, 16, panel_depth<P>, 1, 1, 1, 4, 3, false, true>>;
template <class P, bool wide>
using FirstBackTile =
    std::conditional_t<wide, Tile<P, 64, 32, depth_of<P>(128), 1, 4, 1, 1, 2, false, true>, BackTile<P, false>>;
template <class P> using OuterTile = Tile<P, 64, 64, depth_of<P>(128), 1, 2, 2, 1, 2, true, false>;

// Tile of a weight [inside, outside] in panels: inputs from input0 on, and outputs from k on, that lie in one panel.
template <class Tile>
__device__ __forceinline__ void load_turned(typename Tile::Storage *to, const typename Tile::Storage *weight,
                                            int inside, int outside, int input0, int k) {
  const int start = k / flow_panel * flow_panel, width = outside - start < flow_panel ? outside - start : flow_panel;
  const typename Tile::Storage *const from =
      weight + static_cast<int64_t>(start) * inside + static_cast<int64_t>(input0) * width + (k - start);
  load_tile<Tile::columns, Tile::depth, Tile::ldw>(to, from, width, inside - input0, width - (k - start),
                                                   copies_wide(from, width));
}

// Gradient of the input of layer `layer` + 1 of both nets, before the LeakyReLU that gave it. last: of the last layer,
// whose output's gradient comes from the coupling's backward, and is stored by the first column of blocks.
template <class Precision, bool wide, bool last>
__global__ void __launch_bounds__(tile_threads, blocks_at_once<Precision>)
    flow_layer_backward_kernel(const FlowBackwardWalk<typename Precision::Storage> back, const int step,
                               const int layer, const int walked) {
  using Tile = BackTile<Precision, wide>;
  using Storage = typename Tile::Storage;
  using T = typename Tile::T;
  const FlowWalk<Storage> &walk = back.walk;
  unsigned char *const shared = shared_tiles();
  const int net = blockIdx.z, input0 = blockIdx.y * Tile::columns, hidden = walk.hidden();
  const int transformed = walk.transformed(), outside = last ? transformed : hidden;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Tile::rows, rows = walk.sizes.batch - row0;
  const int64_t net_at = 2 * static_cast<int64_t>(step) + net;
  const Storage *const weight = last ? walk.weights.weight_out + net_at * hidden * outside
                                     : walk.weights.weight_hidden + (net_at * walk.depth() + layer) * hidden * hidden;
  const Storage *const source = last ? nullptr : back.d_of(step, net, layer + 1) + row0 * hidden;
  const T *const g = back.g(walked) + walk.conditioning(), *const s = walk.of_step(walk.s, step);
  const Strided<T> v = back.coupled(step, true);
  Storage *const d_out = back.d_out_of(step, net);
  const bool wide_a = !last && copies_wide(source, hidden);
  Tile::run(shared, (outside + Tile::depth - 1) / Tile::depth, [&](int, int part, Storage *a_tile, Storage *w_tile) {
    const int k = part * Tile::depth;
    load_turned<Tile>(w_tile, weight, hidden, outside, input0, k);
    if constexpr (last)
      compute_tile<Tile::rows, Tile::depth, Tile::lda>(a_tile, rows, outside - k, [&](int at, int j) {
        const int64_t row = row0 + at;
        j += k;
        const T gy = g[row * walk.dim() + j], st = s[row * transformed + j], vt = v.data[row * v.row + j];
        const T gl = back.grad_logdet[row];
        T value;
        if (net == 0)
          value = (walk.inverse ? -(gy * vt + gl) : gy * math::exp(st) * vt + gl) * (T(1) - st * st);
        else
          value = walk.inverse ? -gy * math::exp(-st) : gy;
        if (blockIdx.y == 0)
          narrow(value, d_out[row * transformed + j]);
        return value;
      });
    else
      load_tile<Tile::rows, Tile::depth, Tile::lda>(a_tile, source + k, hidden, rows, hidden - k, wide_a);
  });
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

// Gradient of a step's input: first layers of both nets, coupling, and the way back to the previous step.
template <class Precision, bool wide>
__global__ void __launch_bounds__(tile_threads, blocks_at_once<Precision>)
    flow_first_backward_kernel(const FlowBackwardWalk<typename Precision::Storage> back, const int step,
                               const int walked) {
  using Tile = FirstBackTile<Precision, wide>;
  using Storage = typename Tile::Storage;
  using T = typename Tile::T;
  constexpr int columns = Tile::columns, groups = tile_threads / columns;
  const FlowWalk<Storage> &walk = back.walk;
  unsigned char *const shared = shared_tiles();
  const int column0 = blockIdx.y * columns, hidden = walk.hidden(), inside = walk.inside();
  const int transformed = walk.transformed(), conditioning = walk.conditioning();
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Tile::rows, rows = walk.sizes.batch - row0;
  const int parts = (hidden + Tile::depth - 1) / Tile::depth; // of each net
  Tile::run(shared, 2 * parts, [&](int, int part, Storage *a_tile, Storage *w_tile) {
    const int net = part / parts, k = (part - net * parts) * Tile::depth;
    const Storage *const weight = walk.weights.weight_in + (2 * static_cast<int64_t>(step) + net) * inside * hidden;
    const Storage *const d = back.d_of(step, net, 0) + row0 * hidden;
    load_turned<Tile>(w_tile, weight, inside, hidden, column0, k);
    load_tile<Tile::rows, Tile::depth, Tile::lda>(a_tile, d + k, hidden, rows, hidden - k, copies_wide(d, hidden));
  });
  const Way way = back.way(step);
  const bool at_end = walked == walk.steps() - 1;
  T *const target = at_end ? nullptr : back.g(walked + 1);
  const T *const g = back.g(walked), *const s = walk.of_step(walk.s, step), *const stage = walk.stage(step);
  const Strided<T> values = back.coupled(step, way.pass != Pass::normalize);
  T *const grad_context =
      back.grad_context == nullptr
          ? nullptr
          : back.grad_context + (walk.sizes.context_count > 1 ? step / 2 : 0) * walk.sizes.batch * walk.context_dim();
  const int j = column0 + threadIdx.x % columns, group = threadIdx.x / columns;
  const bool has_u = j < conditioning, has_v = j < transformed;
  const int to_u = has_u ? move_column(walk, way, j) : 0, to_v = has_v ? move_column(walk, way, conditioning + j) : 0;
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
          pass_gradient(walk, way, j, to_u, acc + g[row * walk.dim() + j], stage[row * walk.dim() + j], gl, sums[0],
                        sums[1]));
    if (has_v) {
      const T st = s[row * transformed + j];
      const T gv = g[row * walk.dim() + conditioning + j] * math::exp(walk.inverse ? -st : st);
      put(row, to_v,
          pass_gradient(walk, way, conditioning + j, to_v, gv, values.data[row * values.row + j], gl, sums[2],
                        sums[3]));
    }
    if (grad_context != nullptr && !has_u && j < inside)
      grad_context[row * walk.context_dim() + j - conditioning] += acc;
  }
  if (way.pass == Pass::keep)
    return;
  T *const all = reinterpret_cast<T *>(shared); // [groups, 4, columns]
  __syncthreads();
  for (int i = 0; i < 4; ++i)
    all[(group * 4 + i) * columns + threadIdx.x % columns] = sums[i];
  __syncthreads();
  if (group != 0)
    return;
  const int64_t part = (static_cast<int64_t>(way.block) * back.row_tiles + blockIdx.x) * walk.dim();
  for (int i = 0; i < 4; ++i) {
    if (!(i < 2 ? has_u : has_v))
      continue;
    T sum = 0;
    for (int other = 0; other < groups; ++other)
      sum += all[(other * 4 + i) * columns + threadIdx.x];
    const int column = i < 2 ? j : conditioning + j, to = i < 2 ? to_u : to_v;
    (i % 2 ? back.scale_parts : back.loc_parts)[part + (way.pass == Pass::normalize ? to : column)] = sum;
  }
}

enum class Layers : int { first, hidden, last };

// Gradients of weights and biases of all layers of a kind, of steps first_step ... : input × gradient of the output,
// summed over rows. blockIdx.z: (step, layer, net).
template <class Precision, bool first>
__global__ void __launch_bounds__(tile_threads, blocks_at_once<Precision>)
    flow_weight_gradient_kernel(const FlowBackwardWalk<typename Precision::Storage> back, const int first_step,
                                const Layers kind) {
  using Tile = OuterTile<Precision>;
  using Storage = typename Tile::Storage;
  using T = typename Tile::T;
  const FlowWalk<Storage> &walk = back.walk;
  unsigned char *const shared = shared_tiles();
  const int hidden = walk.hidden(), depth = walk.depth(), conditioning = walk.conditioning();
  const int layers = kind == Layers::hidden ? depth : 1;
  const int net = blockIdx.z % 2, layer = blockIdx.z / 2 % layers, step = first_step + blockIdx.z / 2 / layers;
  const int inside = first ? walk.inside() : hidden, outside = kind == Layers::last ? walk.transformed() : hidden;
  const int input0 = blockIdx.x * Tile::rows, output0 = blockIdx.y * Tile::columns;
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
        load_tile<Tile::depth, Tile::columns, Tile::ldw>(d_tile, d + row0 * outside, outside, rows, outside - output0,
                                                         wide_d);
        if constexpr (first)
          compute_tile<Tile::depth, Tile::rows, Tile::lda>(a_tile, rows, inside - input0, [&](int at, int input) {
            const int64_t row = row0 + at;
            input += input0;
            return input < conditioning ? stage[row * walk.dim() + input]
                                        : widen(context[row * walk.context_dim() + input - conditioning]);
          });
        else
          load_tile<Tile::depth, Tile::rows, Tile::lda>(a_tile, a + row0 * hidden, hidden, rows, inside - input0,
                                                        wide_a);
      },
      [&](const Storage *, const Storage *d_tile) {
        if (blockIdx.x == 0)
          for (int row = share; row < Tile::depth; row += shares)
            total += widen(d_tile[row * Tile::ldw + column]);
      });
  const int start = output0 / flow_panel * flow_panel;
  const int width = outside - start < flow_panel ? outside - start : flow_panel;
  weight += static_cast<int64_t>(start) * inside + (output0 - start);
  for (int at = threadIdx.x; at < Tile::rows * Tile::columns; at += tile_threads) {
    const int input = input0 + at / Tile::columns, output = at % Tile::columns;
    if (input < inside && output0 + output < outside)
      narrow(Tile::result(shared, 0, at / Tile::columns, output), weight[static_cast<int64_t>(input) * width + output]);
  }
  if (blockIdx.x != 0)
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

// Gradients of loc and scale: the parts of the row tiles, in order; a thread a column.
template <class Storage>
__global__ void __launch_bounds__(tile_threads) flow_finish_backward_kernel(const FlowBackwardWalk<Storage> back) {
  using T = compute_t<Storage>;
  const int column = blockIdx.x * tile_threads + threadIdx.x, dim = back.walk.dim();
  if (column >= dim)
    return;
  for (int64_t block = blockIdx.y; block < back.walk.sizes.n_flows; block += gridDim.y) {
    T loc = 0, scale = 0;
    for (int tile = 0; tile < back.row_tiles; ++tile) {
      const int64_t at = (block * back.row_tiles + tile) * dim + column;
      loc += back.loc_parts[at];
      scale += back.scale_parts[at];
    }
    narrow(loc, back.grads.loc[block * dim + column]);
    narrow(scale, back.grads.scale[block * dim + column]);
  }
}

// Sums in the type of the result, for 16-bit types.
template <class Storage>
__global__ void __launch_bounds__(tile_threads)
    flow_narrow_kernel(const compute_t<Storage> *from, Storage *to, const int64_t count) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * tile_threads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * tile_threads + threadIdx.x; at < count; at += threads)
    narrow(from[at], to[at]);
}

// `weights`: whether weight gradients are wanted. Before: walk.every, keep and keep_v, and sizes.
template <class Storage>
void arrange_backward(FlowBackwardWalk<Storage> &back, bool weights, Arena &scratch, int64_t pending = pending_bytes) {
  using T = compute_t<Storage>;
  FlowWalk<Storage> &walk = back.walk;
  const int64_t batch = walk.sizes.batch, depth = walk.sizes.depth, hidden = walk.sizes.hidden;
  const int64_t row = 2 * batch * (walk.transformed() + (depth + 1) * hidden) * static_cast<int64_t>(sizeof(Storage));
  const int64_t layers = depth > 0 ? depth : 1, most = 65535 / (2 * layers); // what a grid takes
  int64_t fitting = row > 0 ? pending / row : 1;
  fitting = fitting < most ? fitting : most;
  fitting = fitting < walk.steps() ? fitting : walk.steps();
  back.group = !walk.every || !weights || fitting < 1 ? 1 : static_cast<int>(fitting);
  back.row_tiles = static_cast<int>(tiles_of(batch, batch <= narrow_rows ? 32 : 64));
  back.gs = scratch.take<T>(2 * batch * walk.sizes.dim);
  back.loc_parts = scratch.take<T>(walk.sizes.n_flows * back.row_tiles * walk.sizes.dim);
  back.scale_parts = scratch.take<T>(walk.sizes.n_flows * back.row_tiles * walk.sizes.dim);
  back.d_out = scratch.take<Storage>(back.group * 2 * batch * walk.transformed());
  back.d = scratch.take<Storage>(back.group * 2 * (depth + 1) * batch * hidden);
  walk.table = scratch.take<int>(walk.sizes.n_flows * walk.sizes.dim);
  walk.tiles = static_cast<int>(tiles_of(walk.conditioning(), batch <= narrow_rows ? 16 : 32));
}

template <class Precision, class Launch>
void launch_weight_gradients(const FlowBackwardWalk<typename Precision::Storage> &back, int first, int count,
                             const Launch &launch) {
  using Tile = OuterTile<Precision>;
  const FlowWalk<typename Precision::Storage> &walk = back.walk;
  const auto start = launch.with_shared(Tile::shared_bytes);
  const auto grid = [&](int inside, int outside, int layers) {
    return dim3(tiles_of(inside, Tile::rows), tiles_of(outside, Tile::columns), 2 * layers * count);
  };
  start(flow_weight_gradient_kernel<Precision, true>, grid(walk.inside(), walk.hidden(), 1), dim3(tile_threads), back,
        first, Layers::first);
  if (walk.depth() > 0)
    start(flow_weight_gradient_kernel<Precision, false>, grid(walk.hidden(), walk.hidden(), walk.depth()),
          dim3(tile_threads), back, first, Layers::hidden);
  start(flow_weight_gradient_kernel<Precision, false>, grid(walk.hidden(), walk.transformed(), 1), dim3(tile_threads),
        back, first, Layers::last);
}

template <class Precision, bool wide, class Launch>
void launch_backward_step(const FlowBackwardWalk<typename Precision::Storage> &back, int step, int walked,
                          const Launch &launch) {
  using Tile = BackTile<Precision, wide>;
  using First = FirstBackTile<Precision, wide>;
  const FlowWalk<typename Precision::Storage> &walk = back.walk;
  const auto start = launch.with_shared(Tile::shared_bytes);
  const dim3 grid(back.row_tiles, tiles_of(walk.hidden(), Tile::columns), 2);
  start(flow_layer_backward_kernel<Precision, wide, true>, grid, dim3(tile_threads), back, step, walk.depth(), walked);
  for (int layer = walk.depth() - 1; layer >= 0; --layer)
    start(flow_layer_backward_kernel<Precision, wide, false>, grid, dim3(tile_threads), back, step, layer, walked);
  launch.with_shared(First::shared_bytes)(flow_first_backward_kernel<Precision, wide>,
                                          dim3(back.row_tiles, tiles_of(walk.inside(), First::columns)),
                                          dim3(tile_threads), back, step, walked);
}

// Gradients of a map in walk.inverse's direction, whose output is walk.x.
template <class Precision, class Launch>
void launch_flow_backward(const FlowBackwardWalk<typename Precision::Storage> &back, const Launch &launch) {
  using Storage = typename Precision::Storage;
  const FlowWalk<Storage> &walk = back.walk;
  const bool narrow = walk.sizes.batch <= narrow_rows;
  const int steps = walk.steps();
  if (walk.sizes.batch == 0)
    return;
  const auto step_of = [&](int walked) { return walk.inverse ? walked : steps - 1 - walked; };
  launch_table(walk, walk.inverse, launch);
  launch(flow_enter_backward_kernel<Storage>, dim3(back.row_tiles, tiles_of(walk.dim(), tile_threads)),
         dim3(tile_threads), back, narrow ? 32 : 64);
  if (!walk.every)
    launch_enter(walk, !walk.inverse, launch);
  for (int walked = 0; walked < steps; ++walked) {
    const int step = step_of(walked);
    if (!walk.every) // the map the other way round, a step at a time
      launch_step<Precision>(walk, step, !walk.inverse, launch);
    if (narrow)
      launch_backward_step<Precision, false>(back, step, walked, launch);
    else
      launch_backward_step<Precision, true>(back, step, walked, launch);
    const int first = step / back.group * back.group;
    if (back.grads.weight_in != nullptr &&
        (walked == steps - 1 || step_of(walked + 1) / back.group != step / back.group))
      launch_weight_gradients<Precision>(back, first, first + back.group < steps ? back.group : steps - first, launch);
  }
  const unsigned blocks = static_cast<unsigned>(walk.sizes.n_flows < 65535 ? walk.sizes.n_flows : 65535);
  launch(flow_finish_backward_kernel<Storage>, dim3(tiles_of(walk.dim(), tile_threads), blocks), dim3(tile_threads),
         back);
}

} // namespace iin_fast
