// The factor loss of a pair (Esser et al. 2020, Sec. 3.2), element by element, for host and device.
//
//   loss = sum ½ a² - logdet_a + sum ½ (b - m ρ a)² / (1 - m ρ²) - logdet_b, m = 1 where the element's factor is shared
//
// The reference is iin_fast/ops/pair_nll/reference.py.
#pragma once

#include "common/math.h"

namespace iin_fast {

// What a factor contributes per element depends on whether it is shared, through these numbers only. The defaults are
// those of a factor that is not.
template <class T> struct FactorWeights {
  T m = 0;
  T correlation = 0; // m ρ
  T rest = 0;        // m (1 - ρ)
  T precision = 1;   // 1 / (1 - m ρ²)
};

// Those of a shared factor. In float32 ρ and 1 would be the same number for ρ next to 1.
template <class T> IIN_FAST_HD FactorWeights<T> shared_weights(double rho) {
  return {T(1), T(rho), T(1 - rho), T(1 / ((1 - rho) * (1 + rho)))};
}

// ½ log (1 - ρ²)
IIN_FAST_HD double half_log_variance(double rho) { return 0.5 * std::log((1 - rho) * (1 + rho)); }

// b - m ρ a, whose first difference is exact where b is near a.
template <class T> IIN_FAST_HD T pair_difference(T a, T b, FactorWeights<T> w) { return (b - w.m * a) + w.rest * a; }

template <class T> IIN_FAST_HD T pair_energy(T a, T b, FactorWeights<T> w) {
  const T difference = pair_difference(a, b, w);
  return T(0.5) * (a * a + difference * difference * w.precision);
}

// Gradients of the energy, times `grad`.
template <class T> IIN_FAST_HD void pair_energy_backward(T a, T b, FactorWeights<T> w, T grad, T &grad_a, T &grad_b) {
  const T pull = pair_difference(a, b, w) * w.precision;
  grad_b = grad * pull;
  grad_a = grad * (a - w.correlation * pull);
}

} // namespace iin_fast
