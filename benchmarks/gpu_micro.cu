// What only a GPU tells, in a few seconds, as one JSON object: python benchmarks/gpu.py --stages micro, or
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -I csrc -o build/gpu_micro benchmarks/gpu_micro.cu && build/gpu_micro
//
//   barrier_us        a barrier over the grid (cooperative groups), by blocks of 128 threads
//   fence_cycles      __threadfence() after a write, with asynchronous copies in flight and without
//   product_error     error (norm, relative to float64) of products by their depth, "signed" and all "positive"
//   factors;
//                     Tf32x3 with sums kept in the tensor core, and leaving it after 64 of the depth as in the kernels
//   tile_l2_gbytes    bytes a second that blocks read of tiles of 64 × 64, by rows of the left matrix [rows, 512]
//   fma_tflops, copy_gbytes   float32 FMA, and a copy that counts bytes read and written
//
// A call of CUDA that fails ends the program with 1 and a message.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include <cooperative_groups.h>

#include "common/tile.cuh"

using namespace iin_fast;

namespace {

void check(cudaError_t error, const char *what, int line) {
  if (error == cudaSuccess)
    return;
  std::fprintf(stderr, "gpu_micro.cu:%d: %s: %s\n", line, what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call, __LINE__)

template <class T> struct Device {
  T *data = nullptr;
  explicit Device(size_t count) { CHECK(cudaMalloc(&data, count * sizeof(T))); }
  explicit Device(const std::vector<T> &values) : Device(values.size()) {
    CHECK(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Device() { CHECK(cudaFree(data)); }
  Device(const Device &) = delete;
  std::vector<T> read(size_t count) const {
    std::vector<T> values(count);
    CHECK(cudaMemcpy(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
};

std::vector<float> draw(size_t count, bool positive, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(positive ? 0.0f : -1.0f, 1.0f);
  std::vector<float> values(count);
  for (float &value : values)
    value = uniform(generator);
  return values;
}

struct Times {
  double least, median, most;
};

// Milliseconds of a call that launches something.
template <class F> Times time_of(F &&launch, int repeats = 11) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times(repeats);
  launch();
  for (float &time : times) {
    CHECK(cudaEventRecord(begin));
    launch();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&time, begin, end));
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return {times.front(), times[times.size() / 2], times.back()};
}

// {"min": …} of amount / time, or of time / amount.
void print_rate(const char *name, double amount, Times times, const char *after) {
  std::printf("\"%s\": {\"min\": %.5g, \"median\": %.5g, \"max\": %.5g}%s", name, amount / times.most,
              amount / times.median, amount / times.least, after);
}

// Barriers.

__global__ void __launch_bounds__(tile_threads) barriers(int count) {
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  for (int i = 0; i < count; ++i)
    grid.sync();
}

Times barrier_times(int blocks, int count) {
  return time_of([&] {
    void *arguments[] = {&count};
    CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void *>(barriers), dim3(blocks), dim3(tile_threads), arguments));
  });
}

void print_barriers() {
  std::printf("\"barrier_us\": {");
  constexpr int few = 100, many = 1100;
  for (const int blocks : {64, 132, 264}) {
    const Times a = barrier_times(blocks, few), b = barrier_times(blocks, many);
    const double each = 1e3 / (many - few);
    std::printf("\"%d\": {\"min\": %.4g, \"median\": %.4g, \"max\": %.4g}%s", blocks, each * (b.least - a.least),
                each * (b.median - a.median), each * (b.most - a.most), blocks == 264 ? "},\n" : ", ");
  }
}

// Fences.

constexpr int fence_rounds = 64, fence_copies = 10;

// Cycles of a fence in the first thread of each block. Every copy reads bytes that nobody has read before.
__global__ void __launch_bounds__(tile_threads)
    fences(const float *from, float *written, int copies, unsigned *cycles) {
  __shared__ __align__(16) float tiles[fence_copies * tile_threads * 4];
  int64_t at = static_cast<int64_t>(blockIdx.x) * fence_rounds * fence_copies * tile_threads * 4;
  for (int round = 0; round < fence_rounds; ++round) {
    written[blockIdx.x * tile_threads + threadIdx.x] = static_cast<float>(round);
    for (int copy = 0; copy < copies; ++copy, at += tile_threads * 4)
      copy_async_16(tiles + (copy * tile_threads + threadIdx.x) * 4, from + at + threadIdx.x * 4, 16);
    commit_copies();
    const long long begin = clock64();
    __threadfence();
    const long long end = clock64();
    wait_copies<0>();
    __syncthreads();
    if (threadIdx.x == 0)
      cycles[blockIdx.x * fence_rounds + round] = static_cast<unsigned>(end - begin);
  }
}

void print_fences() {
  constexpr int blocks = 132;
  constexpr size_t count = static_cast<size_t>(blocks) * fence_rounds * fence_copies * tile_threads * 4;
  Device<float> from(count), written(blocks * tile_threads), flush(count);
  CHECK(cudaMemset(from.data, 1, count * sizeof(float)));
  Device<unsigned> cycles(blocks * fence_rounds);
  std::printf("\"fence_cycles\": {");
  for (const int copies : {0, fence_copies}) {
    CHECK(cudaMemset(flush.data, 2, count * sizeof(float))); // other bytes now fill the L2 cache
    fences<<<blocks, tile_threads>>>(from.data, written.data, copies, cycles.data);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    std::vector<unsigned> found = cycles.read(blocks * fence_rounds);
    std::sort(found.begin(), found.end());
    std::printf("\"%d copies\": {\"min\": %u, \"median\": %u, \"max\": %u}%s", copies, found.front(),
                found[found.size() / 2], found.back(), copies == 0 ? ", " : "},\n");
  }
}

// Precision of products.

constexpr int product_rows = 512, product_columns = 256, leaves_after = 64;

// C = A W, a warp for 16 × 8 of C, by the multiplication of the kernels; sums leave the tensor core after `leaves`.
template <class Precision, bool leave>
__global__ void __launch_bounds__(warp_lanes) product(const float *a, const float *w, float *c, int depth) {
  constexpr int lda = leaves_after + 4, ldw = 8;
  __shared__ float left[16 * lda], right[leaves_after * ldw];
  const int row = blockIdx.x * 16, column = blockIdx.y * 8, lane = threadIdx.x;
  float sum[1][1][4] = {};
  for (int k0 = 0; k0 < depth; k0 += leaves_after) {
    const int here = depth - k0 < leaves_after ? depth - k0 : leaves_after;
    for (int i = lane; i < 16 * here; i += warp_lanes)
      left[i / here * lda + i % here] = a[(row + i / here) * depth + k0 + i % here];
    for (int i = lane; i < 8 * here; i += warp_lanes)
      right[i] = w[(k0 + i / 8) * product_columns + column + i % 8];
    __syncwarp();
    float part[1][1][4] = {};
    for (int k = 0; k < here; k += Precision::depth)
      multiply_step<Precision, 1, 1, false, false, lda, ldw>(leave ? part : sum, left + k, right + k * ldw, lane);
    if (leave)
      for (int e = 0; e < 4; ++e)
        sum[0][0][e] += part[0][0][e];
    __syncwarp();
  }
  for (int e = 0; e < 4; ++e)
    c[(row + lane / 4 + e / 2 * 8) * product_columns + column + lane % 4 * 2 + e % 2] = sum[0][0][e];
}

template <class T> __global__ void plain_product(const float *a, const float *w, T *c, int depth) {
  const int row = blockIdx.x, column = threadIdx.x;
  T sum = 0;
  for (int k = 0; k < depth; ++k)
    sum = fma(static_cast<T>(a[row * depth + k]), static_cast<T>(w[k * product_columns + column]), sum);
  c[row * product_columns + column] = sum;
}

double norm_error(const std::vector<float> &got, const std::vector<double> &want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

void print_products() {
  constexpr size_t size = static_cast<size_t>(product_rows) * product_columns;
  const dim3 blocks(product_rows / 16, product_columns / 8);
  Device<float> c(size);
  Device<double> exact(size);
  std::printf("\"product_error\": {");
  for (const bool positive : {false, true}) {
    std::printf("\"%s\": {", positive ? "positive" : "signed");
    for (const int depth : {32, 64, 128, 256, 512}) {
      const Device<float> a(draw(static_cast<size_t>(product_rows) * depth, positive, depth));
      const Device<float> w(draw(static_cast<size_t>(product_columns) * depth, positive, depth + 1));
      plain_product<<<product_rows, product_columns>>>(a.data, w.data, exact.data, depth);
      CHECK(cudaGetLastError());
      const std::vector<double> want = exact.read(size);
      const auto error = [&](const char *name, auto kernel, dim3 grid, int threads, const char *after) {
        CHECK(cudaMemset(c.data, 0xff, size * sizeof(float))); // NaN, where nothing is written
        kernel<<<grid, threads>>>(a.data, w.data, c.data, depth);
        CHECK(cudaGetLastError());
        const double found = norm_error(c.read(size), want);
        std::isfinite(found) ? std::printf("\"%s\": %.4g%s", name, found, after)
                             : std::printf("\"%s\": null%s", name, after);
      };
      std::printf("\"%d\": {", depth);
      error("Tf32x3, in the tensor core", product<Tf32x3, false>, blocks, warp_lanes, ", ");
      error("Tf32x3, leaving it", product<Tf32x3, true>, blocks, warp_lanes, ", ");
      error("Tf32", product<Tf32, false>, blocks, warp_lanes, ", ");
      error("float32", plain_product<float>, product_rows, product_columns, depth == 512 ? "}" : "}, ");
    }
    std::printf(positive ? "}},\n" : "}, ");
  }
}

// The L2 cache, read as the wide tiles of the flow's layers read it.

constexpr int layer_width = 512, tile_side = 64, tile_depth = 32, tile_buffers = 3;

// A block reads what it takes to compute 64 × 64 of [rows, 512] × [512, 512]; nothing is multiplied.
__global__ void __launch_bounds__(tile_threads) read_tiles(const float *a, const float *w) {
  constexpr int a_size = tile_side * (tile_depth + 4), w_size = tile_depth * (tile_side + 8);
  float *const ring = reinterpret_cast<float *>(shared_tiles());
  const int64_t row = static_cast<int64_t>(blockIdx.x) * tile_side;
  const int column = blockIdx.y * tile_side;
  const auto bring = [&](int step) {
    if (step * tile_depth < layer_width) {
      float *const to = ring + step % tile_buffers * (a_size + w_size);
      load_tile<tile_side, tile_depth, tile_depth + 4>(to, a + row * layer_width + step * tile_depth, layer_width,
                                                       tile_side, tile_depth, true);
      load_tile<tile_depth, tile_side, tile_side + 8>(to + a_size, w + step * tile_depth * layer_width + column,
                                                      layer_width, tile_depth, tile_side, true);
    }
    commit_copies();
  };
  for (int step = 0; step < tile_buffers - 1; ++step)
    bring(step);
  for (int step = 0; step < layer_width / tile_depth; ++step) {
    wait_copies<tile_buffers - 2>();
    __syncthreads();
    bring(step + tile_buffers - 1);
  }
  wait_copies<0>();
}

void print_tiles() {
  constexpr int bytes = tile_buffers * (tile_side * (tile_depth + 4) + tile_depth * (tile_side + 8)) * 4;
  CHECK(cudaFuncSetAttribute(read_tiles, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const Device<float> w(draw(layer_width * layer_width, false, 1));
  std::printf("\"tile_l2_gbytes\": {");
  for (const int rows : {4096, 16384}) {
    const Device<float> a(draw(static_cast<size_t>(rows) * layer_width, false, 2));
    const dim3 blocks(rows / tile_side, layer_width / tile_side);
    constexpr int launches = 20;
    const Times times = time_of([&] {
      for (int i = 0; i < launches; ++i)
        read_tiles<<<blocks, tile_threads, bytes>>>(a.data, w.data);
    });
    const double moved = 8.0 * tile_side * layer_width * blocks.x * blocks.y * launches;
    print_rate(rows == 4096 ? "4096" : "16384", moved / 1e6, times, rows == 4096 ? ", " : "},\n");
  }
}

// Peaks.

constexpr int fma_rounds = 4096, fma_chains = 8;

__global__ void __launch_bounds__(256) multiply_add(float *to, float factor) {
  float sums[fma_chains];
  for (int i = 0; i < fma_chains; ++i)
    sums[i] = static_cast<float>(threadIdx.x + i);
#pragma unroll 16
  for (int round = 0; round < fma_rounds; ++round)
#pragma unroll
    for (int i = 0; i < fma_chains; ++i)
      sums[i] = fmaf(sums[i], factor, 1.0f);
  float sum = 0;
  for (int i = 0; i < fma_chains; ++i)
    sum += sums[i];
  to[blockIdx.x * 256 + threadIdx.x] = sum;
}

__global__ void __launch_bounds__(256) copy(float4 *to, const float4 *from, size_t count) {
  for (size_t i = static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x; i < count; i += gridDim.x * size_t{256})
    to[i] = from[i];
}

void print_peaks(int multiprocessors) {
  const int blocks = multiprocessors * 16;
  {
    Device<float> to(static_cast<size_t>(blocks) * 256);
    const Times times = time_of([&] { multiply_add<<<blocks, 256>>>(to.data, 0.999f); });
    print_rate("fma_tflops", 2.0 * fma_rounds * fma_chains * 256 * blocks / 1e9, times, ",\n");
  }
  constexpr size_t count = size_t{1} << 27;
  const std::vector<float> some = draw(1 << 20, false, 3);
  Device<float> from(count), to(count);
  for (size_t at = 0; at < count; at += some.size())
    CHECK(cudaMemcpy(from.data + at, some.data(), some.size() * sizeof(float), cudaMemcpyHostToDevice));
  const Times times = time_of([&] {
    copy<<<multiprocessors * 16, 256>>>(reinterpret_cast<float4 *>(to.data), reinterpret_cast<float4 *>(from.data),
                                        count / 4);
  });
  print_rate("copy_gbytes", 2.0 * count * sizeof(float) / 1e6, times, "\n");
}

} // namespace

int main() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("{\"gpu\": \"%s\", \"multiprocessors\": %d,\n", properties.name, properties.multiProcessorCount);
  print_barriers();
  print_fences();
  print_products();
  print_tiles();
  print_peaks(properties.multiProcessorCount);
  std::printf("}\n");
  CHECK(cudaDeviceSynchronize());
  return 0;
}
