// Instructions that CUDA C++ has no plain function for: tensor cores, the loads that feed them, asynchronous copies.
//
// A warp multiplies 16 × depth by depth × 8 numbers. With group = lane / 4 and pair = lane % 4 a lane holds
//
//   c[4]  rows group, group + 8; columns 2 pair, 2 pair + 1:  c[0], c[1] of row group, c[2], c[3] of row group + 8
//   a[4]  depth 8:  (group, pair), (group + 8, pair), (group, pair + 4), (group + 8, pair + 4)
//         depth 16, two numbers in each, k and k + 1:  (group, 2 pair), (group + 8, 2 pair), (group, 2 pair + 8), ...
//   b[2]  depth 8:  (k = pair, column = group), (pair + 4, group);  depth 16:  (2 pair, group), (2 pair + 8, group)
//
// Tests put the file of the same name in tests/cuda_emulator/include/common in the place of this one.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace iin_fast {

// To TF32's 10 bits after the point, to nearest, ties away from 0.
inline __device__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

inline __device__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline __device__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline __device__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline __device__ uint32_t shared_address(const void *shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8 × 8 matrices of 16-bit numbers from shared memory. Lane l gives the address of row l % 8 of matrix l / 8
// (16 bytes, aligned) and gets of matrix i in r[i] its numbers (group, 2 pair) and (group, 2 pair + 1).
inline __device__ void load_matrices(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: (2 pair, group) and (2 pair + 1, group).
inline __device__ void load_matrices_turned(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Begins to copy the first `bytes` of 16 from global to shared memory; the others become 0. Both aligned to 16 bytes.
// Nothing is there before commit_copies() and wait_copies(): shared memory then holds what this thread asked for, and
// what the others did after a barrier.
inline __device__ void copy_async_16(void *shared, const void *global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Brings the 128 bytes around an address to the L2 cache, some time.
inline __device__ void prefetch(const void *global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Ends a group of copies.
inline __device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `groups` groups of this thread, the latest, are unfinished.
template <int groups> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// All threads of a cluster of blocks meet, on compute capability 9.0 and later. What a thread with `fence` and those
// that have met it at a barrier of its block have written before, others may read behind it.
inline __device__ void cluster_barrier(bool fence) {
#if __CUDA_ARCH__ >= 900
  if (fence)
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

} // namespace iin_fast
