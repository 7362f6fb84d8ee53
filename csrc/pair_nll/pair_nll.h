// The factor loss of a pair (Esser et al. 2020, Sec. 3.2), element by element, for host and device.
//
//   loss = sum ½ a² - logdet_a + sum ½ (b - m ρ a)² / (1 - m ρ²) - logdet_b, m = 1 where the element's factor is shared
//
// The reference is iin_fast/ops/pair_nll/reference.py.
#pragma once

#include "common/math.h"

namespace iin_fast {

// What a factor contributes per element depends on whether it is shared, through these two numbers only.
template <class T> struct FactorWeights {
  T correlation; // m ρ
  T precision;   // 1 / (1 - m ρ²)
};

template <class T> IIN_FAST_HD FactorWeights<T> factor_weights(bool shared, T rho) {
  return {shared ? rho : T(0), shared ? T(1) / (T(1) - rho * rho) : T(1)};
}

template <class T> IIN_FAST_HD T pair_energy(T a, T b, FactorWeights<T> w) {
  const T difference = b - w.correlation * a;
  return T(0.5) * (a * a + difference * difference * w.precision);
}

// Gradients of the energy, times `grad`.
template <class T> IIN_FAST_HD void pair_energy_backward(T a, T b, FactorWeights<T> w, T grad, T &grad_a, T &grad_b) {
  const T pull = (b - w.correlation * a) * w.precision;
  grad_b = grad * pull;
  grad_a = grad * (a - w.correlation * pull);
}

} // namespace iin_fast
