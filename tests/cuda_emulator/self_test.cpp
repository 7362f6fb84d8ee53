// Kernels that use, or misuse, each thing that the emulator offers, for test_emulator.py.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "binding.h"
#include "common/tile.cuh"

namespace iin_fast {

// Each warp adds up its values by shuffles, the block by shared memory, the grid by an atomic.
__global__ void sum_kernel(const double *values, int count, double *sum, unsigned *warps) {
  __shared__ double warp_sums[32];
  const int at = blockIdx.x * blockDim.x + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double value = at < count ? __ldg(values + at) : 0;
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_down_sync(0xffffffffu, value, offset);
  if (lane == 0) {
    warp_sums[warp] = value;
    atomicAdd(warps, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    value = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i)
      value += warp_sums[i];
    atomicAdd(sum, value);
  }
}

// A block turns its values around through dynamic shared memory.
__global__ void reverse_kernel(const int *from, int *to) {
  extern __shared__ unsigned char dynamic_shared[];
  int *const values = reinterpret_cast<int *>(dynamic_shared);
  const int first = blockIdx.x * blockDim.x;
  values[threadIdx.x] = from[first + threadIdx.x];
  __syncthreads();
  to[first + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// Rounds of: every block writes, all meet, every block reads what its neighbour wrote.
__global__ void ring_kernel(int *cells, int rounds, bool skip) {
  extern __shared__ unsigned char dynamic_shared[];
  int *const mine = reinterpret_cast<int *>(dynamic_shared); // must differ from block to block
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  if (threadIdx.x == 0)
    *mine = blockIdx.x;
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0)
      cells[blockIdx.x] = *mine;
    if (skip && blockIdx.x == 1)
      return;
    grid.sync();
    if (threadIdx.x == 0)
      *mine = cells[(blockIdx.x + 1) % gridDim.x] + 1;
    grid.sync();
  }
  if (threadIdx.x == 0)
    cells[blockIdx.x] = *mine;
}

// Blocks meet at a barrier that the kernel makes of an atomic.
__global__ void counting_barrier_kernel(unsigned *arrived, unsigned *seen) {
  atomicAdd(arrived, 1u);
  while (atomicAdd(arrived, 0u) < gridDim.x * blockDim.x)
    __nanosleep(100);
  seen[blockIdx.x * blockDim.x + threadIdx.x] = *arrived;
}

__global__ void warp_kernel(unsigned *out) {
  const int lane = threadIdx.x;
  unsigned *const mine = out + lane * 8;
  mine[0] = __ballot_sync(0xffffffffu, lane % 3 == 0);
  mine[1] = __any_sync(0xffffffffu, lane == 7) + 2 * __all_sync(0xffffffffu, lane < 32);
  mine[2] = __shfl_sync(0xffffffffu, lane, 5, 8);
  mine[3] = __shfl_up_sync(0xffffffffu, lane, 3, 16);
  mine[4] = __shfl_down_sync(0xffffffffu, lane, 3, 16);
  mine[5] = __shfl_xor_sync(0xffffffffu, lane, 9);
  if (lane < 16) { // half a warp
    mine[6] = __shfl_xor_sync(0x0000ffffu, lane, 1);
    __syncwarp(0x0000ffffu);
  }
  mine[7] = atomicMax(out + 32 * 8, unsigned(lane));
}

// c [16, 8] = a [16, depth] b [depth, 8], with what a lane holds as csrc/common/mma.cuh says. kind: 0 TF32, 1 bfloat16,
// 2 float16; 3 and 4 as 1 with fragments from load_matrices, of matrices that lie as they are, and turned around.
__global__ void multiply_kernel(int kind, const float *a, const float *b, float *c) {
  __shared__ __align__(16) uint16_t left[16 * 16];
  __shared__ __align__(16) uint16_t right[16 * 16]; // columns 8 on stay 0
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4;
  float sum[4] = {};
  uint32_t x[4], y[2];
  if (kind == 0) {
    for (int i = 0; i < 4; ++i)
      x[i] = to_tf32(a[(group + i % 2 * 8) * 8 + pair + i / 2 * 4]);
    for (int i = 0; i < 2; ++i)
      y[i] = to_tf32(b[(pair + i * 4) * 8 + group]);
    mma_tf32(sum, x, y);
  } else {
    const auto bits = [&](float value) -> uint32_t {
      return kind == 2 ? __float2half_rn(value).bits : __float2bfloat16_rn(value).bits;
    };
    const auto both = [&](float low, float high) { return bits(low) | bits(high) << 16; };
    for (int i = 0; i < 4; ++i) {
      const float *const from = a + (group + i % 2 * 8) * 16 + 2 * pair + i / 2 * 8;
      x[i] = both(from[0], from[1]);
    }
    for (int i = 0; i < 2; ++i) {
      const float *const from = b + (2 * pair + i * 8) * 8 + group;
      y[i] = both(from[0], from[8]);
    }
    if (kind > 2) {
      const bool turned = kind == 4; // left as [k][row], right as [k][column], else [column][k]
      for (int i = lane; i < 256; i += 32) {
        const int p = i / 16, q = i % 16;
        left[i] = bits(turned ? a[q * 16 + p] : a[i]);
        right[i] = turned ? (q < 8 ? bits(b[p * 8 + q]) : 0) : (p < 8 ? bits(b[q * 8 + p]) : 0);
      }
      __syncthreads();
      uint32_t z[4];
      const int line = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
      if (turned) {
        load_matrices_turned(x, left + (line + third) * 16 + second);
        load_matrices_turned(z, right + (line + second) * 16 + third);
      } else {
        load_matrices(x, left + (line + second) * 16 + third);
        load_matrices(z, right + (line + third) * 16 + second);
      }
      y[0] = z[0], y[1] = z[1];
    }
    if (kind == 2)
      mma_f16(sum, x, y);
    else
      mma_bf16(sum, x, y);
  }
  for (int i = 0; i < 4; ++i)
    c[(group + i / 2 * 8) * 8 + 2 * pair + i % 2] = sum[i];
}

// c = a w for a [rows, depth] and w [depth, columns] of one block's tile.
template <class Tile> __global__ void product_kernel(const float *a, const float *w, float *c, int depth) {
  unsigned char *const shared = shared_tiles();
  const auto load = [&](int, int step, float *to_a, float *to_w) {
    const int k = step * Tile::depth;
    if (to_a)
      load_tile<Tile::rows, Tile::depth, Tile::lda>(to_a, a + k, depth, Tile::rows, depth - k, false);
    if (to_w)
      load_tile<Tile::depth, Tile::columns, Tile::ldw>(to_w, w + k * Tile::columns, Tile::columns, depth - k,
                                                       Tile::columns, false);
  };
  Tile::run(shared, (depth + Tile::depth - 1) / Tile::depth, load);
  for (int at = threadIdx.x; at < Tile::rows * Tile::columns; at += tile_threads)
    c[at] = Tile::result(shared, 0, at / Tile::columns, at % Tile::columns);
}

// Every thread copies 16 bytes, of which `bytes` count, and adds them up; `early` without waiting.
__global__ void copy_kernel(const float *from, float *sums, int bytes, bool early) {
  extern __shared__ unsigned char dynamic_shared[];
  float *const mine = reinterpret_cast<float *>(dynamic_shared) + 4 * threadIdx.x;
  copy_async_16(mine, from + 4 * threadIdx.x, bytes);
  commit_copies();
  commit_copies(); // a group without copies
  if (early)
    wait_copies<2>();
  else
    wait_copies<1>();
  sums[threadIdx.x] = mine[0] + mine[1] + mine[2] + mine[3];
  wait_copies<0>();
}

enum Fault {
  barrier_left_out,
  barrier_elsewhere,
  lane_left_out,
  lane_outside_mask,
  own_lane_not_in_mask,
  other_function,
  misaligned,
  global_overrun,
  dynamic_shared_overrun,
  static_shared_overrun,
  grid_barrier_without_cooperation,
  copy_unfinished,
  copy_misaligned,
  copy_overrun,
  lane_without_mma,
  copy_of_what_changes,
};

__global__ void faulty_kernel(int fault, int *data, int count) {
  __shared__ int shared[8];
  extern __shared__ unsigned char dynamic_shared[];
  const int thread = threadIdx.x;
  switch (fault) {
  case barrier_left_out:
    if (thread < 16)
      __syncthreads();
    break;
  case barrier_elsewhere:
    if (thread < 16)
      __syncthreads();
    else
      __syncthreads();
    break;
  case lane_left_out:
    if (thread != 3)
      data[0] = __shfl_xor_sync(0xffffffffu, thread, 1);
    break;
  case lane_outside_mask:
    if (thread < 16)
      data[0] = __shfl_sync(0x0000ffffu, thread, 20);
    break;
  case own_lane_not_in_mask:
    data[0] = __shfl_sync(0x0000ffffu, thread, 2);
    break;
  case other_function:
    if (thread < 16)
      data[0] = __ballot_sync(0xffffffffu, 1);
    else
      __syncwarp();
    break;
  case misaligned:
    data[0] = __ldg(reinterpret_cast<const int4 *>(data + 1)).x;
    break;
  case global_overrun:
    data[thread + count - 31] = thread; // the last thread is one too far
    break;
  case dynamic_shared_overrun:
    reinterpret_cast<int *>(dynamic_shared)[thread + 1] = thread; // the launch gives 32 of them
    break;
  case static_shared_overrun:
    shared[thread / 3] = thread; // 11 of 8
    data[0] = shared[0];
    break;
  case grid_barrier_without_cooperation:
    cooperative_groups::this_grid().sync();
    break;
  case copy_unfinished:
    copy_async_16(dynamic_shared, data, 16);
    commit_copies();
    wait_copies<1>();
    break;
  case copy_misaligned:
    copy_async_16(dynamic_shared, data + 1, 16);
    break;
  case copy_overrun: // the last thread copies one number too far
    copy_async_16(dynamic_shared + thread / 8 * 16, data + (thread == 31 ? count - 2 : 0) / 4 * 4, 16);
    copy_async_16(dynamic_shared + 64, data + (thread == 31 ? count : 0), 4);
    commit_copies();
    wait_copies<0>();
    break;
  case lane_without_mma:
    if (thread != 9) {
      float c[4] = {};
      const uint32_t a[4] = {}, b[2] = {};
      mma_tf32(c, a, b);
    }
    break;
  case copy_of_what_changes:
    copy_async_16(dynamic_shared + thread % 8 * 16, data, 16);
    commit_copies();
    __syncthreads();
    if (thread == 9)
      data[3] += 1;
    __syncthreads();
    wait_copies<0>();
    break;
  }
}

// Each with a barrier that orders what it does, or, `barrier` being false, without it.
enum Race {
  write_read,
  read_write,
  write_write,
  across_blocks,
  block_barrier_across_blocks,
  across_clusters_of_blocks,
  constant,
  copy,
  matrix
};

__global__ void race_kernel(int race, bool barrier, int *data) {
  __shared__ __align__(16) int shared[256];
  const int thread = threadIdx.x, other = (thread + 1) % blockDim.x;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const auto meet = [&] {
    if (barrier)
      __syncthreads();
  };
  switch (race) {
  case write_read:
    shared[thread] = thread;
    meet();
    data[thread] = shared[other];
    break;
  case read_write:
    data[thread] = shared[thread];
    meet();
    shared[other] = thread;
    break;
  case write_write:
    shared[thread] = thread;
    meet();
    shared[other] = thread;
    break;
  case across_blocks: // of which each has a place of its own, or all have one
    if (thread == 0)
      data[barrier ? blockIdx.x : 0] = blockIdx.x;
    break;
  case block_barrier_across_blocks:
    if (thread == 0)
      data[blockIdx.x] = blockIdx.x;
    if (barrier)
      grid.sync();
    else
      __syncthreads();
    if (thread == 0)
      data[32 + blockIdx.x] = data[(blockIdx.x + 1) % gridDim.x];
    break;
  case across_clusters_of_blocks: // the barrier of a cluster orders what its own blocks do
    if (thread == 0)
      data[blockIdx.x] = blockIdx.x;
    cluster_barrier(thread == 0);
    if (thread == 0)
      data[32 + blockIdx.x] = data[barrier ? blockIdx.x ^ 1 : (blockIdx.x + 2) % gridDim.x];
    break;
  case constant: // even a barrier does not help
    data[thread] = thread;
    __syncthreads();
    data[32 + thread] = barrier ? data[other] : __ldg(data + other);
    break;
  case copy: // arrived for the thread that waited; for others after a barrier
    copy_async_16(shared + 4 * thread, data + 4 * thread, 16);
    commit_copies();
    if (barrier)
      wait_copies<0>();
    __syncthreads();
    data[128 + thread] = shared[4 * other];
    wait_copies<0>();
    break;
  case matrix:
    for (int i = 0; i < 4; ++i)
      shared[4 * thread + i] = thread;
    meet();
    uint32_t r[4];
    load_matrices(r, shared + 4 * other);
    data[thread] = r[0];
    break;
  }
}

} // namespace iin_fast

using namespace iin_fast;

extern "C" const char *sum(const double *values, int count, double *out, unsigned *warps, int block) {
  return report([&] {
    emulator::Launch()(sum_kernel, dim3((count + block - 1) / block), dim3(block), values, count, out, warps);
  });
}

extern "C" const char *reverse(const int *from, int *to, int blocks, int block) {
  return report([&] { emulator::Launch{block * sizeof(int)}(reverse_kernel, dim3(blocks), dim3(block), from, to); });
}

extern "C" const char *ring(int *cells, int blocks, int block, int rounds, bool skip) {
  return report(
      [&] { emulator::Launch{sizeof(int), true}(ring_kernel, dim3(blocks), dim3(block), cells, rounds, skip); });
}

extern "C" const char *counting_barrier(unsigned *arrived, unsigned *seen, int blocks, int block) {
  return report([&] { emulator::Launch{0, true}(counting_barrier_kernel, dim3(blocks), dim3(block), arrived, seen); });
}

extern "C" const char *warp(unsigned *out) {
  return report([&] { emulator::Launch()(warp_kernel, dim3(1), dim3(32), out); });
}

extern "C" const char *multiply(int kind, const float *a, const float *b, float *c) {
  return report([&] { emulator::Launch()(multiply_kernel, dim3(1), dim3(32), kind, a, b, c); });
}

extern "C" void cut_products(bool on) { emulator::products_are_cut = on; }

// The shapes of the flow's hidden layers in float32: 32 × 16, whose depth four warps share, or 64 × 64.
extern "C" const char *product(bool large, const float *a, const float *w, float *c, int depth) {
  return report([&] {
    const auto launch = [&](auto tile) {
      using Shape = decltype(tile);
      emulator::Launch{Shape::shared_bytes}(product_kernel<Shape>, dim3(1), dim3(tile_threads), a, w, c, depth);
    };
    large ? launch(Tile<Tf32x3, 64, 64, 32, 1, 2, 2, 1, 2>()) : launch(Tile<Tf32x3, 32, 16, 64, 1, 1, 1, 4, 3>());
  });
}

extern "C" const char *copy(const float *from, float *sums, int bytes, bool early) {
  return report([&] { emulator::Launch{64 * 16}(copy_kernel, dim3(1), dim3(64), from, sums, bytes, early); });
}

extern "C" const char *faulty(int fault, int *data, int count) {
  return report([&] { emulator::Launch{32 * sizeof(int)}(faulty_kernel, dim3(1), dim3(32), fault, data, count); });
}

extern "C" const char *race(int race, bool barrier, int *data, int blocks) {
  const emulator::Launch launch =
      race == across_clusters_of_blocks ? emulator::Launch().in_clusters(2, 0) : emulator::Launch{0, true};
  return report([&] { launch(race_kernel, dim3(blocks), dim3(32), race, barrier, data); });
}

extern "C" const char *launch_of(int grid_y, int block) {
  int data[32];
  return report([&] {
    emulator::Launch()(faulty_kernel, dim3(1, grid_y), dim3(block), int(grid_barrier_without_cooperation), data, 32);
  });
}
