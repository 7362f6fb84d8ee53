// A block's part of a matrix product, C = A W: tiles stream through shared memory by asynchronous copies into a ring of
// buffers, while tensor cores multiply what has arrived.
//
// A block of 128 threads computes rows × columns of one product, or of two of the same shape that belong together (the
// nets s and t of a coupling). Its four warps share products, rows, columns, and the depth; where warps share the
// depth, each leaves a sum of its own, added in a fixed order when the result is read. Precision:
//
//   Tf32x3   float32: each factor is split into two TF32 numbers, three products; about the error of float32. Tensor
//            cores cut the sums that they keep instead of rounding them, so sums leave them after 64 of the depth at
//            most.
//   Tf32     float32 rounded to TF32 (10 bits), one product
//   Bits16   bfloat16, float16, exact products; all of these accumulate in float32
//   Exact    float64 by FMA
#pragma once

#include <type_traits>

#include "common/mma.cuh"
#include "common/rows.cuh"

namespace iin_fast {

constexpr int tile_threads = 128;

// What the launch gave of shared memory.
inline __device__ unsigned char *shared_tiles() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}

struct Tf32x3 {
  using Storage = float;
  static constexpr int depth = 8; // of one step of the multiplication
};
struct Tf32 {
  using Storage = float;
  static constexpr int depth = 8;
};
template <class Storage_> struct Bits16 {
  using Storage = Storage_;
  static constexpr int depth = 16;
};
struct Exact {
  using Storage = double;
  static constexpr int depth = 8;
};

// Whether sums leave the tensor cores after each step of the depth, to be added in float32. The other types lose more
// by the rounding of their factors.
template <class Precision> constexpr bool sums_leave = std::is_same_v<Precision, Tf32x3>;

// Blocks of a multiprocessor at once that the compiler leaves registers for; about as many fit the shared memory.
template <class Precision> constexpr int blocks_at_once = sizeof(typename Precision::Storage) == 8 ? 2 : 3;

// A float32 as one number of TF32, or as two. The large one is rounded by hand: what cvt does beside it is for infinity
// and NaN, and takes as many instructions again. Of the small one tensor cores leave the last bits out.
struct Tf32Parts {
  uint32_t big, small;
};
template <bool split> __device__ __forceinline__ Tf32Parts tf32_parts(float value) {
  if constexpr (!split)
    return {to_tf32(value), 0};
  // Infinity is split into a finite number and infinity. Split into infinity and NaN, or infinity and 0, its products
  // would be NaN.
  constexpr float largest = 0x1p100f;
  const float finite = fminf(fmaxf(value, -largest), largest);
  Tf32Parts parts;
  memcpy(&parts.big, &finite, 4);
  parts.big = (parts.big + 0x1000u) & ~0x1fffu; // to 10 bits after the point
  float rounded;
  memcpy(&rounded, &parts.big, 4);
  const float rest = value - rounded;
  memcpy(&parts.small, &rest, 4);
  return parts;
}

// sum[j] += left right[j] for a warp's tiles of 16 rows x 8 columns, over 8 of the depth.
template <bool split, int tiles>
__device__ __forceinline__ void multiply_tf32(float (&sum)[tiles][4], const Tf32Parts (&left)[4],
                                              const Tf32Parts (&right)[tiles][2]) {
  const uint32_t big[4] = {left[0].big, left[1].big, left[2].big, left[3].big};
  if constexpr (split) {
    const uint32_t small[4] = {left[0].small, left[1].small, left[2].small, left[3].small};
#pragma unroll
    for (int j = 0; j < tiles; ++j)
      mma_tf32(sum[j], small, {right[j][0].big, right[j][1].big});
#pragma unroll
    for (int j = 0; j < tiles; ++j)
      mma_tf32(sum[j], big, {right[j][0].small, right[j][1].small});
  }
#pragma unroll
  for (int j = 0; j < tiles; ++j)
    mma_tf32(sum[j], big, {right[j][0].big, right[j][1].big});
}

// sum[i][j] += a w for a warp's tiles of 16 rows × 8 columns, over one step of the depth. `a` and `w` point into shared
// memory; a_turned: rows of it are the depth; w_turned: rows of it are columns of the product.
template <class Precision, int row_tiles, int column_tiles, bool a_turned, bool w_turned, int lda, int ldw>
__device__ __forceinline__ void multiply_step(compute_t<typename Precision::Storage> (&sum)[row_tiles][column_tiles][4],
                                              const typename Precision::Storage *a,
                                              const typename Precision::Storage *w, int lane) {
  using Storage = typename Precision::Storage;
  const auto a_at = [&](int row, int k) { return a_turned ? k * lda + row : row * lda + k; };
  const auto w_at = [&](int k, int column) { return w_turned ? column * ldw + k : k * ldw + column; };
  const int group = lane / 4, pair = lane % 4;
  if constexpr (std::is_same_v<Precision, Exact>) {
#pragma unroll
    for (int k = 0; k < Precision::depth; ++k) {
      double left[row_tiles][2], right[column_tiles][2];
#pragma unroll
      for (int i = 0; i < row_tiles; ++i)
        left[i][0] = a[a_at(16 * i + group, k)], left[i][1] = a[a_at(16 * i + group + 8, k)];
#pragma unroll
      for (int j = 0; j < column_tiles; ++j)
        right[j][0] = w[w_at(k, 8 * j + 2 * pair)], right[j][1] = w[w_at(k, 8 * j + 2 * pair + 1)];
#pragma unroll
      for (int i = 0; i < row_tiles; ++i)
#pragma unroll
        for (int j = 0; j < column_tiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            sum[i][j][e] += left[i][e / 2] * right[j][e % 2];
    }
  } else if constexpr (sizeof(Storage) == 4) {
    constexpr bool split = std::is_same_v<Precision, Tf32x3>;
    constexpr int together = column_tiles < 4 ? column_tiles : 4; // column tiles: more take registers that sums need
    static_assert(column_tiles % together == 0, "whole groups of column tiles");
    Tf32Parts left[row_tiles][4];
    const auto load_left = [&](int i) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        left[i][e] = tf32_parts<split>(a[a_at(16 * i + group + e % 2 * 8, pair + e / 2 * 4)]);
    };
#pragma unroll
    for (int first = 0; first < column_tiles; first += together) {
      Tf32Parts right[together][2];
#pragma unroll
      for (int j = 0; j < together; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          right[j][e] = tf32_parts<split>(w[w_at(pair + 4 * e, 8 * (first + j) + group)]);
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        if (first == 0)
          load_left(i);
        multiply_tf32<split>(reinterpret_cast<float (&)[together][4]>(sum[i][first]), left[i], right);
      }
    }
  } else {
    static_assert(column_tiles % 2 == 0, "load_matrices brings two column tiles at once");
    const int line = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    uint32_t right[column_tiles][2];
#pragma unroll
    for (int j = 0; j < column_tiles; j += 2) {
      uint32_t r[4];
      if constexpr (w_turned)
        load_matrices(r, w + w_at(second, 8 * j + line + third));
      else
        load_matrices_turned(r, w + w_at(line + second, 8 * j + third));
      right[j][0] = r[0], right[j][1] = r[1], right[j + 1][0] = r[2], right[j + 1][1] = r[3];
    }
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      uint32_t left[4];
      if constexpr (a_turned)
        load_matrices_turned(left, a + a_at(16 * i + second, line + third));
      else
        load_matrices(left, a + a_at(16 * i + line + second, third));
#pragma unroll
      for (int j = 0; j < column_tiles; ++j)
        if constexpr (std::is_same_v<Storage, __half>)
          mma_f16(sum[i][j], left, right[j]);
        else
          mma_bf16(sum[i][j], left, right[j]);
    }
  }
}

// True if rows that begin at `data`, `stride` elements apart, can be copied 16 bytes at a time.
template <class Storage> __device__ __forceinline__ bool copies_wide(const Storage *data, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * sizeof(Storage))) % 16 == 0;
}

// A tile of rows × columns from global to shared memory; beyond valid_rows and valid_columns it is 0. `wide`: by
// asynchronous copies, of which the caller ends the group; always_wide: the other way is not compiled.
template <int rows, int columns, int ld, bool always_wide = false, class Storage>
__device__ __forceinline__ void load_tile(Storage *to, const Storage *from, int64_t stride, int64_t valid_rows,
                                          int valid_columns, bool wide) {
  constexpr int vector = wide_vector<Storage>, chunks = columns / vector;
  static_assert(columns % vector == 0 && ld % vector == 0, "rows of whole vectors");
  if (always_wide || wide) {
#pragma unroll 2 // more take registers for addresses, which the sums need
    for (int i = 0; i < (rows * chunks + tile_threads - 1) / tile_threads; ++i) {
      const int at = threadIdx.x + i * tile_threads, row = at / chunks, column = at % chunks * vector;
      if (rows * chunks % tile_threads != 0 && at >= rows * chunks)
        break;
      const int left = valid_columns - column;
      const bool inside = row < valid_rows && left > 0;
      const int bytes = !inside ? 0 : (left < vector ? left : vector) * static_cast<int>(sizeof(Storage));
      copy_async_16(to + row * ld + column, inside ? from + row * stride + column : from, bytes);
    }
  } else {
    for (int at = threadIdx.x; at < rows * columns; at += tile_threads) {
      const int row = at / columns, column = at % columns;
      Storage value;
      narrow(compute_t<Storage>(0), value);
      if (row < valid_rows && column < valid_columns)
        value = from[row * stride + column];
      to[row * ld + column] = value;
    }
  }
}

// The same of numbers that value(row, column) computes.
template <int rows, int columns, int ld, class Storage, class F>
__device__ __forceinline__ void compute_tile(Storage *to, int64_t valid_rows, int valid_columns, F &&value) {
  for (int at = threadIdx.x; at < rows * columns; at += tile_threads) {
    const int row = at / columns, column = at % columns;
    narrow(row < valid_rows && column < valid_columns ? value(row, column) : compute_t<Storage>(0),
           to[row * ld + column]);
  }
}

// The shape of a block's part. warps over products × rows × columns × depth: 4. always_wide: of what it loads, that is
// not computed, all rows can be copied 16 bytes at a time.
template <class Precision_, int rows_, int columns_, int depth_, int products_, int row_warps, int column_warps,
          int depth_warps, int buffers_, bool a_turned = false, bool w_turned = false, bool always_wide_ = false>
struct Tile {
  static constexpr bool always_wide = always_wide_;
  using Precision = Precision_;
  using Storage = typename Precision::Storage;
  using T = compute_t<Storage>;
  static constexpr int rows = rows_, columns = columns_, depth = depth_, products = products_, buffers = buffers_;
  static_assert(products * row_warps * column_warps * depth_warps * warp_lanes == tile_threads, "one block");

  // Padding that takes neighbouring rows to different banks, for either way that fragments are read.
  static constexpr int along = 16 / sizeof(Storage), across = sizeof(Storage) == 8 ? 2 : 8;
  static constexpr int a_rows = a_turned ? depth : rows, a_columns = a_turned ? rows : depth;
  static constexpr int w_rows = w_turned ? columns : depth, w_columns = w_turned ? depth : columns;
  static constexpr int lda = a_columns + (a_turned ? across : along), ldw = w_columns + (w_turned ? along : across);
  static constexpr int a_size = a_rows * lda, w_size = w_rows * ldw, buffer_size = products * (a_size + w_size);
  static constexpr int ldc = columns + 8 / static_cast<int>(sizeof(T)), c_size = rows * ldc;
  static constexpr int tile_bytes = buffers * buffer_size * static_cast<int>(sizeof(Storage));
  static constexpr int result_bytes = depth_warps * products * c_size * static_cast<int>(sizeof(T));
  static constexpr int shared_bytes = tile_bytes > result_bytes ? tile_bytes : result_bytes;

  // The weights of the first steps of a run() that follows with started = true.
  template <class Load> static __device__ __forceinline__ void fetch(unsigned char *shared, int steps, Load &&load) {
    Storage *const ring = reinterpret_cast<Storage *>(shared);
#pragma unroll
    for (int step = 0; step < buffers - 1; ++step)
      if (step < steps)
#pragma unroll
        for (int product = 0; product < products; ++product)
          load(product, step, nullptr, ring + step * buffer_size + product * (a_size + w_size) + a_size);
  }

  // load(product, step, a, w) brings the tiles of a step of the depth, visit(a, w) may read them (of the first product)
  // when they are there; a null pointer asks for nothing. Afterwards result() reads C from `shared`.
  // All threads of the block call both; a barrier must lie between result() and the next use of `shared`.
  template <class Load>
  static __device__ __forceinline__ void run(unsigned char *shared, int steps, Load &&load, bool started = false) {
    run(shared, steps, load, started, [](const Storage *, const Storage *) {});
  }
  template <class Load, class Visit>
  static __device__ __forceinline__ void run(unsigned char *shared, int steps, Load &&load, bool started,
                                             Visit &&visit) {
    Storage *const ring = reinterpret_cast<Storage *>(shared);
    const auto bring = [&](int step, bool weights) {
      if (step < steps)
#pragma unroll
        for (int product = 0; product < products; ++product) {
          Storage *const a = ring + step % buffers * buffer_size + product * (a_size + w_size);
          load(product, step, a, weights ? a + a_size : nullptr);
        }
      commit_copies();
    };
    const int lane = threadIdx.x % warp_lanes;
    int warp = threadIdx.x / warp_lanes;
    const int depth_warp = warp % depth_warps;
    warp /= depth_warps;
    const int column_warp = warp % column_warps;
    warp /= column_warps;
    const int row_warp = warp % row_warps, product = warp / row_warps;
    constexpr int row_tiles = rows / row_warps / 16, column_tiles = columns / column_warps / 8;
    constexpr int share = depth / depth_warps;
    static_assert(share % Precision::depth == 0, "whole steps of the multiplication");
    const int row = row_warp * row_tiles * 16, column = column_warp * column_tiles * 8;
    T sum[row_tiles][column_tiles][4] = {};
#pragma unroll
    for (int step = 0; step < buffers - 1; ++step)
      bring(step, !started);
    for (int step = 0; step < steps; ++step) {
      wait_copies<buffers - 2>();
      __syncthreads(); // all copies of this step have arrived, and the buffer that bring() fills now is free
      bring(step + buffers - 1, true);
      const Storage *const buffer = ring + step % buffers * buffer_size;
      const Storage *const a = buffer + product * (a_size + w_size), *const w = a + a_size;
      visit(buffer, buffer + a_size);
      const auto multiply = [&](T(&to)[row_tiles][column_tiles][4]) {
#pragma unroll
        for (int k = 0; k < share; k += Precision::depth) {
          const int at = depth_warp * share + k;
          multiply_step<Precision, row_tiles, column_tiles, a_turned, w_turned, lda, ldw>(
              to, a + (a_turned ? at * lda + row : row * lda + at),
              w + (w_turned ? column * ldw + at : at * ldw + column), lane);
        }
      };
      if constexpr (sums_leave<Precision>) {
        static_assert(share <= 64, "tensor cores cut sums");
        T part[row_tiles][column_tiles][4] = {};
        multiply(part);
#pragma unroll
        for (int i = 0; i < row_tiles; ++i)
#pragma unroll
          for (int j = 0; j < column_tiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              sum[i][j][e] += part[i][j][e];
      } else {
        multiply(sum);
      }
    }
    wait_copies<0>();
    __syncthreads();
    T *const c = reinterpret_cast<T *>(shared) + (depth_warp * products + product) * c_size;
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
      for (int j = 0; j < column_tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          c[(row + 16 * i + lane / 4 + e / 2 * 8) * ldc + column + 8 * j + lane % 4 * 2 + e % 2] = sum[i][j][e];
    __syncthreads();
  }

  static __device__ __forceinline__ T result(const unsigned char *shared, int product, int row, int column) {
    const T *const c = reinterpret_cast<const T *>(shared) + product * c_size + row * ldc + column;
    T sum = c[0];
#pragma unroll
    for (int part = 1; part < depth_warps; ++part)
      sum += c[part * products * c_size];
    return sum;
  }
};

} // namespace iin_fast
