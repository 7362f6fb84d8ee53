// What the glue of every CUDA op needs: torch's device, stream and types.
//
// Everything here goes through torch's stable ABI but the current stream, which only a CUDA build of torch can give.
// Its symbol is looked up at run time: linked directly, this library could not be loaded beside a CPU build of torch.
// Nothing synchronises and nothing allocates outside torch, so that every op can be captured in a CUDA graph.
#pragma once

#include <dlfcn.h>

#include <optional>
#include <string>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/tensor.h"

namespace iin_fast {

using CurrentCudaStream = AOTITorchError (*)(int32_t device, void **stream);

// aoti_torch_get_current_cuda_stream of the torch in this process; null in a CPU build of torch.
inline CurrentCudaStream find_current_cuda_stream() {
  constexpr const char *name = "aoti_torch_get_current_cuda_stream";
  void *symbol = dlsym(RTLD_DEFAULT, name);
  if (symbol == nullptr)
    // Python loads torch's libraries out of the global scope. RTLD_NOLOAD: the loaded one, or none.
    if (void *library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
      symbol = dlsym(library, name); // the handle stays open: torch is never unloaded
  return reinterpret_cast<CurrentCudaStream>(symbol);
}

// One call of an op on the device of its first tensor: makes that device current while it lives, and launches kernels
// on the device's current stream. Passed as the launcher to the launch functions in *_kernels.cuh.
class CudaCall {
public:
  CudaCall(const char *op, const Tensor &first) : op_(op) {
    static const CurrentCudaStream current_stream = find_current_cuda_stream();
    STD_TORCH_CHECK(current_stream != nullptr, op_,
                    ": the torch in this process is built without CUDA, so there is no stream to run on; install a "
                    "build of torch with CUDA, or use tensors on the CPU");
    STD_TORCH_CHECK(first.is_cuda(), op_, ": expected tensors on a CUDA device");
    device_ = first.get_device_index();
    guard_.emplace(device_);
    // This library has a CUDA runtime of its own, which must make the same choice as torch's.
    check(cudaSetDevice(device_), "cudaSetDevice");
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream(device_, &stream_));
  }

  void check_device(const char *name, const Tensor &t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_, op_, ": ", name,
                    " must be on the CUDA device of the first tensor");
  }

  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_), "cudaDeviceGetAttribute");
    return count;
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments &&...arguments) const {
    launch(0, false, kernel, grid, block, std::forward<Arguments>(arguments)...);
  }

  // Blocks of a cooperative launch that run at once on this device; 0 if it has no such launches, or no such block
  // fits.
  template <class... Parameters> int blocks_together(void (*kernel)(Parameters...), int threads, size_t shared) const {
    int cooperative = 0, most = 0, blocks = 0;
    check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device_), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), "cudaDeviceGetAttribute");
    if (!cooperative || shared > static_cast<size_t>(most))
      return 0;
    allow_shared(kernel, shared);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks * multiprocessors();
  }

  // The same with dynamic shared memory; `cooperative`: all blocks at once, so that they may meet.
  struct WithShared {
    const CudaCall &call;
    size_t bytes;
    bool cooperative;
    template <class... Parameters, class... Arguments>
    void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments &&...arguments) const {
      call.launch(bytes, cooperative, kernel, grid, block, std::forward<Arguments>(arguments)...);
    }
  };
  WithShared with_shared(size_t bytes) const { return {*this, bytes, false}; }
  WithShared together(size_t bytes) const { return {*this, bytes, true}; }

private:
  // More than 48 KiB of shared memory must be asked for.
  template <class Kernel> void allow_shared(Kernel *kernel, size_t bytes) const {
    if (bytes > 48 * 1024)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
            "cudaFuncSetAttribute");
  }

  template <class... Parameters, class... Arguments>
  void launch(size_t shared, bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block,
              Arguments &&...arguments) const {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    allow_shared(kernel, shared);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream_);
    config.attrs = &attribute;
    config.numAttrs = cooperative;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "the launch of a kernel");
  }

  void check(cudaError_t error, const char *what) const {
    if (error == cudaSuccess)
      return;
    cudaGetLastError(); // so that a later call doesn't report this error again
    STD_TORCH_CHECK(false, op_, ": ", what, " failed on cuda:", device_, ": ", cudaGetErrorString(error), hint(error));
  }

  static std::string hint(cudaError_t error) {
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion)
      return " (this build has code for " IIN_FAST_CUDA_TARGETS " only; build iin-fast from source for this GPU)";
    if (error == cudaErrorInsufficientDriver)
      return " (this build needs a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) +
             " or later; update the driver, or use iin_fast.backend(\"triton\"), which needs no later one than torch)";
    return "";
  }

  const char *op_;
  int32_t device_ = 0;
  void *stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// The type in which kernels hold what a tensor stores.
template <class Storage> struct DeviceStorage {
  using type = Storage;
};
template <> struct DeviceStorage<BFloat16> {
  using type = __nv_bfloat16;
};
template <> struct DeviceStorage<Half> {
  using type = __half;
};

// Calls f(Storage()) with the kernels' storage type of a floating tensor.
template <class F> void with_device_storage(const char *op, ScalarType type, F &&f) {
  with_storage(op, type, [&](auto storage) { f(typename DeviceStorage<decltype(storage)>::type()); });
}

template <class T> const T *const_data(const Tensor &t) { return static_cast<const T *>(t.const_data_ptr()); }
template <class T> T *mutable_data(Tensor &t) { return static_cast<T *>(t.mutable_data_ptr()); }

} // namespace iin_fast
