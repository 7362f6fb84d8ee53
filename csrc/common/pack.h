// A vector that is written as one number, for functions of one element (math.h, spline_coupling.h): what they return
// for a Pack is what they return for each of its lanes. A compiler is not asked to find vector code in a loop, which it
// may give up for a jump that it made itself.
#pragma once

#include "common/math.h"
#include "common/simd.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

// Which lanes: all bits of a lane or none.
template <class T> struct Mask {
  using Vec = decltype(vec<T>{} < vec<T>{});
  Vec v;
  Mask() = default;
  IIN_FAST_INLINE explicit Mask(Vec lanes) : v(lanes) {}
  IIN_FAST_INLINE Mask(bool all) : v(Vec{} - static_cast<decltype(v[0] + 0)>(all)) {}

  friend IIN_FAST_INLINE Mask operator&(Mask a, Mask b) { return Mask(a.v & b.v); }
  friend IIN_FAST_INLINE Mask operator|(Mask a, Mask b) { return Mask(a.v | b.v); }
  friend IIN_FAST_INLINE Mask operator!(Mask a) { return Mask(~a.v); }
};

template <class T> struct Pack {
  vec<T> v;
  Pack() = default;
  IIN_FAST_INLINE explicit Pack(vec<T> lanes) : v(lanes) {}
  IIN_FAST_INLINE Pack(T value) : v(broadcast(value)) {}

  static IIN_FAST_INLINE Pack load(const T *p) { return Pack(IIN_FAST_ISA::load(p)); }
  IIN_FAST_INLINE void store(T *p) const { IIN_FAST_ISA::store(p, v); }

  friend IIN_FAST_INLINE Pack operator+(Pack a, Pack b) { return Pack(a.v + b.v); }
  friend IIN_FAST_INLINE Pack operator-(Pack a, Pack b) { return Pack(a.v - b.v); }
  friend IIN_FAST_INLINE Pack operator*(Pack a, Pack b) { return Pack(a.v * b.v); }
  friend IIN_FAST_INLINE Pack operator/(Pack a, Pack b) { return Pack(a.v / b.v); }
  friend IIN_FAST_INLINE Pack operator-(Pack a) { return Pack(-a.v); }
  friend IIN_FAST_INLINE Pack operator&(Pack a, Pack b) { return Pack(a.v & b.v); }
  friend IIN_FAST_INLINE Pack operator<<(Pack a, int n) { return Pack(a.v << n); }
  friend IIN_FAST_INLINE Pack operator>>(Pack a, int n) { return Pack(a.v >> n); }
  IIN_FAST_INLINE Pack &operator+=(Pack b) { return *this = *this + b; }
  IIN_FAST_INLINE Pack &operator*=(Pack b) { return *this = *this * b; }

  friend IIN_FAST_INLINE Mask<T> operator<(Pack a, Pack b) { return Mask<T>(a.v < b.v); }
  friend IIN_FAST_INLINE Mask<T> operator>(Pack a, Pack b) { return Mask<T>(a.v > b.v); }
  friend IIN_FAST_INLINE Mask<T> operator<=(Pack a, Pack b) { return Mask<T>(a.v <= b.v); }
  friend IIN_FAST_INLINE Mask<T> operator>=(Pack a, Pack b) { return Mask<T>(a.v >= b.v); }
  friend IIN_FAST_INLINE Mask<T> operator==(Pack a, Pack b) { return Mask<T>(a.v == b.v); }
};

// What math.h needs of a type that is no number.
template <class T> IIN_FAST_INLINE Pack<T> choose(Mask<T> condition, Pack<T> yes, Pack<T> no) {
  return Pack<T>(condition.v ? yes.v : no.v);
}
template <class T> IIN_FAST_INLINE Pack<T> root_of(Pack<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return Pack<T>(reinterpret_cast<vec<T>>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x.v))));
  else
    return Pack<T>(reinterpret_cast<vec<T>>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x.v))));
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4)
    return Pack<T>(reinterpret_cast<vec<T>>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x.v))));
  else
    return Pack<T>(reinterpret_cast<vec<T>>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x.v))));
#else
  for (int l = 0; l < lanes<T>; ++l)
    x.v[l] = math::sqrt(T(x.v[l]));
  return x;
#endif
}

} // namespace
} // namespace IIN_FAST_ISA

namespace math {
template <class T> struct Float<IIN_FAST_ISA::Pack<T>> : Float<T> {
  using Int = IIN_FAST_ISA::Pack<typename Float<T>::Int>;
};
} // namespace math
} // namespace iin_fast
