// Sums over long rows, right to the rounding of their type up to a million terms and beyond, for host and device.
//
// Added one by one, n equal float32 terms lose up to n / 2 units in the last place. Here
//
//   add_terms          a loop of the host adds its terms in float64, in short blocks whose sums are compensated
//   CompensatedSum     a sum that keeps the rounding errors of its additions: what a thread of a GPU adds terms to
//
// Cost on the host: two conversions and two additions a vector of float32, one addition a vector of float64.
#pragma once

#include "common/math.h"

namespace iin_fast {

// Knuth's TwoSum: value + lost is the sum, whatever the order and the signs. Infinite and NaN sums stay what they are.
template <class T> struct CompensatedSum {
  T value = 0, lost = 0;

  IIN_FAST_HD void add(T term) {
    const T sum = value + term, added = sum - value;
    lost += (value - (sum - added)) + (term - added);
    value = sum;
  }
  // Of an infinite sum `lost` is NaN.
  IIN_FAST_HD T total() const {
    return math::select(math::abs(value) <= T(math::Limits<T>::max()), value + lost, value);
  }
};

// Terms of type T between two compensations. Equal float64 terms err by up to a unit for each two of them in a lane,
// and SSE2 has two lanes; float32 terms in a float64 sum have 29 bits to spare.
template <class T> constexpr int64_t terms_of_block = sizeof(T) == 8 ? 16 : 1024;

// sum += term(0) + … + term(count - 1), as vector code if `term` is inlined: it should be always_inline.
template <class T, class F>
inline __attribute__((always_inline)) void add_terms(CompensatedSum<double> &sum, int64_t count, F &&term) {
  for (int64_t start = 0; start < count; start += terms_of_block<T>) {
    const int64_t end = count - start < terms_of_block<T> ? count : start + terms_of_block<T>;
    double part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i)
      part += static_cast<double>(term(i));
    sum.add(part);
  }
}

} // namespace iin_fast
