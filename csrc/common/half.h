// Storage types of 16 bits for the CPU loops. A loop computes on blocks of its compute type: float32 and float64 are
// read and written in place, 16-bit rows pass through a block in the first-level cache, converted at both ends (rounded
// to nearest even at the store).
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Always inlined: a copy compiled for one instruction set must never serve code that runs on another.
#define IIN_FAST_INLINE inline __attribute__((always_inline))

namespace iin_fast {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// float16 by its bits, for what hardware instructions don't cover: not every compiler has a type for it, and the
// conversions of those that do come from a newer libgcc than old systems have.
IIN_FAST_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

IIN_FAST_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

IIN_FAST_INLINE float float_of(Half half) {
  const uint32_t magnitude = half.bits & 0x7fffu, sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16;
  // exponents count from -15 there and from -127 here; below the smallest normal number the mantissa counts 2^-24
  const uint32_t normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | 0x7f800000u;
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  // a NaN comes out quiet
  const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
  return float_of(sign | (magnitude >= 0x7c00u ? special | quiet : magnitude < 0x0400u ? small : normal));
}

// Rounded to nearest, ties to even.
IIN_FAST_INLINE Half half_of(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // in [0.5, 1) a float32 has the spacing of the smallest float16, so this sum rounds as it must
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x03ffu);
  const uint32_t half = magnitude > 0x7f800000u    ? nan
                        : magnitude >= 0x477ff000u ? 0x7c00u // 65520 and more
                        : magnitude < 0x38800000u  ? small   // below 2^-14
                                                   : normal;
  return {static_cast<uint16_t>(sign | half)};
}

// What a storage type is computed in.
template <class Storage> struct ComputeType {
  using type = float;
};
template <> struct ComputeType<double> {
  using type = double;
};
template <class Storage> using compute_t = typename ComputeType<Storage>::type;

// Elements of a block; float32 and float64 rows are one block each.
template <class Storage> constexpr int64_t block_elements = sizeof(Storage) == 2 ? 256 : (int64_t(1) << 62);
template <class Storage> constexpr int64_t buffer_elements = sizeof(Storage) == 2 ? 256 : 1;

template <class T> IIN_FAST_INLINE const T *load(const T *row, T *, int64_t) { return row; }

IIN_FAST_INLINE const float *load(const BFloat16 *row, float *buffer, int64_t count) {
  const uint16_t *bits = reinterpret_cast<const uint16_t *>(row);
  uint32_t *wide = reinterpret_cast<uint32_t *>(buffer);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    wide[i] = static_cast<uint32_t>(bits[i]) << 16;
  return buffer;
}

IIN_FAST_INLINE const float *load(const Half *row, float *buffer, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(row + i))));
#endif
#pragma omp simd
  for (int64_t j = i; j < count; ++j)
    buffer[j] = float_of(row[j]);
  return buffer;
}

template <class T> IIN_FAST_INLINE T *output(T *row, T *) { return row; }
IIN_FAST_INLINE float *output(BFloat16 *, float *buffer) { return buffer; }
IIN_FAST_INLINE float *output(Half *, float *buffer) { return buffer; }

template <class T> IIN_FAST_INLINE void store(const T *, T *, int64_t) {} // written in place

IIN_FAST_INLINE void store(const float *buffer, BFloat16 *row, int64_t count) {
  const uint32_t *wide = reinterpret_cast<const uint32_t *>(buffer);
  uint16_t *bits = reinterpret_cast<uint16_t *>(row);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t rounded = (wide[i] + 0x7fffu + ((wide[i] >> 16) & 1u)) >> 16;
    const bool nan = (wide[i] & 0x7fffffffu) > 0x7f800000u;
    bits[i] = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
  }
}

IIN_FAST_INLINE void store(const float *buffer, Half *row, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(row + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(buffer + i), _MM_FROUND_TO_NEAREST_INT));
#endif
#pragma omp simd
  for (int64_t j = i; j < count; ++j)
    row[j] = half_of(buffer[j]);
}

} // namespace iin_fast
