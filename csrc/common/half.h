// Storage types of 16 bits for the CPU loops: converted to float at the load, rounded to nearest even at the store.
#pragma once

#include <cstdint>

// always inlined: a copy compiled for one instruction set must never serve code that runs on another
#define IIN_FAST_INLINE inline __attribute__((always_inline))

namespace iin_fast {

struct BFloat16 {
  uint16_t bits;
  IIN_FAST_INLINE operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
  }
  BFloat16() = default;
  IIN_FAST_INLINE explicit BFloat16(float value) {
    uint32_t wide;
    __builtin_memcpy(&wide, &value, sizeof wide);
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }
};

// The compiler's own half type converts through hardware where there is any.
struct Half {
  _Float16 value;
  IIN_FAST_INLINE operator float() const { return static_cast<float>(value); }
  Half() = default;
  IIN_FAST_INLINE explicit Half(float v) : value(static_cast<_Float16>(v)) {}
};

// What a storage type is computed in.
template <class Storage> struct ComputeType {
  using type = float;
};
template <> struct ComputeType<double> {
  using type = double;
};
template <class Storage> using compute_t = typename ComputeType<Storage>::type;

} // namespace iin_fast
