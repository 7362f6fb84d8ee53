// The backward of the flow on a GPU, both directions: one kernel for each layer of both nets, or one for all
// (persistent). Terms: flow_kernels.cuh; what a kernel does with a tile: flow_backward_tiles.cuh.
//
// Launches: 2 n (depth + 2) + 3, and 2 or 3 for the weights of each group of steps, whose gradients of activations wait
// for them (pending_bytes); where nothing was saved, the nets again. Bytes: weights once for every `rows` of a tile,
// read through tiles that lie turned in shared memory; activations and their gradients twice; weight gradients written
// once. Sums over rows are kept for each tile of rows and added in order: results repeat bit for bit.
//
// The persistent kernel (up to persistent_rows rows) walks the same tiles in one launch, with a barrier over the grid
// after each layer. A layer's gradients of activations are fewer tiles than the GPU has blocks [64 for each 32 rows at
// the published size], so the other blocks compute gradients of weights meanwhile, from what earlier layers left: those
// of a step are done with it, and memory for one step is used, which the L2 cache keeps.
#pragma once

#include "flow/flow_backward_tiles.cuh"

namespace iin_fast {

constexpr int64_t pending_bytes = 64 << 20;

// A block has a tile of rows, a thread a column of it.
template <class Storage>
__global__ void __launch_bounds__(tile_threads, 4)
    flow_enter_backward_kernel(const FlowBackwardWalk<Storage> back, const int rows) {
  const int column = blockIdx.y * tile_threads + threadIdx.x;
  if (column < back.walk.dim())
    enter_backward_column(back, blockIdx.x, rows, column);
}

template <class Precision, bool wide, bool last>
__global__ void __launch_bounds__(tile_threads, blocks_at_once<Precision>)
    flow_layer_backward_kernel(const FlowBackwardWalk<typename Precision::Storage> back, const int step,
                               const int layer, const int walked) {
  using Tile = BackTile<Precision, wide>;
  backward_tile<Tile>(back, shared_tiles(), last ? Layers::last : Layers::hidden, step, layer, walked, blockIdx.z,
                      blockIdx.x, blockIdx.y * Tile::columns);
}

template <class Precision, bool wide>
__global__ void __launch_bounds__(tile_threads, blocks_at_once<Precision>)
    flow_first_backward_kernel(const FlowBackwardWalk<typename Precision::Storage> back, const int step,
                               const int walked) {
  using Tile = FirstBackTile<Precision, wide>;
  backward_tile<Tile>(back, shared_tiles(), Layers::first, step, -1, walked, 0, blockIdx.x, blockIdx.y * Tile::columns);
}

// All layers of a kind, of steps first_step ... blockIdx.z: (step, layer, net).
template <class Precision, bool first>
__global__ void __launch_bounds__(tile_threads, blocks_at_once<Precision>)
    flow_weight_gradient_kernel(const FlowBackwardWalk<typename Precision::Storage> back, const int first_step,
                                const Layers kind) {
  using Tile = OuterTile<Precision>;
  const int layers = kind == Layers::hidden ? back.walk.depth() : 1;
  const Layers known = first ? Layers::first : kind == Layers::hidden ? Layers::hidden : Layers::last;
  weight_gradient_tile<Precision, false>(back, shared_tiles(), known, first_step + blockIdx.z / 2 / layers,
                                         blockIdx.z / 2 % layers, blockIdx.z % 2, blockIdx.x * Tile::rows,
                                         blockIdx.y * Tile::columns);
}

template <class Storage>
__global__ void __launch_bounds__(tile_threads) flow_finish_backward_kernel(const FlowBackwardWalk<Storage> back) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * tile_threads + threadIdx.x;
  if (at < back.walk.sizes.n_flows * back.walk.dim())
    finish_backward_column(back, at);
}

// Sums in the type of the result, for 16-bit types.
template <class Storage>
__global__ void __launch_bounds__(tile_threads)
    flow_narrow_kernel(const compute_t<Storage> *from, Storage *to, const int64_t count) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * tile_threads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * tile_threads + threadIdx.x; at < count; at += threads)
    narrow(from[at], to[at]);
}

// The persistent kernel's buffers hold as many bytes of weights that are on their way as the forward's: a tile of the
// depth ends with its panel, so 16-bit ones are half as long. With 77 KiB two blocks fit a multiprocessor of 164 KiB.
template <class P, bool even>
using PersistentBack = BackTile<P, false, sizeof(typename P::Storage) == 2 ? 10 : persistent_buffers, even>;
// `again`: the map is walked again, for nothing was saved.
template <class P> constexpr int persistent_backward_bytes(bool again) {
  constexpr int back = PersistentBack<P, true>::shared_bytes, outer = OuterTile<P>::shared_bytes;
  constexpr int most = back > outer ? back : outer;
  return again && persistent_bytes<P> > most ? persistent_bytes<P> : most;
}

// Tiles of gradients of weights of a step, in the order in which they can be computed: of the last layers, the hidden
// ones from the last to the first, the first layers.
template <class Precision> struct WeightTiles {
  using Tile = OuterTile<Precision>;
  int inside, hidden, transformed, depth; // in tiles; depth in layers
  __host__ __device__ explicit WeightTiles(const FlowWalk<typename Precision::Storage> &walk)
      : inside((walk.inside() + Tile::rows - 1) / Tile::rows), hidden((walk.hidden() + Tile::rows - 1) / Tile::rows),
        transformed((walk.transformed() + Tile::columns - 1) / Tile::columns), depth(walk.depth()) {
    static_assert(Tile::rows == Tile::columns, "hidden counts both");
  }
  // Of `layers` layers, at least one.
  __host__ __device__ int count(int layers) const {
    const int between = layers - 1 < depth ? layers - 1 : depth;
    return 2 * hidden * (transformed + between * hidden + (layers > depth + 1 ? inside : 0));
  }
};

template <class Precision, bool even>
__device__ __forceinline__ void weight_gradient_of(const FlowBackwardWalk<typename Precision::Storage> &back,
                                                   unsigned char *shared, int step, int tile) {
  using Tile = OuterTile<Precision>;
  const WeightTiles<Precision> tiles(back.walk);
  const int last = tiles.count(1), all_but_first = tiles.count(tiles.depth + 1);
  const Layers kind = tile < last ? Layers::last : tile < all_but_first ? Layers::hidden : Layers::first;
  const int of_layer = 2 * tiles.hidden * tiles.hidden, inputs = kind == Layers::first ? tiles.inside : tiles.hidden;
  const int after = kind == Layers::hidden ? (tile - last) / of_layer : 0; // hidden layers between it and the last one
  const int at = tile - (kind == Layers::last ? 0 : kind == Layers::hidden ? last + after * of_layer : all_but_first);
  weight_gradient_tile<Precision, even>(back, shared, kind, step, tiles.depth - 1 - after, at % 2,
                                        at / 2 % inputs * Tile::rows, at / 2 / inputs * Tile::columns);
}

// Phases of a step: where nothing was saved, the layers of the map; then the layers from the last to the first.
template <class Precision, bool even>
__global__ void __launch_bounds__(tile_threads, 2)
    flow_persistent_backward_kernel(const FlowBackwardWalk<typename Precision::Storage> back) {
  using Tile = PersistentBack<Precision, even>;
  const FlowWalk<typename Precision::Storage> &walk = back.walk;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  unsigned char *const shared = shared_tiles();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * tile_threads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * tile_threads;
  const int layers = walk.depth() + 2, again = walk.every ? 0 : layers;
  const int phases_of_step = again + layers;
  fill_table(walk, walk.inverse, thread, threads);
  if (!walk.inverse)
    grid.sync();                                  // the first gradient, and the first stage, need the table
  const int rows = walk.inverse ? Tile::rows : 1; // of a sum, or for none
  const int64_t entering = (walk.sizes.batch + rows - 1) / rows * walk.dim();
  for (int64_t at = thread; at < entering; at += threads)
    enter_backward_column(back, at / walk.dim(), rows, static_cast<int>(at % walk.dim()));
  if (!walk.every)
    enter_rows(walk, !walk.inverse, thread / warp_lanes, threads / warp_lanes);
  const auto layer_of = [&](int phase) { return phase % phases_of_step - again; }; // from the last; -layers … -1: again
  int computed = 0, computing = 0; // tiles of gradients of weights of a step: before this phase, and in it
  share_phases(
      grid, walk.steps() * phases_of_step,
      [&](int phase) {
        const int layer = layer_of(phase);
        if (layer < 0)
          return persistent_tiles<Precision, even>(walk, layer + again);
        const int inputs = layer == layers - 1 ? walk.inside() : walk.hidden(); // the first layers' sum is of both nets
        return back.row_tiles * (layer == layers - 1 ? 1 : 2) * ((inputs + Tile::columns - 1) / Tile::columns);
      },
      [&](int phase, int tiles) {
        const int layer = layer_of(phase), blocks = gridDim.x, idle = (blocks - tiles % blocks) % blocks;
        computed = layer <= 0 ? 0 : computed + computing;
        const int waiting = layer <= 0 || back.grads.weight_in == nullptr
                                ? 0
                                : WeightTiles<Precision>(walk).count(layer + 1) - computed;
        computing = layer == layers - 1 || waiting < idle ? waiting : idle;
        return computing;
      },
      [&](int phase, int tile, Do what) {
        const int walked = phase / phases_of_step, layer = layer_of(phase), step = back.step_of(walked);
        if (layer < 0)
          return persistent_tile<Precision, even>(walk, shared, step, layer + again, !walk.inverse, tile, what);
        const int nets = layer == layers - 1 ? 1 : 2, column = tile / back.row_tiles;
        const Layers kind = layer == 0 ? Layers::last : nets == 2 ? Layers::hidden : Layers::first;
        backward_tile<Tile>(back, shared, kind, step, walk.depth() - layer, walked, column % nets,
                            tile % back.row_tiles, column / nets * Tile::columns, what);
      },
      [&](int phase, int tile) {
        weight_gradient_of<Precision, even>(back, shared, back.step_of(phase / phases_of_step), computed + tile);
      },
      [](int, int, int) {});
  for (int64_t at = thread; at < walk.sizes.n_flows * walk.dim(); at += threads)
    finish_backward_column(back, at);
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
  if (walk.sizes.batch <= persistent_rows) {
    using Tile = PersistentBack<Precision, true>;
    const int bytes = persistent_backward_bytes<Precision>(!walk.every);
    const int64_t hidden = 2 * tiles_of(walk.hidden(), Tile::columns), inside = tiles_of(walk.inside(), Tile::columns);
    const int64_t weights = back.grads.weight_in == nullptr ? 0 : WeightTiles<Precision>(walk).count(walk.depth() + 2);
    const int64_t tiles = back.row_tiles * (hidden > inside ? hidden : inside) + weights; // more blocks would only meet
    FlowBackwardWalk<Storage> one = back;
    one.group = 1;
    const auto run = [&](auto kernel) {
      const int64_t most = launch.blocks_together(kernel, tile_threads, bytes), blocks = tiles < most ? tiles : most;
      return blocks > 0 && launch.together(bytes)(kernel, dim3(static_cast<unsigned>(blocks)), dim3(tile_threads), one);
    };
    if (is_even(walk) ? run(flow_persistent_backward_kernel<Precision, true>)
                      : run(flow_persistent_backward_kernel<Precision, false>))
      return;
  }
  launch_table(walk, walk.inverse, launch);
  launch(flow_enter_backward_kernel<Storage>, dim3(back.row_tiles, tiles_of(walk.dim(), tile_threads)),
         dim3(tile_threads), back, narrow ? 32 : 64);
  if (!walk.every)
    launch_enter(walk, !walk.inverse, launch);
  for (int walked = 0; walked < steps; ++walked) {
    const int step = back.step_of(walked);
    if (!walk.every) // the map the other way round, a step at a time
      launch_step<Precision>(walk, step, !walk.inverse, launch);
    if (narrow)
      launch_backward_step<Precision, false>(back, step, walked, launch);
    else
      launch_backward_step<Precision, true>(back, step, walked, launch);
    const int first = step / back.group * back.group;
    if (back.grads.weight_in != nullptr &&
        (walked == steps - 1 || back.step_of(walked + 1) / back.group != step / back.group))
      launch_weight_gradients<Precision>(back, first, first + back.group < steps ? back.group : steps - first, launch);
  }
  launch(flow_finish_backward_kernel<Storage>, dim3(tiles_of(walk.sizes.n_flows * walk.sizes.dim, tile_threads)),
         dim3(tile_threads), back);
}

} // namespace iin_fast
