// machine_peaks: what the threads of this process reach together. For benchmarks.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "common/tensor.h"
#include "peak/peak_loops.h"

namespace iin_fast {
namespace {

template <class F> double seconds(const F &f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// (GFLOP/s of float32 multiply-adds on registers, GB/s of reading `data`), each the best of a few tries.
std::tuple<double, double> machine_peaks(const Tensor &data) {
  STD_TORCH_CHECK(data.scalar_type() == ScalarType::Float && data.is_contiguous(),
                  "machine_peaks: data must be contiguous float32");
  const int64_t threads = torch::stable::get_num_threads(), count = data.numel();
  const float *from = static_cast<const float *>(data.const_data_ptr());
  std::atomic<float> sink{0};
  const auto on_all = [&](auto &&body) {
    return seconds([&] {
      torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          body(t);
      });
    });
  };
  double flops = 0, bytes = 0;
  for (int attempt = 0; attempt < 10; ++attempt) {
    std::atomic<double> done{0};
    const double products = on_all([&](int64_t) {
      float own = 0;
      const double operations = IIN_FAST_LOOP(peak_multiply_adds)(2000000, &own);
      sink = sink + own;
      for (double seen = done; !done.compare_exchange_weak(seen, seen + operations);) {
      }
    });
    flops = std::max(flops, done / products);
    const double reading = on_all([&](int64_t t) {
      const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
      sink = sink + IIN_FAST_LOOP(peak_read)(from + begin, end - begin);
    });
    bytes = std::max(bytes, sizeof(float) * static_cast<double>(count) / reading);
  }
  return {flops / 1e9, bytes / 1e9};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iin_fast, m) { m.def("machine_peaks(Tensor data) -> (float, float)"); }

STABLE_TORCH_LIBRARY_IMPL(iin_fast, CPU, m) { m.impl("machine_peaks", TORCH_BOX(&machine_peaks)); }

} // namespace iin_fast
