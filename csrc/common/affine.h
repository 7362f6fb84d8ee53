// A scale and a shift for each feature (ActNorm: Kingma and Dhariwal 2018, Sec. 3.1), and the leaky activation that may
// follow, for host and device. The references are iin_fast/ops/flow/reference.py and
// iin_fast/ops/flow_program/reference.py.
#pragma once

#include "common/math.h"

namespace iin_fast {

// scale (x + shift) where the shift comes first, else scale x + shift; or the inverse.
template <bool shift_first, bool inverse, class T> IIN_FAST_HD T affine(T x, T shift, T scale) {
  if constexpr (inverse)
    return shift_first ? x / scale - shift : (x - shift) / scale;
  else
    return shift_first ? scale * (x + shift) : x * scale + shift;
}

template <class T> struct AffineGradient {
  T x, shift, scale; // scale: without what the log-det adds, ±grad_logdet / scale
};

// `scaled`: what the scale multiplies in the forward map, x or x + shift. Of the inverse map, that is what it computes.
template <bool shift_first, bool inverse, class T>
IIN_FAST_HD AffineGradient<T> affine_backward(T scaled, T scale, T grad) {
  if constexpr (inverse) {
    const T through = grad / scale;
    return {through, shift_first ? -grad : -through, -scaled * through};
  } else {
    const T through = grad * scale;
    return {through, shift_first ? through : grad, grad * scaled};
  }
}

// Scales what is below 0.
template <class T> IIN_FAST_HD T leaky(T x, T slope) { return x < T(0) ? x * slope : x; }
template <class T> IIN_FAST_HD T leaky_inverse(T y, T slope) { return y < T(0) ? y / slope : y; }

} // namespace iin_fast
