// bfloat16 as CUDA names it, for the host. See emulator.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

// To nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value))
    return {0x7fff};
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  const uint32_t rest = wide & 0xffff, kept = wide >> 16;
  return {static_cast<uint16_t>(kept + (rest > 0x8000 || (rest == 0x8000 && (kept & 1))))};
}

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
