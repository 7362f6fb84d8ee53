// Affine coupling on a GPU: one pass over each row, log-det summed on the way.
//
//   forward:  y = x exp(s) + t, logdet[row] = sum of s       (inverse: x = (y - t) exp(-s), logdet = -sum of s)
//   backward: the gradients of x, raw and t from those of y and of the log-det; no sum over the row
//
// Bytes an element: forward reads x, raw and shift and writes y, 16 in float32 and 8 in 16-bit types; backward reads
// value, raw and grad_y and writes three gradients, 24 and 12. Squash::none moves a third less. Bound by memory.
// Threads: common/rows.cuh. The squash and the direction are the same for the whole launch, so they are a switch around
// each vector instead of ten kernels: a jump that all threads take together, hidden behind the memory access.
//
// The launch functions at the end choose kernel and grid. They take the launcher as an argument, so that nothing here
// depends on torch: affine_coupling_cuda.cu passes the CUDA runtime's.
#pragma once

#include "affine_coupling/affine_coupling.h"
#include "common/rows.cuh"
#include "common/sum.h"

namespace iin_fast {

template <class Storage> struct DeviceCouplingForward {
  DeviceRows<const Storage> x, raw, shift; // raw.data is null for Squash::none
  Storage *y;                              // [rows, features]
  compute_t<Storage> *logdet;              // [rows]
  compute_t<Storage> *partial;             // [rows, parts], or null if parts is 1
  int64_t rows, features;
  double clamp;
  Squash squash;
  bool inverse;
};

template <class Storage> struct DeviceCouplingBackward {
  DeviceRows<const Storage> value, raw, grad_y; // raw.data is null for Squash::none
  const compute_t<Storage> *grad_logdet;        // [rows]
  Storage *grad_x, *grad_raw, *grad_shift;      // [rows, features]; grad_raw is null for Squash::none
  int64_t rows, features;
  double clamp;
  Squash squash;
  bool inverse;
};

template <class Storage, int vector>
__global__ void __launch_bounds__(row_threads)
    coupling_forward_kernel(const DeviceCouplingForward<Storage> job, const int log_lanes) {
  using T = compute_t<Storage>;
  __shared__ T warp_sums[row_threads / warp_lanes];
  const T clamp = static_cast<T>(job.clamp);
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1), rows_per_block = row_threads >> log_lanes;
  const int64_t rows_per_grid = static_cast<int64_t>(gridDim.x) * rows_per_block;
  const int64_t step = static_cast<int64_t>(gridDim.y) * lanes * vector;
  T *const sums = gridDim.y > 1 ? job.partial : job.logdet;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block; first < job.rows; first += rows_per_grid) {
    const int64_t row = first + (threadIdx.x >> log_lanes);
    const bool valid = row < job.rows; // all threads stay to the sum, whether they have a row or not
    CompensatedSum<T> sum;
    if (valid) {
      const Storage *const x_row = job.x[row], *const raw_row = job.raw[row], *const shift_row = job.shift[row];
      Storage *const y_row = job.y + row * job.features;
      for (int64_t at = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * vector; at < job.features; at += step) {
        T x[vector], raw[vector] = {}, shift[vector];
        load_vector<vector>(x_row + at, x);
        if (job.squash != Squash::none)
          load_vector<vector>(raw_row + at, raw);
        load_vector<vector>(shift_row + at, shift);
        with_constants(job.squash, job.inverse, [&](auto squash, auto inverse) {
#pragma unroll
          for (int i = 0; i < vector; ++i) {
            T logdet;
            x[i] = couple<decltype(squash)::value, decltype(inverse)::value>(x[i], raw[i], shift[i], clamp, logdet);
            sum.add(logdet);
          }
        });
        store_vector<vector>(x, y_row + at);
      }
    }
    const T total = sum_over_lanes(sum.total(), lanes, warp_sums);
    if (valid && lane == 0)
      sums[row * gridDim.y + blockIdx.y] = total;
  }
}

template <class Storage, int vector>
__global__ void __launch_bounds__(row_threads)
    coupling_backward_kernel(const DeviceCouplingBackward<Storage> job, const int log_lanes) {
  using T = compute_t<Storage>;
  const T clamp = static_cast<T>(job.clamp);
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1), rows_per_block = row_threads >> log_lanes;
  const int64_t rows_per_grid = static_cast<int64_t>(gridDim.x) * rows_per_block;
  const int64_t step = static_cast<int64_t>(gridDim.y) * lanes * vector;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + (threadIdx.x >> log_lanes); row < job.rows;
       row += rows_per_grid) {
    const T grad_logdet = __ldg(job.grad_logdet + row);
    const Storage *const value_row = job.value[row], *const raw_row = job.raw[row], *const grad_row = job.grad_y[row];
    const int64_t out = row * job.features;
    for (int64_t at = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * vector; at < job.features; at += step) {
      T value[vector], raw[vector] = {}, grad_y[vector];
      load_vector<vector>(value_row + at, value);
      if (job.squash != Squash::none)
        load_vector<vector>(raw_row + at, raw);
      load_vector<vector>(grad_row + at, grad_y);
      with_constants(job.squash, job.inverse, [&](auto squash, auto inverse) {
#pragma unroll
        for (int i = 0; i < vector; ++i) {
          const CouplingGradient<T> g = couple_backward<decltype(squash)::value, decltype(inverse)::value>(
              value[i], raw[i], clamp, grad_y[i], grad_logdet);
          value[i] = g.x;
          raw[i] = g.raw;
          grad_y[i] = g.shift;
        }
      });
      store_vector<vector>(value, job.grad_x + out + at);
      if (job.squash != Squash::none)
        store_vector<vector>(raw, job.grad_raw + out + at);
      store_vector<vector>(grad_y, job.grad_shift + out + at);
    }
  }
}

template <class Storage> int coupling_vector(const DeviceCouplingForward<Storage> &job) {
  return fits_wide_vectors<const Storage>(job.features, {job.x, job.raw, job.shift, {job.y, job.features}})
             ? wide_vector<Storage>
             : 1;
}

template <class Storage> int coupling_vector(const DeviceCouplingBackward<Storage> &job) {
  return fits_wide_vectors<const Storage>(job.features, {job.value,
                                                         job.raw,
                                                         job.grad_y,
                                                         {job.grad_x, job.features},
                                                         {job.grad_raw, job.features},
                                                         {job.grad_shift, job.features}})
             ? wide_vector<Storage>
             : 1;
}

// launch(kernel, grid, block, arguments...) starts a kernel. job.partial must be there if plan.parts > 1.
template <class Storage, class Launch>
void launch_coupling_forward(const DeviceCouplingForward<Storage> &job, const RowPlan &plan, Launch &&launch) {
  using T = compute_t<Storage>;
  if (job.rows == 0)
    return;
  const auto kernel =
      plan.vector > 1 ? coupling_forward_kernel<Storage, wide_vector<Storage>> : coupling_forward_kernel<Storage, 1>;
  launch(kernel, dim3(plan.blocks, plan.parts), dim3(row_threads), job, plan.log_lanes);
  if (plan.parts > 1) {
    const T *partial = job.partial;
    constexpr int rows_per_block = row_threads / warp_lanes;
    // the rows of a shared plan are fewer than the blocks that fill the GPU
    const unsigned blocks = static_cast<unsigned>((job.rows + rows_per_block - 1) / rows_per_block);
    launch(sum_parts_kernel<T>, dim3(blocks), dim3(row_threads), partial, job.logdet, job.rows,
           static_cast<int>(plan.parts));
  }
}

template <class Storage, class Launch>
void launch_coupling_backward(const DeviceCouplingBackward<Storage> &job, const RowPlan &plan, Launch &&launch) {
  if (job.rows == 0 || job.features == 0)
    return;
  const auto kernel =
      plan.vector > 1 ? coupling_backward_kernel<Storage, wide_vector<Storage>> : coupling_backward_kernel<Storage, 1>;
  launch(kernel, dim3(plan.blocks, plan.parts), dim3(row_threads), job, plan.log_lanes);
}

} // namespace iin_fast
