// Elementary functions for host and device.
//
// On the device they are CUDA's own. On the host they are written without branches and calls: a plain loop over them
// becomes vector code for whatever instruction set the file is compiled for, and they take a Pack (pack.h) as well as a
// number. Range reduction plus Taylor series; the number of terms is what brings the truncation error below a tenth of
// the type's rounding error on the reduced range.
//
// Accuracy: exp, log, softplus and atan 2 ulp, tanh, sigmoid and the normal density 3 ulp, its distribution function 5
// ulp, over the whole range
// (tests/common/test_math.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define IIN_FAST_HD __host__ __device__ __forceinline__
#else
#define IIN_FAST_HD inline __attribute__((always_inline))
#endif

namespace iin_fast {
namespace math {

template <class T> struct Float;

// Of the type that T is made of.
template <class T> using Limits = std::numeric_limits<typename Float<T>::Scalar>;

// What a comparison of two T gives.
template <class T> using Truth = decltype(T() < T());

template <> struct Float<float> {
  using Scalar = float;
  using Int = int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Int bias = 127;
  static constexpr float round_magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float exp_low = -104.0f, exp_high = 89.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f; // high part exact in 9 bits
  static constexpr int exp_terms = 7, log_terms = 6, log1p_terms = 8, atan_terms = 9;
};

template <> struct Float<double> {
  using Scalar = double;
  using Int = int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Int bias = 1023;
  static constexpr double round_magic = 6755399441055744.0; // 1.5 * 2^52
  static constexpr double exp_low = -746.0, exp_high = 710.0;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr int exp_terms = 14, log_terms = 12, log1p_terms = 17, atan_terms = 21;
};

template <class To, class From> IIN_FAST_HD To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

// condition ? yes : no, as a mask: a ternary can come back from the optimiser as a jump, which stops vectorisation.
template <class C, class T> IIN_FAST_HD T select(C condition, T yes, T no) {
#if defined(__CUDA_ARCH__)
  return condition ? yes : no;
#else
  if constexpr (std::is_convertible_v<C, bool>) {
    using Int = typename Float<T>::Int;
    const Int mask = -static_cast<Int>(static_cast<bool>(condition));
    return bits<T>((bits<Int>(yes) & mask) | (bits<Int>(no) & ~mask));
  } else {
    return choose(condition, yes, no);
  }
#endif
}

// 2^n for n in the range of normal numbers; some number for any other.
template <class T> IIN_FAST_HD T power_of_two(typename Float<T>::Int n) {
  using F = Float<T>;
  using Int = typename F::Int;
  if constexpr (std::is_integral_v<Int>) { // a shift of negative numbers is not defined
    using Bits = std::make_unsigned_t<Int>;
    return bits<T>((static_cast<Bits>(n) + F::bias) << F::mantissa_bits);
  } else {
    return bits<T>((n + Int(F::bias)) << F::mantissa_bits);
  }
}

constexpr double reciprocal_factorial(int k) { return k <= 1 ? 1.0 : reciprocal_factorial(k - 1) / k; }

// Coefficients of the series below, as constants that a fused multiply-add takes.
template <class T, double (*coefficient)(int), int terms> struct Series {
  using Scalar = typename Float<T>::Scalar;
  Scalar at[terms + 1];
  constexpr Series() : at{} {
    for (int k = 0; k <= terms; ++k)
      at[k] = static_cast<Scalar>(coefficient(k));
  }
  // sum of at[k] x^(k - 1) over k = 1 … terms
  template <class X> IIN_FAST_HD X operator()(X x) const {
    X sum = X(at[terms]);
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 32
#endif
    for (int k = terms - 1; k >= 1; --k)
      sum = sum * x + X(at[k]);
    return sum;
  }
};

constexpr double odd_reciprocal(int k) { return 1.0 / (2 * k + 1); }
constexpr double odd_reciprocal_in_turn(int k) { return (k % 2 == 0 ? 1.0 : -1.0) / (2 * k + 1); }

// exp(r) - 1 for |r| <= ln(2) / 2.
template <class T> IIN_FAST_HD T expm1_reduced(T r) {
  constexpr Series<T, reciprocal_factorial, Float<T>::exp_terms> series;
  return series(r) * r;
}

// x = n ln 2 + r. NaN stays NaN in r.
template <class T> IIN_FAST_HD T reduce_exp(T x, typename Float<T>::Int &n) {
  using F = Float<T>;
  using Int = typename F::Int;
  const T magic = T(F::round_magic), shifted = x * T(1.4426950408889634074) + magic;
  n = bits<Int>(shifted) - bits<Int>(magic);
  const T whole = shifted - magic;
  return (x - whole * T(F::ln2_high)) - whole * T(F::ln2_low);
}

template <class T> IIN_FAST_HD T exp(T x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  using F = Float<T>;
  x = select(x < T(F::exp_low), T(F::exp_low), x); // comparisons are false for NaN, which passes through
  x = select(x > T(F::exp_high), T(F::exp_high), x);
  typename F::Int n;
  const T r = reduce_exp(x, n);
  const typename F::Int half = n >> 1; // two factors, since 2^n may lie outside the normal numbers
  return (expm1_reduced(r) + T(1)) * power_of_two<T>(half) * power_of_two<T>(n - half);
#endif
}

// exp(x) for x <= 0, in fewer steps; what would be below the normal numbers comes out as the smallest of them.
template <class T> IIN_FAST_HD T exp_below_zero(T x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  const T lowest = T(typename Float<T>::Scalar(1 - Float<T>::bias)) * T(0.69314718055994530942);
  x = select(x < lowest, lowest, x); // NaN passes through
  typename Float<T>::Int n;
  const T r = reduce_exp(x, n);
  return (expm1_reduced(r) + T(1)) * power_of_two<T>(n);
#endif
}

// exp(x) - 1 without cancellation, for x in [-80, 80].
template <class T> IIN_FAST_HD T expm1_bounded(T x) {
  typename Float<T>::Int n;
  const T r = reduce_exp(x, n);
  const T scale = power_of_two<T>(n);
  return expm1_reduced(r) * scale + (scale - T(1));
}

// Without the sign bit: no comparison that could come back as a jump.
template <class T> IIN_FAST_HD T abs(T x) {
#if defined(__CUDA_ARCH__)
  return ::fabs(x);
#else
  using Int = typename Float<T>::Int;
  using Word = typename Float<typename Float<T>::Scalar>::Int;
  return bits<T>(bits<Int>(x) & Int(std::numeric_limits<Word>::max()));
#endif
}

template <class T> IIN_FAST_HD T sqrt(T x) {
#if defined(__CUDA_ARCH__)
  return ::sqrt(x);
#else
  if constexpr (std::is_same_v<T, float>)
    return __builtin_sqrtf(x);
  else if constexpr (std::is_same_v<T, double>)
    return __builtin_sqrt(x);
  else
    return root_of(x);
#endif
}

template <class T> IIN_FAST_HD T tanh(T x) {
#if defined(__CUDA_ARCH__)
  return ::tanh(x);
#else
  T magnitude = abs(x);
  magnitude = select(magnitude > T(22), T(22), magnitude); // tanh is 1 to the last bit there
  const T e = expm1_bounded(T(-2) * magnitude);
  const T result = -e / (T(2) + e);
  return select(x < T(0), -result, result);
#endif
}

template <class T> IIN_FAST_HD T sigmoid(T x) {
#if defined(__CUDA_ARCH__)
  return T(1) / (T(1) + ::exp(-x));
#else
  return T(1) / (T(1) + exp(-x));
#endif
}

// log(x). 0 gives -inf, negative numbers NaN.
template <class T> IIN_FAST_HD T log(T x) {
#if defined(__CUDA_ARCH__)
  return ::log(x);
#else
  using F = Float<T>;
  using Int = typename F::Int;
  using Word = typename Float<typename F::Scalar>::Int;
  const auto subnormal = x < T(Limits<T>::min());
  const T normal = select(subnormal, x * power_of_two<T>(Int(F::mantissa_bits)), x);
  // m in [sqrt(1/2), sqrt(2)), normal = m 2^n
  const Int offset = bits<Int>(T(0.70710678118654752440));
  const Int above = bits<Int>(normal) - offset, n = above >> F::mantissa_bits;
  const T m = bits<T>(bits<Int>(normal) - (above & Int(~((Word(1) << F::mantissa_bits) - 1))));
  const T s = (m - T(1)) / (m + T(1)), square = s * s;
  constexpr Series<T, odd_reciprocal, F::log_terms> series;
  const T sum = square * series(square); // 2 atanh(s) = 2 s (1 + s^2/3 + s^4/5 + ...)
  const T magic = T(F::round_magic), exponent = bits<T>(bits<Int>(magic) + n) - magic;
  const T whole = exponent - select(subnormal, T(F::mantissa_bits), T(0));
  const T result = whole * T(F::ln2_high) + (T(2) * s + (T(2) * s * sum + whole * T(F::ln2_low)));
  const T infinity = T(Limits<T>::infinity());
  const T edge = select(x < T(0), T(Limits<T>::quiet_NaN()), select(x == T(0), -infinity, x)); // or inf, or NaN
  return select((x > T(0)) & (x <= T(Limits<T>::max())), result, edge);
#endif
}

// log(1 + exp(x)), without overflow or cancellation.
template <class T> IIN_FAST_HD T softplus(T x) {
#if defined(__CUDA_ARCH__)
  return (x > T(0) ? x : T(0)) + ::log1p(::exp(x > T(0) ? -x : x));
#else
  const T e = exp(select(x > T(0), -x, x)); // in [0, 1]
  const T s = e / (T(2) + e), square = s * s;
  constexpr Series<T, odd_reciprocal, Float<T>::log1p_terms> series;
  // log(1 + e) = 2 atanh(s) = 2 s (1 + sum), s <= 1/3, with 2 s = e - s e: rounding of s counts less
  const T sum = square * series(square);
  return select(x > T(0), x, T(0)) + (e - s * (e - T(2) * sum));
#endif
}

template <class T> IIN_FAST_HD T atan(T x) {
#if defined(__CUDA_ARCH__)
  return ::atan(x);
#else
  const T magnitude = abs(x);
  // [0, tan(pi/8)], (tan(pi/8), tan(3pi/8)], beyond: three offsets, one series on |u| <= tan(pi/8)
  const auto far = magnitude > T(2.41421356237309504880), middle = magnitude > T(0.41421356237309504880);
  const T numerator = select(far, T(-1), select(middle, magnitude - T(1), magnitude));
  const T denominator = select(far, magnitude, select(middle, magnitude + T(1), T(1)));
  constexpr long double half_pi = 1.57079632679489661923L, quarter_pi = 0.78539816339744830962L;
  const T offset = select(far, T(half_pi), select(middle, T(quarter_pi), T(0)));
  using Scalar = typename Float<T>::Scalar;
  const T offset_low =
      select(far, T(half_pi - Scalar(half_pi)), select(middle, T(quarter_pi - Scalar(quarter_pi)), T(0)));
  const T u = numerator / denominator, square = u * u;
  constexpr Series<T, odd_reciprocal_in_turn, Float<T>::atan_terms> series;
  const T sum = square * series(square); // atan(u) = u (1 - u^2/3 + u^4/5 - ...)
  const T result = offset + (u + (u * sum + offset_low));
  return select(x < T(0), -result, result);
#endif
}

// Phi(-a) exp(a^2 / 2) = P(a) / (c a P(a) + S(a)) for a in [0, 13.2] (float) or [0, 37.6] (double), Phi the standard
// normal's distribution function: a rational minimax fit (Remez' exchange in 70 digits; relative error 5e-9 and 5e-17),
// written so that rounding in P cancels where a is large.
template <class T> constexpr double normal_numerator(int k) {
  constexpr double few[] = {1.0, 0.87092316903, 0.36228244880, 0.079857219575, 0.0080239993045};
  constexpr double many[] = {1.00000000000000000,  1.547931828991824,    1.185463296842398,    0.5767885226171108,
                             0.1945569176697836,   4.698785762697873e-2, 8.124085072799877e-3, 9.729541671443867e-4,
                             7.379331389768617e-5, 2.739603638182829e-6};
  return Float<T>::mantissa_bits == 23 ? few[k] : many[k];
}
template <class T> constexpr double normal_rest(int k) {
  constexpr double few[] = {2.0, 0.83102412312, 0.20454005896, 0.019792643007, 0.000017826033832};
  constexpr double many[] = {2.00000000000000000,  2.185004504949764,     1.234218263710892,    0.4487952328247249,
                             0.1129726068939764,   1.999409173140647e-2,  2.425100999929217e-3, 1.849723827511902e-4,
                             6.867168371396977e-6, -5.418012681287892e-15};
  return Float<T>::mantissa_bits == 23 ? few[k] : many[k];
}

// The standard normal's distribution function (5 ulp) and density (3 ulp) at x while they are normal numbers, 0 beyond.
template <class T> struct Normal {
  T cdf, density;
};
template <class T> IIN_FAST_HD Normal<T> normal(T x) {
  const T density_at_0 = T(0.39894228040143267794);
#if defined(__CUDA_ARCH__)
  return {T(0.5) * (T(1) + ::erf(x * T(0.70710678118654752440))), density_at_0 * ::exp(T(-0.5) * x * x)};
#else
  using F = Float<T>;
  constexpr bool single = F::mantissa_bits == 23;
  constexpr int terms = single ? 4 : 9;
  const T highest = T(single ? 13.2 : 37.6), c = T(single ? 2.50659203529357910 : 2.50662827463959603);
  const T magnitude = abs(x);
  const auto beyond = magnitude > highest;
  const T a = select(beyond, highest, magnitude); // NaN passes through
  // a^2 / 2 rounded would cost exp up to a^2 / 4 ulp. The square of a's first digits is exact, and the rest is small.
  const T magic = T(F::round_magic / (single ? 256 : 1048576));
  const T high = (a + magic) - magic;
  typename F::Int n;
  const T r = reduce_exp(T(-0.5) * high * high, n) - T(0.5) * (a - high) * (a + high);
  const T e = select(beyond, T(0), (expm1_reduced(r) + T(1)) * power_of_two<T>(n));
  constexpr Series<T, normal_numerator<T>, terms> numerator;
  constexpr Series<T, normal_rest<T>, terms> rest;
  const T p = numerator(a) * a + T(numerator.at[0]);
  const T below = e * (p / (c * a * p + (rest(a) * a + T(rest.at[0]))));
  return {select(x > T(0), T(1) - below, below), density_at_0 * e};
#endif
}

} // namespace math
} // namespace iin_fast
