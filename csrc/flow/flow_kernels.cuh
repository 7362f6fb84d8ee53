// The flow on a GPU, forward and inverse: one kernel for each layer of both nets, or one for all (persistent).
//
// A stage is what one half of a coupling sees: rows [conditioning | transformed] of `dim` numbers in float32 at least.
// A step is (block, half), step = 2 block + half. What happens to a row between steps (swap, permutation, ActNorm,
// activation) is a map of columns and an operation on single numbers, done where a column is stored: move and pass.
// Weights are read as they lie, in panels [in][64 outputs]: no tile of a weight crosses a panel.
//
// Launches for n blocks with nets of depth + 2 layers: a table of permutations, the first stage, 2 n (depth + 2)
// layers, of which the last ones hold coupling, log-det and the transition to the next stage, and the sum of log-dets.
// Bytes: every weight once for every `rows` of a tile (mostly from the L2 cache after the first), and for each layer
// the activations of a row, written once and read once for every `columns` outputs. Up to 128 rows narrow tiles spread
// a weight over many multiprocessors; beyond, tiles of 64 × 64 multiply. All sums run in a fixed order: results repeat
// bit for bit.
//
// The persistent kernel (up to persistent_rows rows) walks all layers in one launch, with a barrier over the grid
// between them; a block begins to fetch its weights of the next layer before that barrier. Wide nets at large batches:
// flow_nets_kernels.cuh.
#pragma once

#include <utility>

#include <cooperative_groups.h>

#include "affine_coupling/affine_coupling.h"
#include "common/affine.h"
#include "common/math.h"
#include "common/sum.h"
#include "common/tile.cuh"
#include "flow/flow.h"

namespace iin_fast {

enum class Move : int { keep, swap, unswap, table };
enum class Pass : int { keep, normalize, denormalize };

// How a call runs. best: as its size says; choose_way() makes clusters or nets of it. Tests ask for others.
enum class FlowWay : int64_t { best, layers, clusters, nets };

// The transition of a row from a step to the next.
struct Transition {
  Move move;
  int permutation; // the block whose table applies
  Pass pass;
  int block; // whose loc and scale apply
};

// A call: sizes, parameters and buffers. Buffers hold every step (for backward), or one step at a time.
template <class Storage> struct FlowWalk {
  using T = compute_t<Storage>;
  FlowSizes sizes;
  FlowWeights<const Storage> weights;
  const int64_t *permutation; // [n_flows, dim]
  const Storage *context;     // [context_count, batch, context_dim]
  double leaky_slope, activation_slope, log_slope;
  bool inverse; // the map that is computed
  FlowWay way;
  bool every, keep, keep_v; // buffers of all steps; s and all activations are kept; what couplings put out is, too

  const Storage *x; // [batch, dim], rows x_row apart
  int64_t x_row;
  Storage *y; // [batch, dim], or null: then the last step puts out nothing
  T *logdet;  // [batch], or null

  T *stages;            // [steps or 2, batch, dim]
  T *s, *v;             // [steps or 1, batch, transformed]
  Storage *activations; // [steps or 1, 2, layers, batch, hidden]
  T *parts;             // [1 + steps * tiles, batch], of the log-det
  int *table;           // [n_flows, dim]: where columns go; of the permutations, or of their inverses (inverted_table)
  int tiles;            // column tiles of the last layers
  T *raw;               // what the nets of a step say: [2, batch, transformed]; their partial sums in clusters

  __host__ __device__ int steps() const { return 2 * static_cast<int>(sizes.n_flows); }
  __host__ __device__ int dim() const { return static_cast<int>(sizes.dim); }
  __host__ __device__ int transformed() const { return dim() / 2; }
  __host__ __device__ int conditioning() const { return dim() - transformed(); }
  __host__ __device__ int context_dim() const { return static_cast<int>(sizes.context_dim); }
  __host__ __device__ int inside() const { return conditioning() + context_dim(); }
  __host__ __device__ int hidden() const { return static_cast<int>(sizes.hidden); }
  __host__ __device__ int depth() const { return static_cast<int>(sizes.depth); }
  __host__ __device__ int layers() const { return keep || depth() == 0 ? depth() + 1 : 2; } // kept activations

  __host__ __device__ T *stage(int step) const {
    return stages + static_cast<int64_t>(every ? step : step % 2) * sizes.batch * sizes.dim;
  }
  __host__ __device__ T *of_step(T *buffer, int step) const {
    return buffer + static_cast<int64_t>(every ? step : 0) * sizes.batch * transformed();
  }
  __host__ __device__ int64_t activation_net() const { return layers() * sizes.batch * sizes.hidden; }
  __host__ __device__ Storage *activation(int step, int layer) const {
    return activations + (every ? step : 0) * 2 * activation_net() +
           (keep ? layer : layer % 2) * sizes.batch * sizes.hidden;
  }
  __host__ __device__ const Storage *context_of(int block) const {
    return context + (sizes.context_count > 1 ? block : 0) * sizes.batch * sizes.context_dim;
  }

  // From the stage of `step` to what follows; going forward and going back.
  __host__ __device__ Transition onward(int step) const {
    const int block = step / 2;
    if (step % 2 == 0)
      return {Move::swap, 0, Pass::keep, 0};
    if (block == sizes.n_flows - 1)
      return {Move::table, block, Pass::keep, 0};
    return {Move::table, block, Pass::normalize, block + 1};
  }
  __host__ __device__ Transition back(int step) const {
    const int block = step / 2;
    if (step % 2 == 1)
      return {Move::unswap, 0, Pass::keep, 0};
    if (block == 0)
      return {Move::keep, 0, Pass::denormalize, 0};
    return {Move::table, block - 1, Pass::denormalize, block};
  }
};

// Where a column of a stage goes. A table is clamped: it may hold anything.
template <class Storage>
__device__ __forceinline__ int move_column(const FlowWalk<Storage> &walk, const Transition &transition, int column) {
  const int conditioning = walk.conditioning(), transformed = walk.transformed();
  switch (transition.move) {
  case Move::swap:
    return column < conditioning ? column + transformed : column - conditioning;
  case Move::unswap:
    return column < transformed ? column + conditioning : column - transformed;
  case Move::table: {
    const int to = walk.table[static_cast<int64_t>(transition.permutation) * walk.dim() + column];
    return to < 0 ? 0 : to >= walk.dim() ? walk.dim() - 1 : to;
  }
  default:
    return column;
  }
}

// A column's passage to the next stage: where it goes, and the ActNorm that it passes.
template <class T> struct Passage {
  int to;
  T loc, scale;
};

template <class Storage>
__device__ __forceinline__ Passage<compute_t<Storage>> passage_of(const FlowWalk<Storage> &walk,
                                                                  const Transition &transition, int column) {
  Passage<compute_t<Storage>> passage{move_column(walk, transition, column), 0, 0};
  if (transition.pass != Pass::keep) {
    const int64_t at = static_cast<int64_t>(transition.block) * walk.dim() +
                       (transition.pass == Pass::normalize ? passage.to : column);
    passage.loc = widen(__ldg(walk.weights.loc + at)), passage.scale = widen(__ldg(walk.weights.scale + at));
  }
  return passage;
}

// ActNorm with its activation, or the inverse; true if the activation scaled the value.
template <class Storage>
__device__ __forceinline__ bool pass_value(const FlowWalk<Storage> &walk, Pass pass,
                                           const Passage<compute_t<Storage>> &passage, compute_t<Storage> &value) {
  using T = compute_t<Storage>;
  if (pass == Pass::keep)
    return false;
  const T slope = static_cast<T>(walk.activation_slope);
  if (pass == Pass::normalize) {
    value = affine<true, false>(value, passage.loc, passage.scale);
    const bool negative = value < T(0);
    value = leaky(value, slope);
    return negative;
  }
  const bool negative = value < T(0);
  value = affine<true, true>(leaky_inverse(value, slope), passage.loc, passage.scale);
  return negative;
}

// A column of a row goes to the next stage, or to the output; returns what the log-det gains (times the
// sign of the map).
template <class Storage>
__device__ __forceinline__ compute_t<Storage>
carry(const FlowWalk<Storage> &walk, const Transition &transition, const Passage<compute_t<Storage>> &passage,
      compute_t<Storage> *target, Storage *output, int64_t row, compute_t<Storage> value) {
  using T = compute_t<Storage>;
  const bool negative = pass_value(walk, transition.pass, passage, value);
  if (output != nullptr)
    narrow(value, output[row * walk.dim() + passage.to]);
  else
    target[row * walk.dim() + passage.to] = value;
  return negative ? static_cast<T>(walk.log_slope) : T(0);
}

// The end of a step: coupling and the way of the columns of a row to the next stage, or to the output, if there is one.
// `inverse`: the direction of the walk. Both functions return what the log-det gains.
template <class Storage> struct StepEnd {
  using T = compute_t<Storage>;
  const FlowWalk<Storage> &walk;
  int step;
  bool inverse;
  Transition transition;
  const T *stage;
  T *target;
  Storage *output;

  __device__ StepEnd(const FlowWalk<Storage> &walk, int step, bool inverse)
      : walk(walk), step(step), inverse(inverse), transition(inverse ? walk.back(step) : walk.onward(step)),
        stage(walk.stage(step)) {
    const bool last = step == (inverse ? 0 : walk.steps() - 1);
    target = last ? nullptr : walk.stage(inverse ? step - 1 : step + 1);
    output = last ? walk.y : nullptr;
  }

  // What columns j of a row need, of those that are transformed and of those that condition, but for what the nets say.
  struct Columns {
    T value, kept;
    Passage<T> transformed, conditioning;
  };

  __device__ __forceinline__ Columns read(int64_t row, int j) const {
    Columns columns{};
    const int transformed = walk.transformed(), column = walk.conditioning() + j;
    const bool both = j < transformed;
    if (both)
      columns.value = stage[row * walk.dim() + column];
    if (goes_on()) {
      if (both)
        columns.transformed = passage_of(walk, transition, column);
      columns.kept = stage[row * walk.dim() + j], columns.conditioning = passage_of(walk, transition, j);
    }
    return columns;
  }

  // Both columns go on, as far as they exist; raw and shift: what the nets say of the one that is transformed.
  __device__ __forceinline__ T write(int64_t row, int j, T raw, T shift, const Columns &columns) const {
    T gained = 0;
    if (j < walk.transformed()) {
      const T s = math::tanh(raw);
      const T v = inverse ? couple_by<true>(s, columns.value, shift) : couple_by<false>(s, columns.value, shift);
      if (walk.keep)
        walk.of_step(walk.s, step)[row * walk.transformed() + j] = s;
      if (walk.keep_v)
        walk.of_step(walk.v, step)[row * walk.transformed() + j] = v;
      gained = s;
      if (goes_on())
        gained += carry(walk, transition, columns.transformed, target, output, row, v);
    }
    if (goes_on())
      gained += carry(walk, transition, columns.conditioning, target, output, row, columns.kept);
    return gained;
  }

private:
  __device__ __forceinline__ bool goes_on() const { return target != nullptr || output != nullptr; }
};

// table[b, j] = permutation[b, j], or its inverse; what is no index of a column is left out there.
template <class Storage>
__device__ __forceinline__ void fill_table(const FlowWalk<Storage> &walk, bool inverted, int64_t thread,
                                           int64_t threads) {
  const int64_t count = walk.sizes.n_flows * walk.sizes.dim;
  for (int64_t at = thread; at < count; at += threads) {
    const int64_t to = walk.permutation[at];
    const bool valid = to >= 0 && to < walk.sizes.dim;
    if (!inverted)
      walk.table[at] = valid ? static_cast<int>(to) : 0;
    else if (valid)
      walk.table[at / walk.sizes.dim * walk.sizes.dim + to] = static_cast<int>(at % walk.sizes.dim);
  }
}

// The stage of the first step from a row of the input; a warp calls it, and each lane has its part of what the log-det
// gains. `inverse`: the direction of the walk.
template <class Storage>
__device__ __forceinline__ CompensatedSum<compute_t<Storage>> enter_row(const FlowWalk<Storage> &walk, bool inverse,
                                                                        int64_t row, int lane) {
  using T = compute_t<Storage>;
  const int last = static_cast<int>(walk.sizes.n_flows) - 1;
  const Transition transition =
      inverse ? Transition{Move::table, last, Pass::keep, 0} : Transition{Move::keep, 0, Pass::normalize, 0};
  T *const target = walk.stage(inverse ? walk.steps() - 1 : 0);
  CompensatedSum<T> sum;
#pragma unroll 1 // rows are short, and registers few
  for (int column = lane; column < walk.dim(); column += warp_lanes)
    sum.add(carry<Storage>(walk, transition, passage_of(walk, transition, column), target, nullptr, row,
                           widen(walk.x[row * walk.x_row + column])));
  return sum;
}

// The same for all rows, a warp a row.
template <class Storage>
__device__ __forceinline__ void enter_rows(const FlowWalk<Storage> &walk, bool inverse, int64_t first_warp,
                                           int64_t warps) {
  using T = compute_t<Storage>;
  const int lane = threadIdx.x % warp_lanes;
  for (int64_t row = first_warp; row < walk.sizes.batch; row += warps) {
    const T gained = sum_over_warp(enter_row(walk, inverse, row, lane).total());
    if (lane == 0 && walk.parts != nullptr)
      walk.parts[row] = gained;
  }
}

// logdet = the parts in order + the sum of log|scale|, negated for the inverse map. All threads of a block call it.
template <class Storage>
__device__ __forceinline__ void finish_rows(const FlowWalk<Storage> &walk, unsigned char *shared, int64_t first,
                                            int64_t threads) {
  using T = compute_t<Storage>;
  T *const sums = reinterpret_cast<T *>(shared);
  const int64_t scales = walk.sizes.n_flows * walk.sizes.dim;
  CompensatedSum<T> sum;
  for (int64_t at = threadIdx.x; at < scales; at += tile_threads)
    sum.add(math::log(math::abs(widen(__ldg(walk.weights.scale + at)))));
  sums[threadIdx.x] = sum.total();
  for (int half = tile_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half)
      sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  const int count = 1 + walk.steps() * walk.tiles;
  for (int64_t row = first; row < walk.sizes.batch; row += threads) {
    CompensatedSum<T> total;
    total.add(sums[0]);
    for (int part = 0; part < count; ++part)
      total.add(walk.parts[part * walk.sizes.batch + row]);
    walk.logdet[row] = walk.inverse ? -total.total() : total.total();
  }
}

// The tiles of a weight [inside, outside] in panels from column `first` on.
template <class Storage> struct PanelTiles {
  const Storage *data; // of input 0, column `first`
  int width, valid;    // of the panel, and from `first` on
  bool wide;
  __device__ PanelTiles(const Storage *weight, int inside, int outside, int first) {
    const int start = first / panel_width * panel_width;
    width = outside - start < panel_width ? outside - start : panel_width;
    valid = width - (first - start);
    data = weight + static_cast<int64_t>(start) * inside + (first - start);
    wide = copies_wide(data, width);
  }
};

// Shapes of blocks. Depths are in bytes of a row: 256 and 128 are whole sectors, and fill the shared memory.
template <class Precision> constexpr int depth_of(int bytes) {
  return bytes / static_cast<int>(sizeof(typename Precision::Storage));
}
template <class P, bool wide, int buffers = wide ? 2 : 3, bool even = false>
using LayerTile = std::conditional_t<wide, Tile<P, 64, 64, depth_of<P>(128), 1, 2, 2, 1, buffers>,
                                     Tile<P, 32, 16, depth_of<P>(256), 1, 1, 1, 4, buffers, false, false, even>>;
template <class P, bool wide, int buffers = 3, bool even = false>
using LastTile = std::conditional_t<wide, Tile<P, 64, 32, depth_of<P>(64), 2, 2, 1, 1, buffers>,
                                    Tile<P, 32, 16, depth_of<P>(128), 2, 1, 1, 2, buffers, false, false, even>>;

// What a block does of its part: all, only begin to fetch its weights, or the rest.
enum class Do { all, fetch, rest };

// out = LeakyReLU(a W + bias) of one net, for the first layer (layer 0) and the hidden ones (1 … depth).
// `first`: whether layer is 0; where that is constant, one of both is compiled.
template <class Tile>
__device__ __forceinline__ void layer_tile(const FlowWalk<typename Tile::Storage> &walk, unsigned char *shared,
                                           bool first, int step, int layer, int net, int64_t row0, int column0,
                                           Do what = Do::all) {
  using Storage = typename Tile::Storage;
  using T = typename Tile::T;
  const int hidden = walk.hidden(), inside = first ? walk.inside() : hidden, conditioning = walk.conditioning();
  const int64_t net_at = 2 * static_cast<int64_t>(step) + net, hidden_at = net_at * walk.depth() + layer - 1;
  const Storage *const weight = first ? walk.weights.weight_in + net_at * inside * hidden
                                      : walk.weights.weight_hidden + hidden_at * hidden * hidden;
  const Storage *const bias =
      first ? walk.weights.bias_in + net_at * hidden : walk.weights.bias_hidden + hidden_at * hidden;
  const Storage *const a =
      first ? nullptr : walk.activation(step, layer - 1) + net * walk.activation_net() + row0 * hidden;
  const T *const stage = walk.stage(step) + row0 * walk.dim();
  const Storage *const context =
      walk.context_dim() > 0 ? walk.context_of(step / 2) + row0 * walk.context_dim() : nullptr;
  const PanelTiles<Storage> panel(weight, inside, hidden, column0);
  const int64_t rows = walk.sizes.batch - row0;
  const bool wide = !first && copies_wide(a, hidden);
  const int parts = (inside + Tile::depth - 1) / Tile::depth;
  const auto load = [&](int, int part, Storage *a_tile, Storage *w_tile) {
    const int k = part * Tile::depth;
    if (w_tile != nullptr)
      load_tile<Tile::depth, Tile::columns, Tile::ldw, Tile::always_wide>(
          w_tile, panel.data + static_cast<int64_t>(k) * panel.width, panel.width, inside - k, panel.valid, panel.wide);
    if (a_tile == nullptr)
      return;
    if (first)
      compute_tile<Tile::rows, Tile::depth, Tile::lda>(a_tile, rows, inside - k, [&](int row, int column) {
        column += k;
        return column < conditioning
                   ? stage[static_cast<int64_t>(row) * walk.dim() + column]
                   : widen(context[static_cast<int64_t>(row) * walk.context_dim() + column - conditioning]);
      });
    else
      load_tile<Tile::rows, Tile::depth, Tile::lda, Tile::always_wide>(a_tile, a + k, hidden, rows, inside - k, wide);
  };
  if (what == Do::fetch)
    return Tile::fetch(shared, parts, load);
  Tile::run(shared, parts, load, what == Do::rest);
  Storage *const out = walk.activation(step, layer) + net * walk.activation_net() + row0 * hidden;
  const T leaky = static_cast<T>(walk.leaky_slope);
  for (int at = threadIdx.x; at < Tile::rows * Tile::columns; at += tile_threads) {
    const int row = at / Tile::columns, column = column0 + at % Tile::columns;
    const int inside = column < hidden ? column : 0; // nvcc reads ahead of the condition
    if (row < rows && column < hidden) {
      const T value = Tile::result(shared, 0, row, at % Tile::columns) + widen(__ldg(bias + inside));
      narrow(value > T(0) ? value : value * leaky, out[static_cast<int64_t>(row) * hidden + column]);
    }
  }
}

// Last layers of both nets, coupling, log-det, and the transition of these columns (those that condition go along) to
// the next stage. `inverse`: the direction of the walk, of which this is step number `walked`.
template <class Tile>
__device__ __forceinline__ void last_tile(const FlowWalk<typename Tile::Storage> &walk, unsigned char *shared, int step,
                                          bool inverse, int64_t row0, int tile, Do what = Do::all) {
  using Storage = typename Tile::Storage;
  using T = typename Tile::T;
  constexpr int columns = Tile::columns;
  const int hidden = walk.hidden(), transformed = walk.transformed(), conditioning = walk.conditioning();
  const int column0 = tile * columns;
  const int64_t net_at = 2 * static_cast<int64_t>(step), rows = walk.sizes.batch - row0;
  const int64_t weight_size = static_cast<int64_t>(hidden) * transformed;
  const Storage *const a = walk.activation(step, walk.depth()) + row0 * hidden;
  const PanelTiles<Storage> first(walk.weights.weight_out + net_at * weight_size, hidden, transformed, column0);
  const PanelTiles<Storage> second(walk.weights.weight_out + (net_at + 1) * weight_size, hidden, transformed, column0);
  const bool wide = copies_wide(a, hidden) && copies_wide(a, walk.activation_net());
  const bool wide_w = first.wide && second.wide;
  const int steps = (hidden + Tile::depth - 1) / Tile::depth;
  const auto load = [&](int net, int part, Storage *a_tile, Storage *w_tile) {
    const int k = part * Tile::depth;
    if (w_tile != nullptr)
      load_tile<Tile::depth, columns, Tile::ldw, Tile::always_wide>(
          w_tile, (net ? second : first).data + static_cast<int64_t>(k) * first.width, first.width, hidden - k,
          first.valid, wide_w);
    if (a_tile != nullptr)
      load_tile<Tile::rows, Tile::depth, Tile::lda, Tile::always_wide>(a_tile, a + net * walk.activation_net() + k,
                                                                       hidden, rows, hidden - k, wide);
  };
  if (what == Do::fetch)
    return Tile::fetch(shared, steps, load);
  Tile::run(shared, steps, load, what == Do::rest);
  const Storage *const bias = walk.weights.bias_out + net_at * transformed;
  const StepEnd<Storage> end(walk, step, inverse);
  T *const parts = walk.parts == nullptr
                       ? nullptr
                       : walk.parts + (1 + static_cast<int64_t>(step) * walk.tiles + tile) * walk.sizes.batch;
  const int j = column0 + threadIdx.x % columns;
  const int inside = j < transformed ? j : 0; // nvcc reads ahead of the condition
  for (int at = threadIdx.x / columns; at < Tile::rows; at += tile_threads / columns) {
    const int64_t row = row0 + at;
    T gained = 0;
    if (at < rows && j < conditioning)
      gained = end.write(row, j, Tile::result(shared, 0, at, j - column0) + widen(__ldg(bias + inside)),
                         Tile::result(shared, 1, at, j - column0) + widen(__ldg(bias + transformed + inside)),
                         end.read(row, j));
    if (parts != nullptr) {
#pragma unroll
      for (int offset = columns / 2; offset > 0; offset /= 2)
        gained += __shfl_xor_sync(whole_warp, gained, offset);
      if (j == column0 && at < rows)
        parts[row] = gained;
    }
  }
}

template <class Storage>
__global__ void __launch_bounds__(tile_threads) flow_table_kernel(const FlowWalk<Storage> walk, const bool inverted) {
  fill_table(walk, inverted, static_cast<int64_t>(blockIdx.x) * tile_threads + threadIdx.x,
             static_cast<int64_t>(gridDim.x) * tile_threads);
}

// Six blocks on a multiprocessor: for one more, nvcc would put values aside on sm_80.
template <class Storage>
__global__ void __launch_bounds__(tile_threads, 6) flow_enter_kernel(const FlowWalk<Storage> walk, const bool inverse) {
  constexpr int warps = tile_threads / warp_lanes;
  enter_rows(walk, inverse, static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / warp_lanes,
             static_cast<int64_t>(gridDim.x) * warps);
}

template <class Precision, bool wide, bool first>
__global__ void __launch_bounds__(tile_threads, blocks_at_once<Precision>)
    flow_layer_kernel(const FlowWalk<typename Precision::Storage> walk, const int step, const int layer) {
  using Tile = LayerTile<Precision, wide>;
  layer_tile<Tile>(walk, shared_tiles(), first, step, layer, blockIdx.z, static_cast<int64_t>(blockIdx.x) * Tile::rows,
                   blockIdx.y * Tile::columns);
}

template <class Precision, bool wide>
__global__ void __launch_bounds__(tile_threads, blocks_at_once<Precision>)
    flow_last_layer_kernel(const FlowWalk<typename Precision::Storage> walk, const int step, const bool inverse) {
  using Tile = LastTile<Precision, wide>;
  last_tile<Tile>(walk, shared_tiles(), step, inverse, static_cast<int64_t>(blockIdx.x) * Tile::rows, blockIdx.y);
}

template <class Storage>
__global__ void __launch_bounds__(tile_threads) flow_finish_kernel(const FlowWalk<Storage> walk) {
  finish_rows(walk, shared_tiles(), static_cast<int64_t>(blockIdx.x) * tile_threads + threadIdx.x,
              static_cast<int64_t>(gridDim.x) * tile_threads);
}

// Rows up to which one kernel walks all layers, and its buffers: weights of a layer that are under way while
// the layer before ends. 90 KB, so that they fit GPUs of compute capability 8.6 and 8.9 too.
constexpr int64_t persistent_rows = 64;
constexpr int persistent_buffers = 6;
template <class P, bool even> using PersistentLayer = LayerTile<P, false, persistent_buffers, even>;
template <class P, bool even> using PersistentLast = LastTile<P, false, persistent_buffers, even>;
template <class P>
constexpr int persistent_bytes = PersistentLayer<P, true>::shared_bytes > PersistentLast<P, true>::shared_bytes
                                     ? PersistentLayer<P, true>::shared_bytes
                                     : PersistentLast<P, true>::shared_bytes;

// Whether all rows that the tiles copy begin at multiples of 16 bytes. The persistent kernels have code for such sizes
// alone, beside code for all, which is twice as long: every phase walks through it.
template <class Storage> bool is_even(const FlowWalk<Storage> &walk) {
  const int64_t vector = wide_vector<Storage>;
  const auto *const weights = &walk.weights;
  const auto at = reinterpret_cast<uintptr_t>(weights->weight_in) | reinterpret_cast<uintptr_t>(weights->weight_out) |
                  reinterpret_cast<uintptr_t>(weights->weight_hidden);
  return walk.hidden() % vector == 0 && walk.transformed() % vector == 0 && at % 16 == 0;
}

// Tiles of layer 0 … depth + 1 of both nets.
template <class Precision, bool even>
__device__ __forceinline__ int persistent_tiles(const FlowWalk<typename Precision::Storage> &walk, int layer) {
  using Layer = PersistentLayer<Precision, even>;
  const int row_tiles = static_cast<int>((walk.sizes.batch + Layer::rows - 1) / Layer::rows);
  return row_tiles *
         (layer == walk.depth() + 1 ? walk.tiles : 2 * ((walk.hidden() + Layer::columns - 1) / Layer::columns));
}

// One of them. `inverse`: the direction of the walk.
template <class Precision, bool even>
__device__ __forceinline__ void persistent_tile(const FlowWalk<typename Precision::Storage> &walk,
                                                unsigned char *shared, int step, int layer, bool inverse, int tile,
                                                Do what) {
  using Layer = PersistentLayer<Precision, even>;
  using Last = PersistentLast<Precision, even>;
  const int row_tiles = static_cast<int>((walk.sizes.batch + Layer::rows - 1) / Layer::rows);
  const int64_t row0 = static_cast<int64_t>(tile % row_tiles) * Layer::rows;
  tile /= row_tiles;
  if (layer == walk.depth() + 1)
    last_tile<Last>(walk, shared, step, inverse, row0, tile, what);
  else
    layer_tile<Layer>(walk, shared, layer == 0, step, layer, tile % 2, row0, tile / 2 * Layer::columns, what);
}

// Brings the weights of a layer of both nets to the L2 cache: this block has part `part` of `parts`.
template <class Storage>
__device__ __forceinline__ void prefetch_weights(const FlowWalk<Storage> &walk, int step, int layer, int part,
                                                 int parts) {
  const int64_t hidden = walk.hidden();
  const bool last = layer == walk.depth() + 1, first = layer == 0;
  const int64_t size = hidden * (first  ? walk.inside()
                                 : last ? walk.transformed()
                                        : hidden),
                line = 128 / sizeof(Storage);
  for (int net = 0; net < 2; ++net) {
    const int64_t net_at = 2 * static_cast<int64_t>(step) + net;
    const Storage *const from = first  ? walk.weights.weight_in + net_at * size
                                : last ? walk.weights.weight_out + net_at * size
                                       : walk.weights.weight_hidden + (net_at * walk.depth() + layer - 1) * size;
    for (int64_t at = (static_cast<int64_t>(part) * tile_threads + threadIdx.x) * line; at < size;
         at += static_cast<int64_t>(parts) * tile_threads * line)
      prefetch(from + at);
  }
}

// Phases whose tiles the blocks share, and after each of which they meet: part(phase, tile, what) for tiles(phase) of
// them, then other(phase, tile) for more(phase, tiles) that fetch nothing. A block fetches its first tile's weights
// while it waits for the others in front of a phase; a block without a tile has idle(next phase, which of these blocks
// it is, how many they are). part() is called in one place, for all tiles' code is compiled into it.
template <class Tiles, class More, class Part, class Other, class Idle>
__device__ __forceinline__ void share_phases(const cooperative_groups::grid_group &grid, int phases, Tiles &&tiles,
                                             More &&more, Part &&part, Other &&other, Idle &&idle) {
  const int mine = blockIdx.x, blocks = gridDim.x;
  for (int phase = -1; phase < phases; ++phase) {
    const int count = phase < 0 ? 0 : tiles(phase), all = phase < 0 ? 0 : count + more(phase, count);
    const bool goes_on = phase + 1 < phases && mine < tiles(phase + 1);
    const int rounds = mine < all ? (all - mine + blocks - 1) / blocks : 0;
    if (rounds == 0 && phase + 1 < phases)
      idle(phase + 1, mine - all, blocks - all);
    cooperative_groups::grid_group::arrival_token token = 0;
    for (int round = 0; round <= rounds; ++round) {
      const int tile = mine + round * blocks;
      const bool fetch = round == rounds;
      if (fetch) {
        token = grid.barrier_arrive(); // behind a barrier of the block; a fetch under way would hold it up
        if (!goes_on)
          break;
      }
      if (fetch || tile < count)
        part(fetch ? phase + 1 : phase, fetch ? mine : tile, fetch ? Do::fetch : round == 0 ? Do::rest : Do::all);
      else
        other(phase, tile - count);
      if (!fetch)
        __syncthreads(); // the result is read before new tiles come in its place
    }
    grid.barrier_wait(std::move(token));
  }
}

// The map in one launch of as many blocks as run at once.
template <class Precision, bool even>
__global__ void __launch_bounds__(tile_threads, 2)
    flow_persistent_kernel(const FlowWalk<typename Precision::Storage> walk) {
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  unsigned char *const shared = shared_tiles();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * tile_threads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * tile_threads;
  const int layers = walk.depth() + 2;
  fill_table(walk, !walk.inverse, thread, threads);
  if (walk.inverse)
    grid.sync(); // the first stage needs the table
  enter_rows(walk, walk.inverse, thread / warp_lanes, threads / warp_lanes);
  const auto step_of = [&](int phase) { return walk.inverse ? walk.steps() - 1 - phase / layers : phase / layers; };
  share_phases(
      grid, walk.steps() * layers, [&](int phase) { return persistent_tiles<Precision, even>(walk, phase % layers); },
      [](int, int) { return 0; },
      [&](int phase, int tile, Do what) {
        persistent_tile<Precision, even>(walk, shared, step_of(phase), phase % layers, walk.inverse, tile, what);
      },
      [](int, int) {},
      [&](int phase, int part, int parts) { prefetch_weights(walk, step_of(phase), phase % layers, part, parts); });
  finish_rows(walk, shared, thread, threads);
}

// Memory in pieces of 256 bytes. With base null it only counts.
struct Arena {
  unsigned char *base;
  int64_t used = 0;
  template <class T> T *take(int64_t count) {
    unsigned char *const piece = base == nullptr ? nullptr : base + used;
    used += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T *>(piece);
  }
};

// Up to this batch tiles are narrow.
constexpr int64_t narrow_rows = 128;

inline unsigned tiles_of(int64_t extent, int tile) { return static_cast<unsigned>((extent + tile - 1) / tile); }

// What is kept of all steps for backward, or used for one step at a time (every = false): iin_fast/ops/flow/saved.py.
template <class Storage> void arrange_steps(FlowWalk<Storage> &walk, Arena &arena) {
  using T = compute_t<Storage>;
  const int64_t batch = walk.sizes.batch, steps = walk.every ? walk.steps() : 1, pair = batch * walk.transformed();
  walk.stages = arena.take<T>((walk.every ? steps : 2) * batch * walk.sizes.dim);
  walk.s = arena.take<T>(walk.keep ? steps * pair : 0);
  walk.v = arena.take<T>(walk.keep_v ? steps * pair : 0);
  walk.activations = arena.take<Storage>(steps * 2 * walk.layers() * batch * walk.sizes.hidden);
}

constexpr int cluster_rows = 32; // of a tile of a cluster

// Blocks of a cluster: one for each 64 outputs of a hidden layer of each net.
inline int blocks_of_cluster(const FlowSizes &sizes) {
  return 2 * static_cast<int>(tiles_of(sizes.hidden, panel_width));
}

template <class Storage> void arrange_forward(FlowWalk<Storage> &walk, Arena &scratch) {
  const bool nets = walk.way == FlowWay::nets;
  const int64_t row_tiles = walk.way == FlowWay::clusters ? tiles_of(walk.sizes.batch, cluster_rows) : 0;
  walk.tiles = nets ? 1 : static_cast<int>(tiles_of(walk.conditioning(), walk.sizes.batch <= narrow_rows ? 16 : 32));
  walk.raw = scratch.take<compute_t<Storage>>(
      (nets ? 2 * walk.sizes.batch : row_tiles * cluster_rows * blocks_of_cluster(walk.sizes)) * walk.transformed());
  walk.parts =
      scratch.take<compute_t<Storage>>((1 + walk.steps() * static_cast<int64_t>(walk.tiles)) * walk.sizes.batch);
  walk.table = scratch.take<int>(walk.sizes.n_flows * walk.sizes.dim);
}

template <class Storage, class Launch>
void launch_table(const FlowWalk<Storage> &walk, bool inverted, const Launch &launch) {
  const unsigned blocks = tiles_of(walk.sizes.n_flows * walk.sizes.dim, tile_threads);
  launch(flow_table_kernel<Storage>, dim3(blocks < 1024 ? blocks : 1024), dim3(tile_threads), walk, inverted);
}

template <class Storage, class Launch>
void launch_enter(const FlowWalk<Storage> &walk, bool inverse, const Launch &launch) {
  launch(flow_enter_kernel<Storage>, dim3(tiles_of(walk.sizes.batch, tile_threads / warp_lanes)), dim3(tile_threads),
         walk, inverse);
}

template <class Storage, class Launch> void launch_finish(const FlowWalk<Storage> &walk, const Launch &launch) {
  launch.with_shared(tile_threads * sizeof(double))(
      flow_finish_kernel<Storage>, dim3(tiles_of(walk.sizes.batch, tile_threads)), dim3(tile_threads), walk);
}

// One step of a walk: all layers of both nets.
template <class Precision, bool wide, class Launch>
void launch_step(const FlowWalk<typename Precision::Storage> &walk, int step, bool inverse, const Launch &launch) {
  using One = LayerTile<Precision, wide>;
  using Both = LastTile<Precision, wide>;
  const int64_t batch = walk.sizes.batch;
  const dim3 grid(tiles_of(batch, One::rows), tiles_of(walk.sizes.hidden, One::columns), 2);
  const auto start = launch.with_shared(One::shared_bytes);
  start(flow_layer_kernel<Precision, wide, true>, grid, dim3(tile_threads), walk, step, 0);
  for (int layer = 1; layer <= walk.depth(); ++layer)
    start(flow_layer_kernel<Precision, wide, false>, grid, dim3(tile_threads), walk, step, layer);
  launch.with_shared(Both::shared_bytes)(flow_last_layer_kernel<Precision, wide>,
                                         dim3(tiles_of(batch, Both::rows), walk.tiles), dim3(tile_threads), walk, step,
                                         inverse);
}

template <class Precision, class Launch>
void launch_step(const FlowWalk<typename Precision::Storage> &walk, int step, bool inverse, const Launch &launch) {
  if (walk.sizes.batch <= narrow_rows)
    launch_step<Precision, false>(walk, step, inverse, launch);
  else
    launch_step<Precision, true>(walk, step, inverse, launch);
}

// The map. launch(kernel, grid, block, arguments...) starts a kernel, launch.with_shared(bytes)(...) one with dynamic
// shared memory, launch.together(bytes)(...) one whose blocks may meet, of which launch.blocks_together says how many
// run at once (0: none may); it gives false where the device refuses the launch, and nothing has run.
template <class Precision, class Launch>
void launch_flow_forward(const FlowWalk<typename Precision::Storage> &walk, const Launch &launch) {
  if (walk.sizes.batch == 0)
    return;
  if (walk.way != FlowWay::layers && walk.sizes.batch <= persistent_rows) {
    using Layer = PersistentLayer<Precision, true>;
    constexpr int bytes = persistent_bytes<Precision>;
    const int64_t row_tiles = tiles_of(walk.sizes.batch, Layer::rows);
    const int64_t columns = 2 * tiles_of(walk.sizes.hidden, Layer::columns);
    const int64_t tiles = row_tiles * (columns > walk.tiles ? columns : walk.tiles);
    const auto run = [&](auto kernel) { // those beyond one for each multiprocessor, or tile, would only meet
      const int64_t most = launch.blocks_together(kernel, tile_threads, bytes), enough = launch.multiprocessors();
      const int64_t wanted = tiles > enough ? tiles : enough, blocks = wanted < most ? wanted : most;
      return blocks > 0 &&
             launch.together(bytes)(kernel, dim3(static_cast<unsigned>(blocks)), dim3(tile_threads), walk);
    };
    if (is_even(walk) ? run(flow_persistent_kernel<Precision, true>) : run(flow_persistent_kernel<Precision, false>))
      return;
  }
  launch_table(walk, !walk.inverse, launch);
  launch_enter(walk, walk.inverse, launch);
  for (int i = 0; i < walk.steps(); ++i)
    launch_step<Precision>(walk, walk.inverse ? walk.steps() - 1 - i : i, walk.inverse, launch);
  launch_finish(walk, launch);
}

// f(Precision()) for a storage type; `tf32`: the user allows float32 products of TF32's precision.
template <class Storage, class F> void with_precision(bool tf32, F &&f) {
  if constexpr (std::is_same_v<Storage, double>)
    f(Exact());
  else if constexpr (std::is_same_v<Storage, float>) {
    if (tf32)
      f(Tf32());
    else
      f(Tf32x3());
  } else
    f(Bits16<Storage>());
}

} // namespace iin_fast
