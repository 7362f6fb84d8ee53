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

// The compiler's own half type, for what hardware instructions don't cover.
#if defined(__aarch64__)
using half_t = __fp16;
#else
using half_t = _Float16;
#endif

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

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
  for (; i < count; ++i) {
    half_t value;
    __builtin_memcpy(&value, row + i, sizeof value);
    buffer[i] = static_cast<float>(value);
  }
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
  for (; i < count; ++i) {
    const half_t value = static_cast<half_t>(buffer[i]);
    __builtin_memcpy(row + i, &value, sizeof value);
  }
}

} // namespace iin_fast
