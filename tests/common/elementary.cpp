// The elementary functions of csrc/common/math.h as loops over arrays, for tests/common/test_math.py.
#include <cstdint>

#include "common/math.h"

namespace iin_fast {
namespace math {
template <class T> IIN_FAST_HD T normal_cdf(T x) { return normal(x).cdf; }
template <class T> IIN_FAST_HD T normal_density(T x) { return normal(x).density; }
} // namespace math
} // namespace iin_fast

#define LOOP(name, T)                                                                                                  \
  extern "C" void name##_##T(const T *__restrict x, T *__restrict y, int64_t count) {                                  \
    _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) y[i] = iin_fast::math::name(x[i]);                         \
  }
#define LOOPS(name) LOOP(name, float) LOOP(name, double)
LOOPS(exp)
LOOPS(exp_below_zero)
LOOPS(log)
LOOPS(tanh)
LOOPS(sigmoid)
LOOPS(atan)
LOOPS(softplus)
LOOPS(normal_cdf)
LOOPS(normal_density)

// float16 rows of csrc/common/half.h, as the kernels read and write them.
#include "common/half.h"

extern "C" void from_half(const iin_fast::Half *rows, float *values, int64_t count) {
  iin_fast::load(rows, values, count);
}

extern "C" void to_half(const float *values, iin_fast::Half *rows, int64_t count) {
  iin_fast::store(values, rows, count);
}
