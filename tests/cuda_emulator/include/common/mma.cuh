// csrc/common/mma.cuh for the host: the same functions, lane by lane. See emulator.h.
//
// A product is summed in float64 and rounded once; or, where a test asks for it, it is cut as published measurements of
// tensor cores have it (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, 2021): every term
// at one bit below the last one of the largest, and their sum at the last bit of float32. An asynchronous copy spoils
// its target when it begins and happens when it is waited for, so that who reads too early reads NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace emulator {

inline bool products_are_cut = false;

// The sum of these terms as float32. Terms that are not finite make it what they are.
template <size_t count> float sum_of(const double (&terms)[count]) {
  double sum = 0, largest = 0;
  for (const double term : terms)
    sum += term, largest = std::max(largest, std::abs(term));
  if (!products_are_cut || !std::isfinite(sum) || largest == 0)
    return static_cast<float>(sum);
  const auto cut = [](double value, int exponent) {
    return std::ldexp(std::trunc(std::ldexp(value, -exponent)), exponent);
  };
  sum = 0;
  for (const double term : terms)
    sum += cut(term, std::ilogb(largest) - 24);
  return sum == 0 ? 0.0f : static_cast<float>(cut(sum, std::max(std::ilogb(sum) - 23, -149)));
}

// c += a b for one warp; number(operand, row or column, k) unpacks a lane's registers.
template <int depth, class Number>
void multiply(Site site, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Number &&number) {
  struct Payload {
    float *c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  Block::running().warp_function(site, 0xffffffffu, &mine, [&](void *const *payloads, unsigned) {
    float left[16][depth], right[depth][8];
    const auto of = [&](int lane) { return static_cast<const Payload *>(payloads[lane]); };
    constexpr int pack = depth / 8; // numbers of a register
    for (int lane = 0; lane < 32; ++lane)
      for (int at = 0; at < pack; ++at) {
        const int group = lane / 4, k = lane % 4 * pack + at;
        for (int i = 0; i < 4; ++i)
          left[group + i % 2 * 8][k + i / 2 * depth / 2] = number(of(lane)->a[i], at);
        for (int i = 0; i < 2; ++i)
          right[k + i * depth / 2][group] = number(of(lane)->b[i], at);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double terms[depth + 1];
        for (int k = 0; k < depth; ++k)
          terms[k] = double(left[row][k]) * right[k][column];
        terms[depth] = of(lane)->c[i];
        of(lane)->c[i] = sum_of(terms);
      }
  });
}

inline void load_matrices(Site site, uint32_t (&r)[4], const void *row, bool turned) {
  races::access(row, 16, false);
  struct Payload {
    uint32_t *r;
    const void *row;
  } mine{r, row};
  Block::running().warp_function(site, 0xffffffffu, &mine, [&](void *const *payloads, unsigned) {
    const auto of = [&](int lane) { return static_cast<const Payload *>(payloads[lane]); };
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int line = 0; line < 8; ++line) {
        const void *from = of(8 * i + line)->row;
        if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
          throw Fault("misaligned " + site.text());
        std::memcpy(matrix[line], from, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, pair = lane % 4 * 2;
        const uint32_t low = turned ? matrix[pair][group] : matrix[group][pair];
        const uint32_t high = turned ? matrix[pair + 1][group] : matrix[group][pair + 1];
        of(lane)->r[i] = low | high << 16;
      }
    }
  });
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

} // namespace emulator

namespace iin_fast {

inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return std::isfinite(value) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_HERE) {
  emulator::multiply<8>({"mma_tf32", file, line}, c, a, b, [](uint32_t bits, int) {
    return emulator::float_of(bits & ~0x1fffu); // the unit leaves the other bits out
  });
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_HERE) {
  emulator::multiply<16>({"mma_bf16", file, line}, c, a, b, [](uint32_t bits, int at) {
    return __bfloat162float({static_cast<uint16_t>(bits >> 16 * at)});
  });
}

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_HERE) {
  emulator::multiply<16>({"mma_f16", file, line}, c, a, b,
                         [](uint32_t bits, int at) { return __half2float({static_cast<uint16_t>(bits >> 16 * at)}); });
}

inline void load_matrices(uint32_t (&r)[4], const void *row, EMULATOR_HERE) {
  emulator::load_matrices({"load_matrices", file, line}, r, row, false);
}

inline void load_matrices_turned(uint32_t (&r)[4], const void *row, EMULATOR_HERE) {
  emulator::load_matrices({"load_matrices_turned", file, line}, r, row, true);
}

inline void copy_async_16(void *shared, const void *global, int bytes, EMULATOR_HERE) {
  emulator::Block::running().copy_async({"copy_async_16", file, line}, shared, global, bytes);
}

// Does nothing but look at the address, for those who watch accesses.
inline void prefetch(const void *global) { static_cast<void>(*static_cast<const volatile unsigned char *>(global)); }

inline void commit_copies() { emulator::Block::running().commit_copies(); }

template <int groups> __forceinline__ void wait_copies() { emulator::Block::running().wait_copies(groups); }

// In a launch of clusters each one is what meets at a barrier over the grid.
inline void cluster_barrier(bool, EMULATOR_HERE) {
  emulator::Block::running().sync_grid({"cluster_barrier", file, line});
}

} // namespace iin_fast
