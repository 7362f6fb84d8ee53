// The flow on GPUs with thread block clusters (compute capability 9.0 and later): a cluster walks 32 rows through all
// layers in one launch.
//
// Each block of a cluster has 64 outputs of every hidden layer of one net: one panel of the weight. Blocks with even
// rank have the net S, those with odd rank T. Activations go from layer to layer through global memory, which is the L2
// cache, and a barrier of the cluster, which costs a fraction of one over the grid. A last layer is summed over the
// depth: a block multiplies its own 64 activations, and the sums of all blocks are added, in their order, where the
// coupling is computed, a warp a row.
//
// Four warps do nothing but fetch weights, in the order in which the block needs them, over layers, steps and tiles, as
// far ahead as shared memory reaches: no barrier makes them wait. Eight warps multiply, each a part of the depth. What
// else comes from memory is asked for before it is needed: biases before a product, what a coupling reads before the
// barrier in front of it.
//
// Per walk of a tile a cluster reads every weight once. All sums run in a fixed order.
#pragma once

#include "flow/flow_kernels.cuh"

namespace iin_fast {

constexpr int cluster_workers = 256, cluster_fetchers = 128, cluster_threads = cluster_workers + cluster_fetchers;
constexpr int least_of_cluster = 4, most_of_cluster = 16; // blocks
constexpr int cluster_inside = 512;                       // inputs of a layer, at most

// Shapes of what lies in shared memory.
template <class Precision_> struct ClusterShape {
  using Precision = Precision_;
  using Storage = typename Precision::Storage;
  using T = compute_t<Storage>;
  static constexpr int rows = cluster_rows, columns = panel_width;
  static constexpr int depth_warps = cluster_workers / warp_lanes, share = 2 * Precision::depth;
  static constexpr int depth = depth_warps * share; // of a part of a product
  static constexpr int row_tiles = rows / 16, column_tiles = columns / 8;
  static constexpr int along = 16 / sizeof(Storage);
  static constexpr int lda = cluster_inside + along, ldo = columns + along, ldw = columns + 8, ldc = columns + 8;
  static_assert(!sums_leave<Precision> || cluster_inside / depth_warps <= 64, "tensor cores cut sums");
  static constexpr int w_size = depth * ldw, buffers = 4;
  static constexpr int a_bytes = rows * lda * static_cast<int>(sizeof(Storage));
  static constexpr int c_bytes = depth_warps * rows * ldc * static_cast<int>(sizeof(T));
  static constexpr int own_at = a_bytes > c_bytes ? a_bytes : c_bytes; // sums come in the place of the input
  static constexpr int scales_at = own_at + rows * ldo * static_cast<int>(sizeof(Storage));
  static constexpr int ring_at = scales_at + 64;
  static constexpr int shared_bytes = ring_at + buffers * w_size * static_cast<int>(sizeof(Storage));
  static_assert(depth_warps * sizeof(T) <= 64, "a sum of each warp");
};

// Four neighbours of a row.
template <class Storage> struct alignas(4 * sizeof(Storage)) Four {
  Storage value[4];
};

// Barriers, for warps that meet at different places of the code.
__device__ __forceinline__ void meet_block() { __syncthreads(); }

// All threads of the cluster. What they have written others may read.
__device__ __forceinline__ void meet_cluster() {
  meet_block();
  cluster_barrier(threadIdx.x == 0);
}

// A block's place in its cluster, and the tiles of rows that the cluster walks.
struct ClusterPlace {
  int blocks, rank, first, clusters, tiles;
  __device__ ClusterPlace(int blocks, int64_t batch)
      : blocks(blocks), rank(blockIdx.x % blocks), first(blockIdx.x / blocks), clusters(gridDim.x / blocks),
        tiles(static_cast<int>((batch + cluster_rows - 1) / cluster_rows)) {}
  __device__ int net() const { return rank % 2; }
  __device__ int panel() const { return rank / 2; }
};

template <class Storage> __device__ __forceinline__ int depth_of_layer(const FlowWalk<Storage> &walk, int layer) {
  return layer == 0 ? walk.inside() : walk.hidden();
}

// Parts of the depth of a layer's product; of last layers, panels of its outputs.
template <class Shape>
__device__ __forceinline__ int parts_of_layer(const FlowWalk<typename Shape::Storage> &walk, int layer) {
  return layer > walk.depth() ? (walk.transformed() + panel_width - 1) / panel_width
                              : (depth_of_layer(walk, layer) + Shape::depth - 1) / Shape::depth;
}

// The warps that fetch the weights of a block, part after part, in the order of the walk.
template <class Shape> class ClusterFetch {
public:
  using Storage = typename Shape::Storage;

  __device__ ClusterFetch(const FlowWalk<Storage> &walk, unsigned char *shared, const ClusterPlace &place)
      : walk_(walk), place_(place), ring_(reinterpret_cast<Storage *>(shared + Shape::ring_at)),
        left_((place.tiles - place.first + place.clusters - 1) / place.clusters * walk.steps()) {}

  // Meets the others wherever they meet.
  __device__ void run() {
#pragma unroll 1
    for (int i = 0; i < Shape::buffers - 1; ++i)
      fetch();
    for (int tile = place_.first; tile < place_.tiles; tile += place_.clusters) {
      meet_cluster();
      for (int walked = 0; walked < walk_.steps(); ++walked) {
        if (walked + 1 < walk_.steps())
          prefetch_vectors(walked + 1);
        for (int layer = 0; layer <= walk_.depth() + 1; ++layer) {
          const bool last = layer > walk_.depth();
          const int parts = parts_of_layer<Shape>(walk_, layer);
#pragma unroll 1
          for (int part = 0; part < parts; ++part) {
            wait_copies<Shape::buffers - 2>();
            meet_block();
            fetch();
            if (last || part == parts - 1)
              meet_block(), meet_block();
          }
          if (layer != walk_.depth())
            meet_cluster();
        }
        meet_cluster();
      }
    }
  }

private:
  // Begins to copy the next part, if there is one.
  __device__ void fetch() {
    if (left_ > 0) {
      copy();
      buffer_ = buffer_ + 1 == Shape::buffers ? 0 : buffer_ + 1;
      if (++part_ == parts_of_layer<Shape>(walk_, layer_)) {
        part_ = 0;
        if (++layer_ > walk_.depth() + 1) {
          layer_ = 0, --left_;
          step_ = step_ + 1 == walk_.steps() ? 0 : step_ + 1;
        }
      }
    }
    commit_copies();
  }

  // Brings the biases of a step, and the ActNorm and the permutation behind it, to the L2 cache: a line for each
  // thread.
  __device__ void prefetch_vectors(int walked) const {
    const int step = walk_.inverse ? walk_.steps() - 1 - walked : walked, transformed = walk_.transformed();
    const int64_t hidden = walk_.hidden(), dim = walk_.dim(), block = step / 2;
    const int next = block + 1 < walk_.sizes.n_flows && !walk_.inverse ? step / 2 + 1 : step / 2;
    const int thread = threadIdx.x - cluster_workers;
    const auto bring = [&](const auto *from, int64_t count, int first) { // threads from `first` on
      const int64_t at = (thread - first) * static_cast<int64_t>(128 / sizeof(*from));
      if (thread >= first && at < count)
        prefetch(from + at);
    };
    const int64_t net_at = 2 * static_cast<int64_t>(step) + place_.net(), column = Shape::columns * place_.panel();
    const int64_t width = hidden - column < Shape::columns ? hidden - column : Shape::columns;
    bring(walk_.weights.bias_in + net_at * hidden + column, width, 0);
    for (int layer = 0; layer < walk_.depth(); ++layer)
      bring(walk_.weights.bias_hidden + (net_at * walk_.depth() + layer) * hidden + column, width, 4 + 4 * layer);
    bring(walk_.weights.bias_out + 2 * static_cast<int64_t>(step) * transformed, 2 * transformed, 32);
    bring(walk_.weights.loc + next * dim, dim, 64);
    bring(walk_.weights.scale + next * dim, dim, 80);
    bring(walk_.table + block * dim, dim, 96);
  }

  __device__ void copy() const {
    constexpr int vector = wide_vector<Storage>, chunks = Shape::columns / vector;
    constexpr int turns = Shape::depth * chunks / cluster_fetchers;
    static_assert(Shape::depth * chunks % cluster_fetchers == 0, "each thread copies as much");
    const int hidden = walk_.hidden(), transformed = walk_.transformed(), thread = threadIdx.x - cluster_workers;
    const int64_t net_at = 2 * static_cast<int64_t>(walk_.inverse ? walk_.steps() - 1 - step_ : step_) + place_.net();
    const bool last = layer_ > walk_.depth();
    const int inside = depth_of_layer(walk_, layer_), outside = last ? transformed : hidden;
    const int column = Shape::columns * (last ? part_ : place_.panel());
    const int row = last ? Shape::columns * place_.panel() : Shape::depth * part_;
    const int width = outside - column < Shape::columns ? outside - column : Shape::columns;
    const int most = last ? Shape::columns : Shape::depth, rows = inside - row < most ? inside - row : most;
    const Storage *const weight =
        last          ? walk_.weights.weight_out + net_at * hidden * transformed
        : layer_ == 0 ? walk_.weights.weight_in + net_at * inside * hidden
                      : walk_.weights.weight_hidden + (net_at * walk_.depth() + layer_ - 1) * hidden * hidden;
    const Storage *const from = weight + static_cast<int64_t>(column) * inside + static_cast<int64_t>(row) * width;
    Storage *const to = ring_ + buffer_ * Shape::w_size + thread / chunks * Shape::ldw + thread % chunks * vector;
    const int at = thread % chunks * vector;
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      constexpr int step = cluster_fetchers / chunks; // rows of the part
      const int k = thread / chunks + turn * step;
      const bool valid = k < rows && at < width;
      copy_async_16(to + turn * step * Shape::ldw, from + (valid ? k * width + at : 0), valid ? 16 : 0);
    }
  }

  const FlowWalk<Storage> &walk_;
  const ClusterPlace place_;
  Storage *const ring_;
  int64_t left_; // steps to come
  int step_ = 0, layer_ = 0, part_ = 0, buffer_ = 0;
};

// A warp's part of the sum of log|scale|. By itself, for want of registers.
template <class Storage>
__attribute__((noinline)) __device__ compute_t<Storage> sum_of_scales(const Storage *scale, int64_t count) {
  CompensatedSum<compute_t<Storage>> sum;
  for (int64_t at = threadIdx.x; at < count; at += cluster_workers)
    sum.add(math::log(math::abs(widen(__ldg(scale + at)))));
  return sum_over_warp(sum.total());
}

// The walk of the other warps.
template <class Precision> class ClusterWalk {
public:
  using Shape = ClusterShape<Precision>;
  using Storage = typename Shape::Storage;
  using T = typename Shape::T;

  __device__ ClusterWalk(const FlowWalk<Storage> &walk, unsigned char *shared, const ClusterPlace &place)
      : walk_(walk), place_(place), shared_(shared) {}

  __device__ void run() {
    const T scales_sum = sum_of_scales(walk_.weights.scale, walk_.sizes.n_flows * walk_.sizes.dim);
    if (lane() == 0)
      scales()[warp()] = scales_sum;
    for (int tile = place_.first; tile < place_.tiles; tile += place_.clusters)
      walk_rows(tile);
  }

private:
  using End = StepEnd<Storage>;

  // What the coupling of columns j of a row needs but for the sums of the last layers.
  struct Said {
    typename End::Columns columns;
    T bias, shift_bias;
  };
  __device__ __forceinline__ Said read(const End &end, int64_t row, int j) const {
    const int transformed = walk_.transformed(), inside = j < transformed ? j : 0;
    const Storage *const bias = walk_.weights.bias_out + 2 * static_cast<int64_t>(end.step) * transformed;
    return {end.read(row, j), widen(__ldg(bias + inside)), widen(__ldg(bias + transformed + inside))};
  }

  __device__ Storage *input() const { return reinterpret_cast<Storage *>(shared_); }
  __device__ T *sums() const { return reinterpret_cast<T *>(shared_); } // in the place of the input
  __device__ Storage *own() const { return reinterpret_cast<Storage *>(shared_ + Shape::own_at); }
  __device__ T *scales() const { return reinterpret_cast<T *>(shared_ + Shape::scales_at); }
  __device__ Storage *ring() const { return reinterpret_cast<Storage *>(shared_ + Shape::ring_at); }

  static __device__ int warp() { return opaque(threadIdx.x) / warp_lanes; }
  static __device__ int lane() { return opaque(threadIdx.x) % warp_lanes; }

  __device__ void walk_rows(int tile) {
    const int64_t row0 = static_cast<int64_t>(tile) * Shape::rows;
    const bool inverse = walk_.inverse;
    const int depth = walk_.depth(), each = (Shape::rows + place_.blocks - 1) / place_.blocks;
    // the row that this warp couples, if it has one
    static_assert(Shape::rows / least_of_cluster <= Shape::depth_warps, "a row for each warp");
    const int at = place_.rank * each + warp();
    const bool couples = warp() < each && at < Shape::rows && row0 + at < walk_.sizes.batch;
    CompensatedSum<T> gained;
    if (couples)
      gained = enter_row(walk_, inverse, row0 + at, lane());
    meet_cluster();
#pragma unroll 1
    for (int walked = 0; walked < walk_.steps(); ++walked) {
      const int step = inverse ? walk_.steps() - 1 - walked : walked;
#pragma unroll 1
      for (int layer = 0; layer <= depth; ++layer) {
        hidden_layer(opaque(step), layer, opaque(static_cast<int>(row0)));
        if (layer < depth)
          meet_cluster();
      }
      const int64_t block = static_cast<int64_t>(Shape::rows) * walk_.transformed();
      T *const partial = walk_.raw + static_cast<int64_t>(tile) * place_.blocks * block;
      const End end(walk_, opaque(step), inverse);
      Said first;
      if (couples && lane() < walk_.conditioning())
        first = read(end, row0 + at, lane());
      last_layer(partial + place_.rank * block);
      meet_cluster();
      if (couples)
        couple_row(end, first, row0 + at, partial + static_cast<int64_t>(at) * walk_.transformed(), gained);
      meet_cluster();
    }
    if (couples) {
      T total = sum_over_warp(gained.total());
      for (int i = 0; i < Shape::depth_warps; ++i)
        total += scales()[i];
      if (lane() == 0)
        walk_.logdet[row0 + at] = inverse ? -total : total;
    }
  }

  // Sums of a W, of `parts` parts of the depth, which ends at `depth`; each warp leaves those of its share. bring(part)
  // begins to copy a part of `a`. Between barriers of the block: what it leaves may be read, and the input is gone.
  template <int ld, class Bring>
  __device__ __forceinline__ void product(const Storage *a, int parts, int depth, Bring &&bring) {
    constexpr int ahead = 2; // parts of `a` on their way
    T sum[Shape::row_tiles][Shape::column_tiles][4] = {};
    const int at = warp() * Shape::share;
#pragma unroll 1
    for (int part = 0; part < ahead; ++part)
      bring(part), commit_copies();
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      wait_copies<ahead - 1>();
      meet_block(); // this part is there, and the buffer before it is free
      bring(part + ahead), commit_copies();
      const Storage *const w = ring() + buffer_ * Shape::w_size + at * Shape::ldw;
#pragma unroll
      for (int k = 0; k < Shape::share; k += Precision::depth)
        if (part * Shape::depth + at + k < depth)
          multiply_step<Precision, Shape::row_tiles, Shape::column_tiles, false, false, ld, Shape::ldw>(
              sum, a + part * Shape::depth + at + k, w + k * Shape::ldw, lane());
      buffer_ = buffer_ + 1 == Shape::buffers ? 0 : buffer_ + 1;
    }
    meet_block(); // nobody reads `a` any more
    T *const c = sums() + (warp() * Shape::rows + lane() / 4) * Shape::ldc + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < Shape::row_tiles; ++i)
#pragma unroll
      for (int j = 0; j < Shape::column_tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          *reinterpret_cast<float2 *>(c + (16 * i + e / 2 * 8) * Shape::ldc + 8 * j) =
              make_float2(sum[i][j][e], sum[i][j][e + 1]);
    meet_block();
  }

  // f(which, row, column, four sums) for four neighbours, twice.
  template <class F> __device__ __forceinline__ void for_sums(F &&f) const {
    const int row = opaque(threadIdx.x) / 8;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int column = sums_column(which);
      const T *const c = sums() + row * Shape::ldc + column;
      T sum[4] = {c[0], c[1], c[2], c[3]};
#pragma unroll
      for (int part = 1; part < Shape::depth_warps; ++part)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum[e] += c[part * Shape::rows * Shape::ldc + e];
      f(which, row, column, sum);
    }
  }
  static __device__ int sums_column(int which) { return threadIdx.x % 8 * 4 + 32 * which; }

  __device__ void hidden_layer(int step, int layer, int64_t row0) {
    const int hidden = walk_.hidden(), column0 = place_.panel() * Shape::columns, depth = depth_of_layer(walk_, layer);
    const int64_t net_at = 2 * static_cast<int64_t>(step) + place_.net(), rows = walk_.sizes.batch - row0;
    const Storage *const bias = layer == 0 ? walk_.weights.bias_in + net_at * hidden
                                           : walk_.weights.bias_hidden + (net_at * walk_.depth() + layer - 1) * hidden;
    T biases[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = column0 + sums_column(i / 4) + i % 4;
      biases[i / 4][i % 4] = widen(__ldg(bias + (column < hidden ? column : 0)));
    }
    if (layer == 0)
      enter_nets(step, row0, rows);
    const Storage *const before =
        layer == 0 ? nullptr
                   : walk_.activation(step, layer - 1) + place_.net() * walk_.activation_net() + row0 * hidden;
    product<Shape::lda>(input(), parts_of_layer<Shape>(walk_, layer), depth, [&](int part) {
      if (layer > 0)
        bring_input(before, part, rows);
    });
    const bool last = layer == walk_.depth();
    Storage *const out =
        walk_.activation(step, layer) + place_.net() * walk_.activation_net() + row0 * hidden + column0;
    const T leaky = static_cast<T>(walk_.leaky_slope);
    for_sums([&](int which, int row, int column, const T(&sum)[4]) {
      const bool valid = column0 + column < hidden;
      Four<Storage> four;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const T value = sum[e] + biases[which][e];
        narrow(!valid ? T(0) : value > T(0) ? value : value * leaky, four.value[e]);
      }
      if (last)
        *reinterpret_cast<Four<Storage> *>(own() + row * Shape::ldo + column) = four;
      if (valid && row < rows && (!last || walk_.keep))
        *reinterpret_cast<Four<Storage> *>(out + static_cast<int64_t>(row) * hidden + column) = four;
    });
  }

  // The input of the first layers: columns that condition, then the context. A warp has every eighth row.
  __device__ void enter_nets(int step, int64_t row0, int64_t rows) const {
    constexpr int turns = Shape::rows / Shape::depth_warps;
    const int conditioning = walk_.conditioning(), inside = walk_.inside();
    const int columns = (inside + Shape::share - 1) / Shape::share * Shape::share; // what warps multiply
    const T *const stage = walk_.stage(step) + row0 * walk_.dim();
    const Storage *const context =
        walk_.context_dim() > 0 ? walk_.context_of(step / 2) + row0 * walk_.context_dim() : nullptr;
#pragma unroll 1
    for (int column = lane(); column < columns; column += warp_lanes) {
      T value[turns];
#pragma unroll
      for (int turn = 0; turn < turns; ++turn) {
        const int row = warp() + turn * Shape::depth_warps;
        value[turn] = 0;
        if (row < rows && column < inside)
          value[turn] = column < conditioning
                            ? stage[static_cast<int64_t>(row) * walk_.dim() + column]
                            : widen(context[static_cast<int64_t>(row) * walk_.context_dim() + column - conditioning]);
      }
#pragma unroll
      for (int turn = 0; turn < turns; ++turn)
        narrow(value[turn], input()[(warp() + turn * Shape::depth_warps) * Shape::lda + column]);
    }
  }

  // Begins to copy a part of the depth of what a layer before has put out, if there is one.
  __device__ __forceinline__ void bring_input(const Storage *from, int part, int64_t rows) const {
    constexpr int vector = wide_vector<Storage>, chunks = Shape::depth / vector;
    constexpr int turns = Shape::rows * chunks / cluster_workers;
    static_assert(Shape::rows * chunks % cluster_workers == 0, "each thread copies as much");
    const int thread = opaque(threadIdx.x), hidden = walk_.hidden();
    const int column = part * Shape::depth + thread % chunks * vector;
    if (part * Shape::depth < hidden)
#pragma unroll
      for (int turn = 0; turn < turns; ++turn) {
        const int row = thread / chunks + turn * (cluster_workers / chunks);
        const bool valid = row < rows && column < hidden;
        copy_async_16(input() + row * Shape::lda + column,
                      valid ? from + static_cast<int64_t>(row) * hidden + column : from, valid ? 16 : 0);
      }
  }

  // This block's part of the sums of its net's last layer.
  __device__ void last_layer(T *partial) {
    const int transformed = walk_.transformed(), parts = parts_of_layer<Shape>(walk_, walk_.depth() + 1);
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      product<Shape::ldo>(own(), 1, Shape::columns, [](int) {});
      for_sums([&](int, int row, int column, const T(&sum)[4]) {
        column += part * Shape::columns;
        if (column < transformed)
          *reinterpret_cast<Four<T> *>(partial + row * transformed + column) = {{sum[0], sum[1], sum[2], sum[3]}};
      });
    }
  }

  // The coupling of a row, a lane for some columns. `first`: what was read of this lane's first one; `partial`: of the
  // row and the first block.
  __device__ void couple_row(const End &end, const Said &first, int64_t row, const T *partial,
                             CompensatedSum<T> &gained) const {
    const int64_t block = static_cast<int64_t>(Shape::rows) * walk_.transformed();
#pragma unroll 1
    for (int j = lane(); j < walk_.conditioning(); j += warp_lanes) {
      const Said said = j == lane() ? first : read(end, row, j);
      T raw = 0, shift = 0;
      if (j < walk_.transformed()) {
#pragma unroll 4
        for (int other = 0; other < place_.blocks; other += 2)
          raw += partial[other * block + j], shift += partial[(other + 1) * block + j];
      }
      gained.add(end.write(row, j, raw + said.bias, shift + said.shift_bias, said.columns));
    }
  }

  const FlowWalk<Storage> &walk_;
  const ClusterPlace place_;
  unsigned char *const shared_;
  int buffer_ = 0;
};

template <class Precision>
__global__ void __launch_bounds__(cluster_threads, 1)
    flow_cluster_kernel(const __grid_constant__ FlowWalk<typename Precision::Storage> walk, const int blocks) {
  const ClusterPlace place(blocks, walk.sizes.batch);
  if (threadIdx.x >= cluster_workers)
    ClusterFetch<ClusterShape<Precision>>(walk, shared_tiles(), place).run();
  else
    ClusterWalk<Precision>(walk, shared_tiles(), place).run();
}

// Whether nets fit the blocks of a cluster, and all weights copies of 16 bytes.
template <class Storage> bool clusters_fit(const FlowWalk<Storage> &walk) {
  const int blocks = blocks_of_cluster(walk.sizes);
  return sizeof(Storage) < 8 && blocks >= least_of_cluster && blocks <= most_of_cluster &&
         walk.inside() <= cluster_inside && is_even(walk);
}

// Clusters that run at once; 0: this GPU has none, or none of this size.
template <class Precision, class Launch>
int64_t clusters_at_once(const FlowWalk<typename Precision::Storage> &walk, const Launch &launch) {
  return launch.clusters_together(flow_cluster_kernel<Precision>, cluster_threads,
                                  ClusterShape<Precision>::shared_bytes, blocks_of_cluster(walk.sizes));
}

template <class Precision, class Launch>
void launch_flow_clusters(const FlowWalk<typename Precision::Storage> &walk, const Launch &launch) {
  const unsigned blocks = blocks_of_cluster(walk.sizes), tiles = tiles_of(walk.sizes.batch, cluster_rows);
  const unsigned most = static_cast<unsigned>(clusters_at_once<Precision>(walk, launch));
  launch_table(walk, !walk.inverse, launch);
  launch.in_clusters(blocks, ClusterShape<Precision>::shared_bytes)(
      flow_cluster_kernel<Precision>, dim3(blocks * (tiles < most ? tiles : most)), dim3(cluster_threads), walk,
      static_cast<int>(blocks));
}

} // namespace iin_fast
