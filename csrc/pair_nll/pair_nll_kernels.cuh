// The factor loss on a GPU: both samples of a pair in one pass, summed on the way.
//
//   forward:  loss[row] = sum of ½ a² + ½ (b - m ρ a)² / (1 - m ρ²), less both log-dets   (m: the element's factor is
//   shared) backward: the gradients of both samples from that of the loss; no sum over the row
//
// Bytes an element of the pair: forward reads 8 in float32, 4 in 16-bit types, and writes one number a row; backward
// reads as much and writes as much. Bound by memory. Threads: common/rows.cuh; an element's factor is found by walking
// on from that of the lane's last one.
//
// The ends of the factors travel as kernel arguments, so that nothing is copied to the device and a launch can be
// captured in a graph. An argument holds 64 of them; more factors take one launch for each 64.
#pragma once

#include "common/rows.cuh"
#include "common/sum.h"
#include "pair_nll/pair_nll.h"

namespace iin_fast {

constexpr int factors_per_launch = 64;

// Neighbouring factors: factor `first` + k ends before element end[k], the first one begins at element `begin`.
struct FactorRange {
  int64_t begin;
  int first, count;
  int64_t end[factors_per_launch];
};

template <class Storage> struct DevicePairNll {
  DeviceRows<const Storage> za, zb;              // [rows, dim]
  const compute_t<Storage> *logdet_a, *logdet_b; // [rows]
  const bool *shared;                            // [rows, factors]
  compute_t<Storage> *loss;                      // [rows]
  int64_t rows, dim, factors;
  double rho;
  bool normalized;
};

template <class Storage> struct DevicePairNllBackward {
  DeviceRows<const Storage> za, zb; // [rows, dim]
  const bool *shared;               // [rows, factors]
  const compute_t<Storage> *grad;   // [rows]
  Storage *grad_za, *grad_zb;       // [rows, dim]
  int64_t rows, dim, factors;
  double rho;
};

// The factor of elements that are asked for in rising order.
template <class T> struct FactorWalk {
  const FactorRange &range;
  const bool *const shared; // of this row
  const FactorWeights<T> when_shared;
  int k;
  int64_t end; // where the present factor ends
  FactorWeights<T> weights;

  __device__ FactorWalk(const FactorRange &range, const bool *shared, FactorWeights<T> when_shared)
      : range(range), shared(shared + range.first), when_shared(when_shared), k(-1), end(range.begin), weights() {}

  __device__ __forceinline__ void go_to(int64_t element) {
    if (element >= end) {
      do
        end = range.end[++k];
      while (element >= end); // past factors of size 0 too
      weights = shared[k] ? when_shared : FactorWeights<T>();
    }
  }

  // f(i, weights) for the elements `at` + i of a vector.
  template <int vector, class F> __device__ __forceinline__ void for_vector(int64_t at, F &&f) {
    go_to(at);
    if (vector == 1 || at + vector <= end) { // one factor, as nearly always
#pragma unroll
      for (int i = 0; i < vector; ++i)
        f(i, weights);
    } else {
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        go_to(at + i);
        f(i, weights);
      }
    }
  }
};

template <class Storage, int vector>
__global__ void __launch_bounds__(row_threads)
    pair_nll_kernel(const DevicePairNll<Storage> job, const __grid_constant__ FactorRange range,
                    const FactorWeights<compute_t<Storage>> when_shared, const compute_t<Storage> log_variance,
                    const int log_lanes) {
  using T = compute_t<Storage>;
  __shared__ T warp_sums[row_threads / warp_lanes];
  constexpr T log_two_pi = T(1.8378770664093454836);
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1), rows_per_block = row_threads >> log_lanes;
  const int64_t rows_per_grid = static_cast<int64_t>(gridDim.x) * rows_per_block;
  const int64_t step = static_cast<int64_t>(lanes) * vector, stop = range.end[range.count - 1];
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block; first < job.rows; first += rows_per_grid) {
    const int64_t row = first + (threadIdx.x >> log_lanes);
    const bool valid = row < job.rows; // all threads stay to the sum, whether they have a row or not
    CompensatedSum<T> sum;
    if (valid) {
      const Storage *const a_row = job.za[row], *const b_row = job.zb[row];
      const bool *const shared = job.shared + row * job.factors;
      FactorWalk<T> walk(range, shared, when_shared);
      for (int64_t at = range.begin + lane * vector; at < stop; at += step) {
        T a[vector], b[vector];
        load_vector<vector>(a_row + at, a);
        load_vector<vector>(b_row + at, b);
        walk.template for_vector<vector>(
            at, [&](int i, FactorWeights<T> weights) { sum.add(pair_energy(a[i], b[i], weights)); });
      }
      if (job.normalized)
        for (int k = lane; k < range.count; k += lanes) {
          const T size = static_cast<T>(range.end[k] - (k > 0 ? range.end[k - 1] : range.begin));
          // a range without a factor has size 0 and no entry in `shared`
          sum.add(size * (log_two_pi + (size > T(0) && shared[range.first + k] ? log_variance : T(0))));
        }
    }
    const T total = sum_over_lanes(sum.total(), lanes, warp_sums);
    if (valid && lane == 0) // the launch of the first factors brings the log-dets, later ones add to its loss
      job.loss[row] = range.first == 0 ? total - job.logdet_a[row] - job.logdet_b[row] : job.loss[row] + total;
  }
}

// Five blocks on a multiprocessor: for one more, nvcc would put values aside on sm_100.
template <class Storage, int vector>
__global__ void __launch_bounds__(row_threads, 5)
    pair_nll_backward_kernel(const DevicePairNllBackward<Storage> job, const __grid_constant__ FactorRange range,
                             const FactorWeights<compute_t<Storage>> when_shared, const int log_lanes) {
  using T = compute_t<Storage>;
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1), rows_per_block = row_threads >> log_lanes;
  const int64_t rows_per_grid = static_cast<int64_t>(gridDim.x) * rows_per_block;
  const int64_t step = static_cast<int64_t>(gridDim.y) * lanes * vector, stop = range.end[range.count - 1];
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + (threadIdx.x >> log_lanes); row < job.rows;
       row += rows_per_grid) {
    const T grad = __ldg(job.grad + row);
    const Storage *const a_row = job.za[row], *const b_row = job.zb[row];
    const int64_t out = row * job.dim;
    FactorWalk<T> walk(range, job.shared + row * job.factors, when_shared);
    for (int64_t at = range.begin + (static_cast<int64_t>(blockIdx.y) * lanes + lane) * vector; at < stop; at += step) {
      T a[vector], b[vector];
      load_vector<vector>(a_row + at, a);
      load_vector<vector>(b_row + at, b);
      walk.template for_vector<vector>(at, [&](int i, FactorWeights<T> weights) {
        const T a_i = a[i], b_i = b[i];
        pair_energy_backward(a_i, b_i, weights, grad, a[i], b[i]);
      });
      store_vector<vector>(a, job.grad_za + out + at);
      store_vector<vector>(b, job.grad_zb + out + at);
    }
  }
}

template <class Storage> int pair_nll_vector(const DevicePairNll<Storage> &job) {
  // with several launches a factor may begin inside a vector
  return job.factors <= factors_per_launch && fits_wide_vectors<const Storage>(job.dim, {job.za, job.zb})
             ? wide_vector<Storage>
             : 1;
}

template <class Storage> int pair_nll_vector(const DevicePairNllBackward<Storage> &job) {
  return job.factors <= factors_per_launch &&
                 fits_wide_vectors<const Storage>(job.dim,
                                                  {job.za, job.zb, {job.grad_za, job.dim}, {job.grad_zb, job.dim}})
             ? wide_vector<Storage>
             : 1;
}

// Calls f with the ranges that cover all factors. Without any factor there is one range, which is empty.
template <class F> void for_each_factor_range(const int64_t *sizes, int64_t factors, F &&f) {
  FactorRange range{};
  int64_t k = 0, end = 0;
  do {
    range.begin = end;
    range.first = static_cast<int>(k);
    range.count = 0;
    while (k < factors && range.count < factors_per_launch)
      range.end[range.count++] = end += sizes[k++];
    if (range.count == 0)
      range.end[range.count++] = end;
    f(range);
  } while (k < factors);
}

// launch(kernel, grid, block, arguments...) starts a kernel. `sizes` [factors] is host memory.
template <class Storage, class Launch>
void launch_pair_nll(const DevicePairNll<Storage> &job, const int64_t *sizes, const RowPlan &plan, Launch &&launch) {
  if (job.rows == 0)
    return;
  const auto kernel = plan.vector > 1 ? pair_nll_kernel<Storage, wide_vector<Storage>> : pair_nll_kernel<Storage, 1>;
  using T = compute_t<Storage>;
  const FactorWeights<T> when_shared = shared_weights<T>(job.rho);
  const auto log_variance = static_cast<T>(half_log_variance(job.rho));
  for_each_factor_range(sizes, job.factors, [&](const FactorRange &range) {
    launch(kernel, dim3(plan.blocks), dim3(row_threads), job, range, when_shared, log_variance, plan.log_lanes);
  });
}

template <class Storage, class Launch>
void launch_pair_nll_backward(const DevicePairNllBackward<Storage> &job, const int64_t *sizes, const RowPlan &plan,
                              Launch &&launch) {
  if (job.rows == 0 || job.dim == 0)
    return;
  const auto kernel =
      plan.vector > 1 ? pair_nll_backward_kernel<Storage, wide_vector<Storage>> : pair_nll_backward_kernel<Storage, 1>;
  const auto when_shared = shared_weights<compute_t<Storage>>(job.rho);
  for_each_factor_range(sizes, job.factors, [&](const FactorRange &range) {
    launch(kernel, dim3(plan.blocks, plan.parts), dim3(row_threads), job, range, when_shared, plan.log_lanes);
  });
}

} // namespace iin_fast
