// The flow's map on a GPU for wide nets and large batches: one launch for both nets of a half, one for its coupling.
//
// A block has a net and a tile of rows. It goes through all layers of the net with the activations in shared memory, in
// three slots of rows × 256 columns: the input of a layer lies in two, its result comes into the third and into the
// first half of the input. A layer is made in passes of 256 columns. Weights stream through a ring of stages of 8 KiB,
// by asynchronous copies, as one sequence over all layers: the ring never runs empty. Fragments of the next step are
// read while tensor cores multiply those of this one, so a stage is free again before it is multiplied.
//
// Rows lie without padding. Chunk c of 16 bytes of row r lies at chunk c ^ (r % 8) in activations and in weights of
// 16 bits, at c ^ (2 (r % 4)) in weights of float32: fragments are read without conflicts of banks.
//
// Bytes of a half: every weight once for each tile of rows, from the L2 cache, and the rows of a stage. Where backward
// follows, each activation once.
#pragma once

#include "flow/flow_kernels.cuh"

namespace iin_fast {

constexpr int nets_threads = 256, nets_warps = nets_threads / warp_lanes;
constexpr int nets_columns = 256; // of a slot, and of a pass
constexpr int nets_most = 2 * nets_columns;
constexpr int narrow_columns = 64;                      // of the pass of a last layer that has no more
constexpr int nets_stages = 4, nets_stage_bytes = 8192; // stages: a power of 2

// Nets as wide and batches as large as this run here.
constexpr int nets_hidden = 256;
constexpr int64_t nets_rows = 2048;

// Rows of a block at most; and half of them, where that takes less time.
template <class Precision> constexpr int large_rows = sizeof(typename Precision::Storage) == 2 ? 128 : 64;

template <class Precision, int rows>
constexpr int nets_bytes =
    3 * rows * nets_columns * static_cast<int>(sizeof(typename Precision::Storage)) + nets_stages * nets_stage_bytes;

// How the warps of a block share the result of a pass, `columns` of it, and what a stage holds of the weights.
template <class Precision_, int rows_, int columns_> struct NetsPass {
  using Precision = Precision_;
  using Storage = typename Precision::Storage;
  static constexpr int rows = rows_, columns = columns_;
  static constexpr bool wide = columns == nets_columns;
  static constexpr int row_warps = wide ? (rows > 64 ? 2 : 1) : (rows > 32 ? 4 : 2);
  static constexpr int row_tiles = rows / row_warps / 16;
  static constexpr int column_warps = nets_warps / row_warps, column_tiles = columns / column_warps / 8;
  static_assert(row_warps * row_tiles * 16 == rows && column_warps * column_tiles * 8 == columns, "whole tiles");
  static constexpr int chunks = columns / wide_vector<Storage>;                                // of a row of weights
  static constexpr int depth = nets_stage_bytes / columns / static_cast<int>(sizeof(Storage)); // of a stage
  static constexpr int stage_steps = depth / Precision::depth;
  static constexpr int turns = stage_steps < 2 ? 2 : stage_steps; // steps of a round of the loop
  static constexpr int round_depth = turns * Precision::depth;
  static __device__ __forceinline__ int stages_of(int inside) {
    return (inside + round_depth - 1) / round_depth * (turns / stage_steps);
  }
};

// Numbers of a warp that one step multiplies, as they lie.
template <class Pass> struct NetsFragments {
  uint32_t a[Pass::row_tiles][4], w[Pass::column_tiles][2];
};

// The weights of a net, stage by stage in the order in which layers need them. Each thread copies two chunks.
template <class Precision, int rows> struct NetsWeights {
  using Storage = typename Precision::Storage;
  using Wide = NetsPass<Precision, rows, nets_columns>;
  using Narrow = NetsPass<Precision, rows, narrow_columns>;

  const FlowWalk<Storage> &walk;
  const int64_t net_at;
  int layer = 0, pass = 0;
  const Storage *from; // what this thread copies first
  int target;          // where to, in a stage
  int apart;           // inputs between its two chunks
  int stride;          // elements from an input to the next
  int inside;          // inputs that are left, from that of the first chunk on; none for columns beyond the layer
  int left;            // stages of this pass

  __device__ __forceinline__ NetsWeights(const FlowWalk<Storage> &walk, int64_t net_at) : walk(walk), net_at(net_at) {
    enter();
  }

  __device__ __forceinline__ bool is_narrow() const {
    return layer > walk.depth() && walk.transformed() <= narrow_columns;
  }

  // To the first stage of a pass.
  __device__ __forceinline__ void enter() {
    const int hidden = walk.hidden(), outside = layer > walk.depth() ? walk.transformed() : hidden;
    inside = layer == 0 ? walk.inside() : hidden;
    const Storage *weight;
    if (layer == 0)
      weight = walk.weights.weight_in + net_at * inside * hidden;
    else if (layer <= walk.depth())
      weight = walk.weights.weight_hidden + (net_at * walk.depth() + layer - 1) * hidden * hidden;
    else
      weight = walk.weights.weight_out + net_at * hidden * outside;
    const int chunks = is_narrow() ? Narrow::chunks : Wide::chunks;
    left = is_narrow() ? Narrow::stages_of(inside) : Wide::stages_of(inside);
    const int chunk = threadIdx.x % chunks, k = threadIdx.x / chunks;
    const int column = pass * nets_columns + chunk * wide_vector<Storage>, start = column / panel_width * panel_width;
    apart = nets_threads / chunks;
    target = 16 * (k * chunks + (chunk ^ (sizeof(Storage) == 2 ? k % 8 : 2 * (k % 4))));
    stride = outside - start < panel_width ? outside - start : panel_width;
    from = weight;
    if (column < outside) {
      from += static_cast<int64_t>(start) * inside + column - start + k * stride;
      inside -= k;
    } else {
      inside = stride = 0;
    }
  }

  // Begins to copy the next stage, if there is one, and ends a group of copies.
  __device__ __forceinline__ void bring(unsigned char *stage) {
    if (layer < walk.depth() + 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        copy_async_16(stage + target + i * (nets_stage_bytes / 2), from + static_cast<int64_t>(i * apart) * stride,
                      i * apart < inside ? 16 : 0); // where nothing is copied, the address is not used
      inside -= 2 * apart;
      from += static_cast<int64_t>(2 * apart) * stride;
      if (--left == 0) {
        const bool more = layer <= walk.depth() && (pass + 1) * nets_columns < walk.hidden();
        const bool more_last = layer > walk.depth() && (pass + 1) * nets_columns < walk.transformed();
        pass = more || more_last ? pass + 1 : 0;
        layer += pass == 0;
        if (layer < walk.depth() + 2)
          enter();
      }
    }
    commit_copies();
  }
};

// The place of a chunk in a slot, in bytes.
template <class Storage> __device__ __forceinline__ int slot_at(int row, int chunk) {
  return row * nets_columns * static_cast<int>(sizeof(Storage)) + 16 * (chunk ^ (row % 8));
}

__device__ __forceinline__ float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The weights of fragments as factors of tensor cores.
template <class Pass> __device__ __forceinline__ auto right_factors(const NetsFragments<Pass> &f) {
  using Precision = typename Pass::Precision;
  constexpr bool tf32 = sizeof(typename Pass::Storage) == 4;
  struct Factors {
    std::conditional_t<tf32, Tf32Parts, uint32_t> of[Pass::column_tiles][2];
  } right;
#pragma unroll
  for (int j = 0; j < Pass::column_tiles; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if constexpr (tf32)
        right.of[j][e] = tf32_parts<std::is_same_v<Precision, Tf32x3>>(as_float(f.w[j][e]));
      else
        right.of[j][e] = f.w[j][e];
  return right;
}

// sum[i] += the products of row tiles `from` to `to`, over one step of the depth.
template <class Pass, int from, int to, int tiles, class Factors>
__device__ __forceinline__ void multiply_rows(float (&sum)[tiles][Pass::column_tiles][4], const NetsFragments<Pass> &f,
                                              const Factors &right) {
  using Precision = typename Pass::Precision;
#pragma unroll
  for (int i = from; i < to; ++i)
    if constexpr (sizeof(typename Pass::Storage) == 4) {
      constexpr bool split = std::is_same_v<Precision, Tf32x3>;
      Tf32Parts left[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        left[e] = split ? tf32_parts<split>(as_float(f.a[i][e])) : Tf32Parts{f.a[i][e], 0}; // rounded already
      multiply_tf32<split>(sum[i], left, right.of);
    } else {
#pragma unroll
      for (int j = 0; j < Pass::column_tiles; ++j)
        if constexpr (std::is_same_v<typename Pass::Storage, __half>)
          mma_f16(sum[i][j], f.a[i], right.of[j]);
        else
          mma_bf16(sum[i][j], f.a[i], right.of[j]);
    }
}

// A pass: sum = the input in two slots, `inside` columns of it, times the weights of the stages that come. `stage`: the
// first of them, which has arrived; afterwards the one behind them, which has arrived too, and all reading has ended.
// A warp whose columns lie beyond the layer, `works` false, only helps to copy. at_a: this lane's row in a slot;
// at_w[]: its chunks in a stage.
template <class Pass, class Weights>
__device__ __forceinline__ void run_pass(float (&sum)[Pass::row_tiles][Pass::column_tiles][4],
                                         const unsigned char *first, const unsigned char *second, unsigned char *ring,
                                         int &stage, Weights &weights, int inside, bool works, int row0, int column0) {
  using Precision = typename Pass::Precision;
  using Storage = typename Pass::Storage;
  constexpr int size = sizeof(Storage), slot_steps = nets_columns / Precision::depth;
  constexpr int row_bytes = nets_columns * size, stage_row = Pass::columns * size;
  constexpr int step_bytes = Precision::depth * stage_row;
  const int lane = threadIdx.x % warp_lanes, steps = (inside + Pass::round_depth - 1) / Pass::round_depth * Pass::turns;
  const int a_row = (row0 + lane % 16) * row_bytes, a_chunk = 16 * (lane / 16 ^ lane % 8);
  constexpr int w_reads = size == 2 ? Pass::column_tiles / 2 : Pass::column_tiles;
  int w_at[w_reads];
#pragma unroll
  for (int j = 0; j < w_reads; ++j)
    if constexpr (size == 2)
      w_at[j] = lane % 16 * stage_row + 16 * ((column0 / 8 + 2 * j + lane / 16) ^ lane % 8);
    else
      w_at[j] = lane % 4 * stage_row + 16 * ((column0 / 4 + 2 * j + lane / 16) ^ 2 * (lane % 4)) + 4 * (lane / 4 % 4);
  NetsFragments<Pass> fragments[2];
  // of step `step`, which is number `part` of the stage
  const auto load = [&](NetsFragments<Pass> &to, int step, int part) {
    const int in_slot = step % slot_steps;
    const unsigned char *const a = (step < slot_steps ? first : second) + a_row + (32 * in_slot ^ a_chunk);
#pragma unroll
    for (int i = 0; i < Pass::row_tiles; ++i)
      load_matrices(to.a[i], a + 16 * i * row_bytes);
    const unsigned char *const w = ring + stage * nets_stage_bytes + part * step_bytes;
#pragma unroll
    for (int j = 0; j < w_reads; ++j)
      if constexpr (size == 2) {
        uint32_t r[4];
        load_matrices_turned(r, w + w_at[j]);
        to.w[2 * j][0] = r[0], to.w[2 * j][1] = r[1], to.w[2 * j + 1][0] = r[2], to.w[2 * j + 1][1] = r[3];
      } else {
        to.w[j][0] = *reinterpret_cast<const uint32_t *>(w + w_at[j]);
        to.w[j][1] = *reinterpret_cast<const uint32_t *>(w + w_at[j] + 4 * stage_row);
      }
  };
  constexpr int part_tiles = sums_leave<Precision> ? Pass::row_tiles : 1;
  float part[part_tiles][Pass::column_tiles][4] = {};
  auto &to = *[&] {
    if constexpr (sums_leave<Precision>)
      return &part;
    else
      return &sum;
  }();
  if (works)
    load(fragments[0], 0, 0);
  for (int step = 0; step < steps; step += Pass::turns) {
#pragma unroll
    for (int turn = 0; turn < Pass::turns; ++turn) {
      const int next = (turn + 1) % Pass::stage_steps;
      const NetsFragments<Pass> &now = fragments[turn % 2];
      unsigned char *const read = ring + stage * nets_stage_bytes;
      if (next == 0) { // this thread has read all of the stage
        wait_copies<nets_stages - 2>();
        __syncthreads(); // so have the others, and the next stage has arrived
        stage = (stage + 1) & (nets_stages - 1);
      }
      // what is under way while tensor cores multiply comes between their instructions
      const auto right = right_factors(now);
      constexpr int half = Pass::row_tiles / 2;
      if (works)
        multiply_rows<Pass, 0, half>(to, now, right);
      if (next == 0)
        weights.bring(read);
      if (works) {
        if (turn + 1 < Pass::turns || step + Pass::turns < steps)
          load(fragments[(turn + 1) % 2], step + turn + 1, next);
        multiply_rows<Pass, half, Pass::row_tiles>(to, now, right);
      }
    }
    if constexpr (sums_leave<Precision>) {
      constexpr int most = 64 / Precision::depth;
      static_assert(most % Pass::turns == 0, "tensor cores cut sums");
      if ((step + Pass::turns) % most == 0 || step + Pass::turns == steps) {
#pragma unroll
        for (int i = 0; i < Pass::row_tiles; ++i)
#pragma unroll
          for (int j = 0; j < Pass::column_tiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              sum[i][j][e] += part[i][j][e], part[i][j][e] = 0;
      }
    }
  }
}

// Two numbers side by side.
template <class Storage> __device__ __forceinline__ void store_pair(unsigned char *to, float left, float right) {
  using Bits = std::conditional_t<sizeof(Storage) == 2, uint32_t, uint2>;
  Storage pair[2];
  narrow(left, pair[0]), narrow(right, pair[1]);
  Bits bits;
  memcpy(&bits, pair, sizeof bits);
  *reinterpret_cast<Bits *>(to) = bits;
}

// What tensor cores take of an activation: TF32 is rounded once, when it is stored.
template <class Precision> __device__ __forceinline__ float as_factor(float value) {
  if constexpr (std::is_same_v<Precision, Tf32>)
    return as_float(to_tf32(value));
  return value;
}

// A pass of a layer, and what becomes of its sums: finish(row, column, sum of this column, sum of the next), rows of
// the tile and columns of the layer, for all of the pass.
template <class Pass, class Weights, class Finish>
__device__ __forceinline__ void nets_pass(const unsigned char *first, const unsigned char *second, unsigned char *ring,
                                          int &stage, Weights &weights, int inside, int pass, int outside,
                                          Finish &&finish) {
  const int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
  // neighbours have the same columns: where half of these lie beyond the layer, each scheduler has warps that work
  const int row0 = warp % Pass::row_warps * Pass::row_tiles * 16;
  const int column0 = warp / Pass::row_warps * Pass::column_tiles * 8, shift = pass * Pass::columns;
  float sum[Pass::row_tiles][Pass::column_tiles][4] = {};
  run_pass<Pass>(sum, first, second, ring, stage, weights, inside, shift + column0 < outside, row0, column0);
#pragma unroll
  for (int j = 0; j < Pass::column_tiles; ++j)
    finish(row0 + lane / 4, shift + column0 + 8 * j + lane % 4 * 2,
           [&](int i, int e) { return sum[i / 2][j][i % 2 * 2 + e]; });
}

// Both nets of a half: what they make of the stage of `step` comes to walk.raw, and the activations to where backward
// reads them.
template <class Precision, int rows>
__global__ void __launch_bounds__(nets_threads, 1)
    flow_nets_kernel(const FlowWalk<typename Precision::Storage> walk, const int step) {
  using Storage = typename Precision::Storage;
  using Weights = NetsWeights<Precision, rows>;
  using Wide = typename Weights::Wide;
  using Narrow = typename Weights::Narrow;
  constexpr int vector = wide_vector<Storage>, slot_chunks = nets_columns / vector;
  constexpr int slot_bytes = rows * nets_columns * static_cast<int>(sizeof(Storage));
  unsigned char *const shared = shared_tiles(), *const ring = shared + 3 * slot_bytes;
  const int net = blockIdx.y, hidden = walk.hidden(), transformed = walk.transformed();
  const int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
  const int64_t net_at = 2 * static_cast<int64_t>(step) + net, row0 = static_cast<int64_t>(blockIdx.x) * rows;
  const int valid = walk.sizes.batch - row0 < rows ? static_cast<int>(walk.sizes.batch - row0) : rows;
  Weights weights(walk, net_at);
#pragma unroll 1
  for (int i = 0; i < nets_stages; ++i)
    weights.bring(ring + i * nets_stage_bytes);
  unsigned char *first = shared, *second = shared + slot_bytes, *free = shared + 2 * slot_bytes;
  {
    const int conditioning = walk.conditioning(), inside = walk.inside();
    const int filled = (inside + Wide::round_depth - 1) / Wide::round_depth * Wide::round_depth;
    const float *const from = walk.stage(step) + row0 * walk.dim();
    const Storage *const context =
        walk.context_dim() > 0 ? walk.context_of(step / 2) + row0 * walk.context_dim() : nullptr;
    for (int column = lane; column < filled; column += warp_lanes)
#pragma unroll 4
      for (int row = warp; row < rows; row += nets_warps) {
        float value = 0;
        if (row < valid && column < conditioning)
          value = from[static_cast<int64_t>(row) * walk.dim() + column];
        else if (row < valid && column < inside)
          value = widen(context[static_cast<int64_t>(row) * walk.context_dim() + column - conditioning]);
        const int at = column % nets_columns;
        Storage *const to =
            reinterpret_cast<Storage *>((column < nets_columns ? first : second) + slot_at<Storage>(row, at / vector));
        narrow(as_factor<Precision>(value), to[at % vector]);
      }
  }
  wait_copies<nets_stages - 1>();
  __syncthreads();
  int stage = 0, inside = walk.inside();
  const float leaky = static_cast<float>(walk.leaky_slope);
  for (int layer = 0; layer <= walk.depth(); ++layer) {
    const Storage *const bias = layer == 0 ? walk.weights.bias_in + net_at * hidden
                                           : walk.weights.bias_hidden + (net_at * walk.depth() + layer - 1) * hidden;
    for (int pass = 0; pass * nets_columns < hidden; ++pass) {
      unsigned char *const to = pass == 0 ? free : first;
      nets_pass<Wide>(first, second, ring, stage, weights, inside, pass, hidden, [&](int row, int column, auto &&sum) {
        const bool there = column < hidden; // hidden is even
        const int at = there ? column : 0;
        const float left = widen(__ldg(bias + at)), right = widen(__ldg(bias + at + 1));
        const auto activate = [&](float value) {
          return there ? as_factor<Precision>(value > 0 ? value : value * leaky) : 0.0f;
        };
        const int in_slot = column % nets_columns;
#pragma unroll
        for (int i = 0; i < 2 * Wide::row_tiles; ++i)
          store_pair<Storage>(to + slot_at<Storage>(row + 8 * i, in_slot / vector) +
                                  in_slot % vector * static_cast<int>(sizeof(Storage)),
                              activate(sum(i, 0) + left), activate(sum(i, 1) + right));
      });
    }
    unsigned char *const unused = second;
    second = first, first = free, free = unused;
    inside = hidden;
    __syncthreads();
    if (walk.keep) { // the next layer reads these slots, too, and what it writes first comes to the third
      Storage *const out = walk.activation(step, layer) + net * walk.activation_net() + row0 * hidden;
      for (int chunk = lane; chunk < hidden / vector; chunk += warp_lanes)
#pragma unroll 4
        for (int row = warp; row < valid; row += nets_warps) {
          const unsigned char *const at =
              (chunk < slot_chunks ? first : second) + slot_at<Storage>(row, chunk % slot_chunks);
          __stwb(reinterpret_cast<uint4 *>(out + static_cast<int64_t>(row) * hidden + chunk * vector),
                 *reinterpret_cast<const uint4 *>(at));
        }
    }
  }
  const Storage *const bias = walk.weights.bias_out + net_at * transformed;
  float *const out = walk.raw + (net * walk.sizes.batch + row0) * transformed;
  const auto store = [&](auto shape, int row, int column, auto &&sum) {
    if (column >= transformed) // which is even
      return;
    const float left = widen(__ldg(bias + column)), right = widen(__ldg(bias + column + 1));
#pragma unroll
    for (int i = 0; i < 2 * decltype(shape)::row_tiles; ++i)
      if (row + 8 * i < valid)
        store_pair<float>(
            reinterpret_cast<unsigned char *>(out + static_cast<int64_t>(row + 8 * i) * transformed + column),
            sum(i, 0) + left, sum(i, 1) + right);
  };
  if (transformed <= narrow_columns)
    nets_pass<Narrow>(first, second, ring, stage, weights, inside, 0, transformed,
                      [&](int row, int column, auto &&sum) { store(Narrow(), row, column, sum); });
  else
    for (int pass = 0; pass * nets_columns < transformed; ++pass)
      nets_pass<Wide>(first, second, ring, stage, weights, inside, pass, transformed,
                      [&](int row, int column, auto &&sum) { store(Wide(), row, column, sum); });
}

// The coupling of a step from what its nets made, log-det, and the transition to the next stage: a warp a row.
template <class Storage>
__global__ void __launch_bounds__(tile_threads) flow_couple_kernel(const FlowWalk<Storage> walk, const int step) {
  using T = compute_t<Storage>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (tile_threads / warp_lanes) + threadIdx.x / warp_lanes;
  if (row >= walk.sizes.batch)
    return;
  const StepEnd<Storage> end(walk, step, walk.inverse);
  const T *const raw = walk.raw + row * walk.transformed();
  const T *const shift = raw + walk.sizes.batch * walk.transformed();
  CompensatedSum<T> sum;
  for (int j = threadIdx.x % warp_lanes; j < walk.conditioning(); j += warp_lanes) {
    if (j < walk.transformed())
      sum.add(end.couple(row, j, raw[j], shift[j]));
    if (end.goes_on())
      sum.add(end.pass_on(row, j));
  }
  T gained = sum.total();
  for (int offset = warp_lanes / 2; offset > 0; offset /= 2)
    gained += __shfl_xor_sync(whole_warp, gained, offset);
  if (threadIdx.x % warp_lanes == 0 && walk.parts != nullptr)
    walk.parts[(1 + static_cast<int64_t>(step)) * walk.sizes.batch + row] = gained;
}

// Whether nets fit the kernel: their widths the slots, and all weights copies of 16 bytes.
template <class Storage> bool nets_fit(const FlowWalk<Storage> &walk) {
  return sizeof(Storage) < 8 && walk.hidden() <= nets_most && walk.inside() <= nets_most && is_even(walk);
}

// Gives `walk` its way: before memory is arranged for it.
template <class Precision, class Launch>
void choose_way(FlowWalk<typename Precision::Storage> &walk, const Launch &launch) {
  if constexpr (!std::is_same_v<Precision, Exact>) {
    const bool fit = nets_fit(walk);
    if (walk.way == FlowWay::best && fit && walk.hidden() >= nets_hidden && walk.sizes.batch >= nets_rows &&
        launch.shared_room() >= nets_bytes<Precision, large_rows<Precision>>)
      walk.way = FlowWay::nets;
    if (fit)
      return;
  }
  if (walk.way == FlowWay::nets)
    walk.way = FlowWay::best;
}

template <class Precision, int rows, class Launch>
void launch_flow_nets(const FlowWalk<typename Precision::Storage> &walk, const Launch &launch) {
  using Storage = typename Precision::Storage;
  launch_table(walk, !walk.inverse, launch);
  launch_enter(walk, walk.inverse, launch);
  for (int i = 0; i < walk.steps(); ++i) {
    const int step = walk.inverse ? walk.steps() - 1 - i : i;
    launch.with_shared(nets_bytes<Precision, rows>)(
        flow_nets_kernel<Precision, rows>, dim3(tiles_of(walk.sizes.batch, rows), 2), dim3(nets_threads), walk, step);
    launch(flow_couple_kernel<Storage>, dim3(tiles_of(walk.sizes.batch, tile_threads / warp_lanes)), dim3(tile_threads),
           walk, step);
  }
  launch_finish(walk, launch);
}

// The map, in the way that choose_way() gave.
template <class Precision, class Launch>
void launch_flow(const FlowWalk<typename Precision::Storage> &walk, const Launch &launch) {
  if constexpr (!std::is_same_v<Precision, Exact>) {
    constexpr int rows = large_rows<Precision>;
    if (walk.way == FlowWay::nets && walk.sizes.batch > 0) {
      // A multiprocessor runs one block, and one of half the rows takes about half the time.
      const int64_t at_once = launch.multiprocessors() > 0 ? launch.multiprocessors() : 1;
      const auto rounds = [&](int size) { return (2 * tiles_of(walk.sizes.batch, size) + at_once - 1) / at_once; };
      if (2 * rounds(rows) <= rounds(rows / 2))
        launch_flow_nets<Precision, rows>(walk, launch);
      else
        launch_flow_nets<Precision, rows / 2>(walk, launch);
      return;
    }
  }
  launch_flow_forward<Precision>(walk, launch);
}

} // namespace iin_fast
