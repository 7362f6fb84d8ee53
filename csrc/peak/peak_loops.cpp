// What this machine can do at most, for the floors of the benchmarks: multiply-adds in float32 on registers, and
// reading.
#include "peak/peak_loops.h"

namespace iin_fast {
namespace IIN_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int width = 16, chains = 24;
#elif defined(__AVX2__)
constexpr int width = 8, chains = 12;
#else
constexpr int width = 4, chains = 12;
#endif
typedef float Vector __attribute__((vector_size(4 * width)));

} // namespace

double peak_multiply_adds(int64_t rounds, float *sink) {
  Vector sum[chains], factor = {}, term = {};
  factor += 0.999f;
  term += 0.001f;
  // every loop over the chains is unrolled, so that they stay in registers; they are independent, and more than the
  // units have stages
#pragma GCC unroll 24
  for (int i = 0; i < chains; ++i)
    sum[i] = term * static_cast<float>(i + 1);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < chains; ++i)
      sum[i] = sum[i] * factor + term;
  }
  Vector total = {};
#pragma GCC unroll 24
  for (int i = 0; i < chains; ++i)
    total += sum[i];
  for (int i = 0; i < width; ++i)
    *sink += total[i];
  return 2.0 * chains * width * static_cast<double>(rounds);
}

float peak_read(const float *data, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i)
    sum += data[i];
  return sum;
}

} // namespace IIN_FAST_ISA
} // namespace iin_fast
