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

constexpr int log_nets_threads = 8, nets_threads = 1 << log_nets_threads, nets_warps = nets_threads / warp_lanes;
constexpr int nets_columns = 256; // of a slot, and of a pass
constexpr int nets_most = 2 * nets_columns;
constexpr int narrow_columns = 64;                      // of the pass of a last layer that has no more
constexpr int nets_stages = 4, nets_stage_bytes = 8192; // stages: a power of 2
constexpr int nets_biases = 3;                          // passes whose biases are there or on their way
template <class Storage> constexpr int nets_bias_bytes = nets_columns * static_cast<int>(sizeof(Storage));

// Rows of a block at most; and half of them, where that takes less time.
template <class Precision> constexpr int large_rows = sizeof(typename Precision::Storage) == 2 ? 128 : 64;

template <class Precision, int rows>
constexpr int nets_bytes =
    (3 * rows + nets_biases) * nets_bias_bytes<typename Precision::Storage> + nets_stages * nets_stage_bytes;

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
  static constexpr int log_chunks = (wide ? 5 : 3) + (sizeof(Storage) == 4),
                       chunks = 1 << log_chunks;                                               // of a row of weights
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

// The weights of a net, stage by stage in the order in which layers need them, and the biases of each pass ahead of its
// first stage. Each thread copies two chunks of a stage.
template <class Precision, int rows> struct NetsWeights {
  using Storage = typename Precision::Storage;
  using Wide = NetsPass<Precision, rows, nets_columns>;
  using Narrow = NetsPass<Precision, rows, narrow_columns>;

  const FlowWalk<Storage> &walk;
  unsigned char *const biases;
  const int net;             // of all nets
  int layer = 0, column = 0; // of the pass
  int place = 0;             // of the next biases
  const Storage *from;       // what this thread copies next
  int apart;                 // elements from there to what it copies then
  int target;                // where to, in a stage
  int chunks;                // that this thread has still to copy in this pass; beyond, it writes zeros
  int left;                  // stages of this pass

  __device__ __forceinline__ NetsWeights(const FlowWalk<Storage> &walk, unsigned char *biases, int net)
      : walk(walk), biases(biases), net(net) {
    enter();
  }

  // To the first stage of a pass.
  __device__ __forceinline__ void enter() {
    // nothing of this is computed ahead, which would take registers
    const int hidden = opaque(walk.hidden()), depth = walk.depth();
    const int inside = layer == 0 ? walk.inside() : hidden, outside = layer > depth ? walk.transformed() : hidden;
    const bool narrow = layer > depth && outside <= narrow_columns;
    const int64_t net_at = opaque(net), at = layer == 0 || layer > depth ? net_at : net_at * depth + layer - 1;
    const FlowWeights<const Storage> &all = walk.weights;
    const Storage *const weights = layer == 0 ? all.weight_in : layer > depth ? all.weight_out : all.weight_hidden;
    const Storage *const bias = layer == 0 ? all.bias_in : layer > depth ? all.bias_out : all.bias_hidden;
    if (threadIdx.x < Wide::chunks) {
      const int first = column + static_cast<int>(threadIdx.x) * wide_vector<Storage>;
      copy_async_16(biases + place * nets_bias_bytes<Storage> + 16 * threadIdx.x,
                    bias + at * outside + (first < outside ? first : 0), first < outside ? 16 : 0);
    }
    place = place + 1 == nets_biases ? 0 : place + 1;
    const int log_chunks = narrow ? Narrow::log_chunks : Wide::log_chunks, thread = opaque(threadIdx.x);
    const int chunk = thread & ((1 << log_chunks) - 1), k = thread >> log_chunks;
    target = 16 * ((k << log_chunks) + (chunk ^ (sizeof(Storage) == 2 ? k & 7 : 2 * (k & 3))));
    const int first = column + chunk * wide_vector<Storage>, start = first / panel_width * panel_width;
    const int width = outside - start < panel_width ? outside - start : panel_width;
    const int rows_apart = nets_threads >> log_chunks;
    left = narrow ? Narrow::stages_of(inside) : Wide::stages_of(inside);
    chunks = first < outside ? (inside - k + rows_apart - 1) >> (log_nets_threads - log_chunks) : 0;
    apart = rows_apart * width;
    from = weights + at * inside * outside + (first < outside ? start * inside + first - start + k * width : 0);
  }

  // Begins to copy the next stage, if there is one, and ends a group of copies.
  __device__ __forceinline__ void bring(unsigned char *stage) {
    if (layer < walk.depth() + 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        copy_async_16(stage + target + i * (nets_stage_bytes / 2), from, i < chunks ? 16 : 0); // or from nowhere
        from += apart;
      }
      chunks -= 2;
      if (--left == 0) {
        column += nets_columns;
        if (column >= (layer > walk.depth() ? walk.transformed() : walk.hidden()))
          column = 0, ++layer;
        if (layer < walk.depth() + 2)
          enter();
      }
    }
    commit_copies();
  }
};

// The place of a chunk in a slot, in bytes.
template <class Storage> __device__ __forceinline__ int slot_at(int row, int chunk) {
  return row * nets_columns * static_cast<int>(sizeof(Storage)) + 16 * (chunk ^ (row & 7));
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
      constexpr int early = Pass::row_tiles / 4;
      if (works)
        multiply_rows<Pass, 0, early>(to, now, right);
      if (next == 0)
        weights.bring(read);
      if (works) {
        if (turn + 1 < Pass::turns || step + Pass::turns < steps)
          load(fragments[(turn + 1) % 2], step + turn + 1, next);
        multiply_rows<Pass, early, Pass::row_tiles>(to, now, right);
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
inline __device__ void store_pair(float left, float right, float *to) {
  *reinterpret_cast<float2 *>(to) = make_float2(left, right);
}
inline __device__ void store_pair(float left, float right, __half *to) {
  *reinterpret_cast<__half2 *>(to) = __floats2half2_rn(left, right);
}
inline __device__ void store_pair(float left, float right, __nv_bfloat16 *to) {
  *reinterpret_cast<__nv_bfloat162 *>(to) = __floats2bfloat162_rn(left, right);
}

// What tensor cores take of an activation: TF32 is rounded once, when it is stored.
template <class Precision> __device__ __forceinline__ float as_factor(float value) {
  if constexpr (std::is_same_v<Precision, Tf32>)
    return as_float(to_tf32(value));
  return value;
}

// A pass of a layer, and what becomes of its sums: finish(row, column, sum) with sum(i, e) that of row + 8 i and
// column + e, rows of the tile and columns of the pass. Columns beyond the layer are 0.
template <class Pass, class Weights, class Finish>
__device__ __forceinline__ void nets_pass(const unsigned char *first, const unsigned char *second, unsigned char *ring,
                                          int &stage, int &place, Weights &weights, int inside, int outside,
                                          Finish &&finish) {
  using Storage = typename Pass::Storage;
  const int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
  // neighbours have the same columns: where half of these lie beyond the layer, each scheduler has warps that work
  const int row0 = warp % Pass::row_warps * Pass::row_tiles * 16;
  const int column0 = warp / Pass::row_warps * Pass::column_tiles * 8, column = column0 + lane % 4 * 2;
  const Storage *const bias =
      reinterpret_cast<const Storage *>(weights.biases + place * nets_bias_bytes<Storage>) + column;
  place = place + 1 == nets_biases ? 0 : place + 1;
  float sum[Pass::row_tiles][Pass::column_tiles][4];
#pragma unroll
  for (int j = 0; j < Pass::column_tiles; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float value = widen(bias[8 * j + e]);
#pragma unroll
      for (int i = 0; i < Pass::row_tiles; ++i)
        sum[i][j][e] = sum[i][j][e + 2] = value;
    }
  run_pass<Pass>(sum, first, second, ring, stage, weights, inside, column0 < outside, row0, column0);
  if (column0 + 8 * Pass::column_tiles > outside)
#pragma unroll
    for (int j = 0; j < Pass::column_tiles; ++j)
      if (column + 8 * j >= outside) // which is even
#pragma unroll
        for (int i = 0; i < Pass::row_tiles; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            sum[i][j][e] = 0;              // not so where the input is infinite
  const int row = opaque(row0 + lane / 4); // places are not computed ahead
#pragma unroll
  for (int j = 0; j < Pass::column_tiles; ++j)
    finish(row, column + 8 * j, [&](int i, int e) { return sum[i / 2][j][i % 2 * 2 + e]; });
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
  constexpr int vector = wide_vector<Storage>, slot_chunks = nets_columns / vector, size = sizeof(Storage);
  constexpr int slot_bytes = rows * nets_columns * static_cast<int>(sizeof(Storage));
  unsigned char *const shared = shared_tiles(), *const ring = shared + 3 * slot_bytes;
  unsigned char *const biases = ring + nets_stages * nets_stage_bytes;
  const int net = blockIdx.y, hidden = walk.hidden(), transformed = walk.transformed();
  const int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * rows;
  const int valid = walk.sizes.batch - row0 < rows ? static_cast<int>(walk.sizes.batch - row0) : rows;
  Weights weights(walk, biases, 2 * step + net);
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
  int stage = 0, place = 0, inside = walk.inside();
  const float leaky = static_cast<float>(walk.leaky_slope);
  const bool usual = leaky > 0 && leaky <= 1; // then LeakyReLU is a maximum
  for (int layer = 0; layer <= walk.depth(); ++layer) {
    for (int pass = 0; pass * nets_columns < hidden; ++pass) {
      Storage *const to = reinterpret_cast<Storage *>(pass == 0 ? free : first);
      nets_pass<Wide>(first, second, ring, stage, place, weights, inside, hidden - pass * nets_columns,
                      [&](int row, int column, auto &&sum) {
                        Storage *const at = to + slot_at<Storage>(row, column / vector) / size + column % vector;
                        const auto store = [&](auto &&activate) {
#pragma unroll
                          for (int i = 0; i < 2 * Wide::row_tiles; ++i) // 8 rows on, chunks lie the same
                            store_pair(as_factor<Precision>(activate(sum(i, 0))),
                                       as_factor<Precision>(activate(sum(i, 1))), at + 8 * i * nets_columns);
                        };
                        if (usual)
                          store([&](float value) { return fmaxf(value, value * leaky); });
                        else
                          store([&](float value) { return value > 0 ? value : value * leaky; });
                      });
    }
    unsigned char *const unused = second;
    second = first, first = free, free = unused;
    inside = hidden;
    __syncthreads();
    if (walk.keep) { // the next layer reads these slots, too, and what it writes first comes to the third
      Storage *const out = walk.activation(step, layer) + net * walk.activation_net() + row0 * hidden;
      for (int chunk = opaque(lane); chunk < hidden / vector; chunk += warp_lanes)
#pragma unroll 4
        for (int row = opaque(warp); row < valid; row += nets_warps) {
          const unsigned char *const at =
              (chunk < slot_chunks ? first : second) + slot_at<Storage>(row, chunk % slot_chunks);
          __stwb(reinterpret_cast<uint4 *>(out + static_cast<int64_t>(row) * hidden + chunk * vector),
                 *reinterpret_cast<const uint4 *>(at));
        }
    }
  }
  float *const out = walk.raw + (net * walk.sizes.batch + row0) * transformed;
  const auto last = [&](auto shape, int pass) {
    using Pass = decltype(shape);
    const int left = transformed - pass * nets_columns;
    nets_pass<Pass>(first, second, ring, stage, place, weights, inside, left, [&](int row, int column, auto &&sum) {
#pragma unroll
      for (int i = 0; i < 2 * Pass::row_tiles; ++i)
        if (row + 8 * i < valid && column < left) // which is even
          store_pair(sum(i, 0), sum(i, 1),
                     out + static_cast<int64_t>(row + 8 * i) * transformed + pass * nets_columns + column);
    });
  };
  if (transformed <= narrow_columns)
    last(Narrow(), 0);
  else
    for (int pass = 0; pass * nets_columns < transformed; ++pass)
      last(Wide(), pass);
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
    const bool both = j < walk.transformed();
    sum.add(end.write(row, j, both ? raw[j] : 0, both ? shift[j] : 0, end.read(row, j)));
  }
  const T gained = sum_over_warp(sum.total());
  if (threadIdx.x % warp_lanes == 0 && walk.parts != nullptr)
    walk.parts[(1 + static_cast<int64_t>(step)) * walk.sizes.batch + row] = gained;
}

// Whether nets fit the kernel: their widths the slots, and all weights and biases copies of 16 bytes.
template <class Storage> bool nets_fit(const FlowWalk<Storage> &walk) {
  const FlowWeights<const Storage> &weights = walk.weights;
  const auto biases = reinterpret_cast<uintptr_t>(weights.bias_in) | reinterpret_cast<uintptr_t>(weights.bias_hidden) |
                      reinterpret_cast<uintptr_t>(weights.bias_out);
  return biases % 16 == 0 && sizeof(Storage) < 8 && walk.hidden() <= nets_most && walk.inside() <= nets_most &&
         is_even(walk);
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

// The same with the tile of rows that takes less time.
template <class Precision, class Launch>
void launch_flow_nets(const FlowWalk<typename Precision::Storage> &walk, const Launch &launch) {
  constexpr int rows = large_rows<Precision>;
  // A multiprocessor runs one block, and one of half the rows takes about half the time.
  const int64_t at_once = launch.multiprocessors() > 0 ? launch.multiprocessors() : 1;
  const auto rounds = [&](int size) { return (2 * tiles_of(walk.sizes.batch, size) + at_once - 1) / at_once; };
  if (2 * rounds(rows) <= rounds(rows / 2))
    launch_flow_nets<Precision, rows>(walk, launch);
  else
    launch_flow_nets<Precision, rows / 2>(walk, launch);
}

} // namespace iin_fast
