// The part of CUDA's device language that the kernels use, for the host. See emulator.h.
#pragma once

#include <cmath>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local

// Vector types
#define EMULATOR_VECTOR(T, name)                                                                                       \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                                   \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };                                   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                           \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR(float, float)
EMULATOR_VECTOR(double, double)
EMULATOR_VECTOR(int, int)
EMULATOR_VECTOR(unsigned, uint)
#undef EMULATOR_VECTOR

// Dynamic shared memory: kernels declare `extern __shared__ unsigned char dynamic_shared[];` in namespace iin_fast.
namespace iin_fast {
alignas(128) inline thread_local unsigned char dynamic_shared[emulator::largest_shared];
}

inline void emulator::prepare_dynamic_shared(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(iin_fast::dynamic_shared, emulator::largest_shared);
#endif
  std::memset(iin_fast::dynamic_shared, 0xff, bytes); // NaN: nothing may count on what it holds
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(iin_fast::dynamic_shared + bytes, emulator::largest_shared - bytes);
#endif
}

// The caller's place, as default arguments: that is where a default argument's builtins are evaluated.
#define EMULATOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Barriers and fences
inline void __syncthreads(EMULATOR_HERE) { emulator::Block::running().sync_block({"__syncthreads", file, line}); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::Block::running().sleep(); }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_HERE) {
  emulator::Block::running().warp_function({"__syncwarp", file, line}, mask, nullptr, [](void *const *, unsigned) {});
}

// Shuffles
namespace emulator {

template <class T> T shuffle(Site site, unsigned mask, T value, unsigned source) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "CUDA shuffles numbers of up to 64 bits");
  struct Payload {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  Block::running().warp_function(site, mask, &mine, [&](void *const *payloads, unsigned) {
    for (unsigned lane = 0; lane < warp_size; ++lane)
      if (payloads[lane]) {
        Payload &to = *static_cast<Payload *>(payloads[lane]);
        if (payloads[to.source] == nullptr)
          throw Fault(site.text() + ": lane " + std::to_string(lane) + " reads lane " + std::to_string(to.source) +
                      ", which takes no part");
        to.result = static_cast<Payload *>(payloads[to.source])->value;
      }
  });
  return mine.result;
}

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warp_size; }

inline unsigned votes(Site site, unsigned mask, bool vote) {
  struct Payload {
    bool vote;
    unsigned result;
  } mine{vote, 0};
  Block::running().warp_function(site, mask, &mine, [](void *const *payloads, unsigned) {
    unsigned result = 0;
    for (unsigned lane = 0; lane < warp_size; ++lane)
      if (payloads[lane] && static_cast<Payload *>(payloads[lane])->vote)
        result |= 1u << lane;
    for (unsigned lane = 0; lane < warp_size; ++lane)
      if (payloads[lane])
        static_cast<Payload *>(payloads[lane])->result = result;
  });
  return mine.result;
}

} // namespace emulator

// Out of the range of `width` lanes a lane gets its own value.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_HERE) {
  const unsigned first = emulator::lane() / width * width;
  return emulator::shuffle({"__shfl_sync", file, line}, mask, value, first + static_cast<unsigned>(source) % width);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_HERE) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle({"__shfl_up_sync", file, line}, mask, value, lane % width >= delta ? lane - delta : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_HERE) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle({"__shfl_down_sync", file, line}, mask, value,
                           lane % width + delta < static_cast<unsigned>(width) ? lane + delta : lane);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_HERE) {
  const unsigned lane = emulator::lane(), source = lane ^ static_cast<unsigned>(bits);
  // a lane may read from earlier groups of `width`, not from later ones
  return emulator::shuffle({"__shfl_xor_sync", file, line}, mask, value,
                           source < (lane / width + 1) * width ? source : lane);
}

// Votes
inline unsigned __ballot_sync(unsigned mask, int vote, EMULATOR_HERE) {
  return emulator::votes({"__ballot_sync", file, line}, mask, vote != 0);
}
inline int __any_sync(unsigned mask, int vote, EMULATOR_HERE) {
  return emulator::votes({"__any_sync", file, line}, mask, vote != 0) != 0;
}
inline int __all_sync(unsigned mask, int vote, EMULATOR_HERE) {
  return emulator::votes({"__all_sync", file, line}, mask, vote != 0) == mask;
}

// Memory
template <class T> __forceinline__ T __ldg(const T *from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0)
    throw emulator::Fault("misaligned __ldg of " + std::to_string(sizeof(T)) + " bytes");
  emulator::races::access(from, sizeof(T), false, true);
  return *from;
}

template <class T> void __stwb(T *to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0)
    throw emulator::Fault("misaligned __stwb of " + std::to_string(sizeof(T)) + " bytes");
  *to = value;
}

// Atomics: only one thread runs at a time. They return the old value.
namespace emulator {
template <class T, class F> T exchange(T *at, F &&next) {
  const races::Aside aside;
  const T old = *at;
  *at = next(old);
  return old;
}
} // namespace emulator
template <class T> T atomicAdd(T *at, std::common_type_t<T> value) {
  return emulator::exchange(at, [&](T old) { return old + value; });
}
template <class T> T atomicMax(T *at, std::common_type_t<T> value) {
  return emulator::exchange(at, [&](T old) { return old < value ? value : old; });
}
template <class T> T atomicMin(T *at, std::common_type_t<T> value) {
  return emulator::exchange(at, [&](T old) { return value < old ? value : old; });
}
template <class T> T atomicExch(T *at, std::common_type_t<T> value) {
  return emulator::exchange(at, [&](T) { return value; });
}
template <class T> T atomicCAS(T *at, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return emulator::exchange(at, [&](T old) { return old == expected ? value : old; });
}
