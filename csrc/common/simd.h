// Vectors of the instruction set that this file is compiled for, in the compiler's own vector extension, so that one
// source serves AVX-512, AVX2, SSE2 and NEON.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "common/half.h" // IIN_FAST_INLINE

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, vector_registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, vector_registers = 32;
#else
constexpr int vector_bytes = 16, vector_registers = 16;
#endif

template <class T> struct Vector {
  typedef T type __attribute__((vector_size(vector_bytes)));
  // the same vector at any address, free to alias plain arrays
  typedef T anywhere __attribute__((vector_size(vector_bytes), aligned(alignof(T)), may_alias));
};
template <class T> using vec = typename Vector<T>::type;
template <class T> constexpr int lanes = vector_bytes / sizeof(T);

template <class T> IIN_FAST_INLINE vec<T> load(const T *p) {
  return *reinterpret_cast<const typename Vector<T>::anywhere *>(p);
}

template <class T> IIN_FAST_INLINE void store(T *p, vec<T> v) {
  *reinterpret_cast<typename Vector<T>::anywhere *>(p) = v;
}

// A store to whole vectors of memory past the caches, for results that are larger than they are: the line is not read
// first. stream_end() comes before another thread may read them.
template <class T> IIN_FAST_INLINE void stream(T *p, vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i *>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i *>(p), reinterpret_cast<__m256i>(v));
#else
  store(p, v);
#endif
}

IIN_FAST_INLINE void stream_end() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

template <class T> IIN_FAST_INLINE vec<T> broadcast(T value) { return value - vec<T>{}; }

IIN_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
IIN_FAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
IIN_FAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One butterfly of a transpose: two rows that lie S apart exchange their off-diagonal blocks of S.
template <class T, int S, int... I>
IIN_FAST_INLINE void exchange(vec<T> &a, vec<T> &b, std::integer_sequence<int, I...>) {
  constexpr int n = lanes<T>;
#if defined(__clang__) || __GNUC__ >= 12
  const vec<T> low = __builtin_shufflevector(a, b, ((I & S) ? n + (I ^ S) : I)...);
  const vec<T> high = __builtin_shufflevector(a, b, ((I & S) ? n + I : (I ^ S))...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const vec<T> low = __builtin_shuffle(a, b, vec<Index>{((I & S) ? n + (I ^ S) : I)...});
  const vec<T> high = __builtin_shuffle(a, b, vec<Index>{((I & S) ? n + I : (I ^ S))...});
#endif
  a = low;
  b = high;
}

template <class T, int S> IIN_FAST_INLINE void transpose_stage(vec<T> *rows) {
  constexpr int n = lanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    if (!(i & S))
      exchange<T, S>(rows[i], rows[i + S], std::make_integer_sequence<int, n>());
  if constexpr (S * 2 < n)
    transpose_stage<T, S * 2>(rows);
}

// to[j * to_stride + i] = from[i * from_stride + j], a square of one vector each way.
template <class T> IIN_FAST_INLINE void transpose_square(const T *from, int64_t from_stride, T *to, int64_t to_stride) {
  constexpr int n = lanes<T>;
  vec<T> rows[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    rows[i] = load(from + i * from_stride);
  transpose_stage<T, 1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    store(to + i * to_stride, rows[i]);
}

} // namespace
} // namespace IIN_FAST_ISA
} // namespace iin_fast
