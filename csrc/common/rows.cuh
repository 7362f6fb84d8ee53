// What the kernels over [rows, features] share: how rows map to threads, 16-byte access, sums over a row.
//
// A row is handled by `lanes` threads that lie side by side: 1 to 32 of them (a power of two) inside a warp, or a whole
// block for wide rows. Where rows are wide but too few to fill the GPU, `parts` blocks share a row and a second, small
// kernel adds their sums. A lane takes every lanes-th vector of 16 bytes, so that neighbours read neighbouring bytes.
// The order of every sum depends on the shape alone and no atomics are used: results are the same from run to run.
#pragma once

#include <cstdint>
#include <initializer_list>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/half.h"
#include "common/sum.h"

namespace iin_fast {

constexpr int log_row_threads = 8;
constexpr int row_threads = 1 << log_row_threads; // threads of a block
constexpr int warp_lanes = 32;
constexpr unsigned whole_warp = 0xffffffffu;

// A number about which the compiler knows nothing: what follows from it is not computed ahead, which takes registers.
inline __device__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Rows of a [rows, features] matrix whose features are contiguous. Null data: a matrix that is not given.
template <class Storage> struct DeviceRows {
  Storage *data;
  int64_t stride; // elements from row to row
  __host__ __device__ Storage *operator[](int64_t row) const { return data + row * stride; }
};

// Elements of a 16-byte access.
template <class Storage> constexpr int wide_vector = 16 / static_cast<int>(sizeof(Storage));

// True if every row of these matrices can be read in 16-byte accesses. A null matrix always can.
template <class Storage> bool fits_wide_vectors(int64_t features, std::initializer_list<DeviceRows<Storage>> matrices) {
  if (features % wide_vector<Storage> != 0)
    return false;
  for (const DeviceRows<Storage> &rows : matrices)
    if (reinterpret_cast<uintptr_t>(rows.data) % 16 != 0 || rows.stride % wide_vector<Storage> != 0)
      return false;
  return true;
}

// How a launch maps rows to threads.
struct RowPlan {
  int vector;      // elements of an access: wide_vector, or 1
  int log_lanes;   // log2 of the threads of a row: 0 to 5 in a warp, or 8 for a whole block
  unsigned blocks; // blocks over the rows; a block goes on to further rows where these are too few
  unsigned parts;  // blocks that share a row: 1, unless a block has one row
};

// `may_split`: whether several blocks may share a row. `max_blocks`: the limit of the grid's first dimension.
inline RowPlan plan_rows(int64_t rows, int64_t features, int vector, int multiprocessors, bool may_split,
                         int64_t max_blocks = 0x7fffffff) {
  const int64_t vectors = (features + vector - 1) / vector;
  RowPlan plan{vector, 0, 1, 1};
  // up to four vectors a lane, a warp has its row finished before a block would have met at its barrier
  if (vectors > 4 * warp_lanes) {
    plan.log_lanes = log_row_threads;
    const int64_t wanted = 4 * static_cast<int64_t>(multiprocessors); // blocks that keep the GPU busy
    if (may_split && rows > 0 && rows < wanted) {
      const int64_t useful = vectors / (4 * row_threads), parts = (wanted + rows - 1) / rows;
      plan.parts = static_cast<unsigned>(useful < 1 ? 1 : useful < parts ? useful : parts);
    }
  } else {
    while ((1 << plan.log_lanes) < vectors && (1 << plan.log_lanes) < warp_lanes)
      ++plan.log_lanes;
  }
  const int64_t rows_per_block = row_threads >> plan.log_lanes, blocks = (rows + rows_per_block - 1) / rows_per_block;
  plan.blocks = static_cast<unsigned>(blocks < max_blocks ? blocks : max_blocks);
  return plan;
}

// Conversion between storage and compute types.
inline __device__ float widen(float value) { return value; }
inline __device__ double widen(double value) { return value; }
inline __device__ float widen(__half value) { return __half2float(value); }
inline __device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
inline __device__ void narrow(float value, float &out) { out = value; }
inline __device__ void narrow(double value, double &out) { out = value; }
inline __device__ void narrow(float value, __half &out) { out = __float2half_rn(value); }
inline __device__ void narrow(float value, __nv_bfloat16 &out) { out = __float2bfloat16_rn(value); }

template <int vector, class Storage>
__device__ __forceinline__ void load_vector(const Storage *from, compute_t<Storage> (&values)[vector]) {
  if constexpr (vector * sizeof(Storage) == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4 *>(from));
    Storage elements[vector];
    memcpy(elements, &bits, 16);
#pragma unroll
    for (int i = 0; i < vector; ++i)
      values[i] = widen(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < vector; ++i)
      values[i] = widen(__ldg(from + i));
  }
}

template <int vector, class Storage>
__device__ __forceinline__ void store_vector(const compute_t<Storage> (&values)[vector], Storage *to) {
  Storage elements[vector];
#pragma unroll
  for (int i = 0; i < vector; ++i)
    narrow(values[i], elements[i]);
  if constexpr (vector * sizeof(Storage) == 16) {
    uint4 bits;
    memcpy(&bits, elements, 16);
    __stwb(reinterpret_cast<uint4 *>(to), bits); // a plain assignment may come out as four stores
  } else {
#pragma unroll
    for (int i = 0; i < vector; ++i)
      to[i] = elements[i];
  }
}

// The sum of `value` over a warp, in all of its lanes.
template <class T> __device__ __forceinline__ T sum_over_warp(T value) {
#pragma unroll
  for (int offset = warp_lanes / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(whole_warp, value, offset);
  return value;
}

// The sum of `value` over the lanes of each row; valid in the first lane. All threads of the block must call it, with
// `lanes` the same in all of them. `warp_sums` is shared memory.
template <class T>
__device__ __forceinline__ T sum_over_lanes(T value, int lanes, T (&warp_sums)[row_threads / warp_lanes]) {
  for (int offset = (lanes < warp_lanes ? lanes : warp_lanes) / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(whole_warp, value, offset);
  if (lanes > warp_lanes) {
    const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes;
    if (lane == 0)
      warp_sums[warp] = value;
    __syncthreads();
    if (warp == 0) {
      value = lane < row_threads / warp_lanes ? warp_sums[lane] : T(0);
      for (int offset = row_threads / warp_lanes / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(whole_warp, value, offset);
    }
    __syncthreads(); // before the next row overwrites warp_sums
  }
  return value;
}

// sums[row] = sum over parts of partial[row, part], a warp a row. Only for rows that several blocks shared: a few
// hundred numbers.
template <class T>
__global__ void __launch_bounds__(row_threads) sum_parts_kernel(const T *partial, // [rows, parts]
                                                                T *sums,          // [rows]
                                                                int64_t rows, int parts) {
  const int lane = threadIdx.x % warp_lanes;
  const int64_t rows_per_grid = static_cast<int64_t>(gridDim.x) * (row_threads / warp_lanes);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (row_threads / warp_lanes) + threadIdx.x / warp_lanes;
       row < rows; row += rows_per_grid) {
    CompensatedSum<T> compensated;
    for (int part = lane; part < parts; part += warp_lanes)
      compensated.add(partial[row * parts + part]);
    T sum = compensated.total();
    for (int offset = warp_lanes / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(whole_warp, sum, offset);
    if (lane == 0)
      sums[row] = sum;
  }
}

} // namespace iin_fast
