// What the glue of every CUDA op needs: torch's device, stream and types.
//
// Everything here goes through torch's stable ABI but the current stream, which only a CUDA build of torch can give.
// Its symbol is looked up at run time: linked directly, this library could not be loaded beside a CPU build of torch.
// Nothing allocates outside torch, and nothing synchronises but where it says so, so that every op can be captured in a
// CUDA graph.
#pragma once

#include <dlfcn.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/tensor.h"
#include "cuda_driver/cuda_driver.h"

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
    STD_TORCH_CHECK(driver_ != nullptr, op_,
                    ": no usable NVIDIA driver (libcuda.so.1) was found; this build needs one "
                    "for CUDA 12 (525) or later. Update it, or use iin_fast.backend(\"triton\")");
    check(use_device(*driver_, device_), "the choice of the device");
    TORCH_ERROR_CODE_CHECK(current_stream(device_, &stream_));
  }

  void check_device(const char *name, const Tensor &t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_, op_, ": ", name,
                    " must be on the CUDA device of the first tensor");
  }

  // Bytes of shared memory that a block may have.
  int shared_room() const { return attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN); }

  // Whether the stream's work becomes a CUDA graph.
  bool captured() const {
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    check(driver_->cuStreamIsCapturing(static_cast<CUstream>(stream_), &status), "cuStreamIsCapturing");
    return status != CU_STREAM_CAPTURE_STATUS_NONE;
  }

  // Until the stream's work is done.
  void wait() const { check(driver_->cuStreamSynchronize(static_cast<CUstream>(stream_)), "cuStreamSynchronize"); }

  int multiprocessors() const { return attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT); }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments &&...arguments) const {
    with_shared(0)(kernel, grid, block, std::forward<Arguments>(arguments)...);
  }

  // Blocks of a cooperative launch that run at once on this device; 0 if it has no such launches, or no such block
  // fits.
  template <class... Parameters> int blocks_together(void (*kernel)(Parameters...), int threads, size_t shared) const {
    if (!attribute(CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH) ||
        shared > static_cast<size_t>(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)))
      return 0;
    int blocks = 0;
    check(driver_->cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function_of(kernel, shared), threads, shared),
          "cuOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks * multiprocessors();
  }

  // Clusters of `size` blocks that run at once on this device; 0 if it has none, or none of this size.
  template <class... Parameters>
  int clusters_together(void (*kernel)(Parameters...), int threads, size_t shared, unsigned size) const {
    if (driver_->cuOccupancyMaxActiveClusters == nullptr || !attribute(CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH) ||
        shared > static_cast<size_t>(shared_room()))
      return 0;
    const CUfunction function = function_of(kernel, shared);
    if (size > portable_cluster &&
        driver_->cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1) != CUDA_SUCCESS)
      return 0;
    CUlaunchAttribute attribute = of_cluster(size);
    const CUlaunchConfig config = configured(dim3(size), dim3(threads), shared, &attribute, 1);
    int clusters = 0;
    const bool known = driver_->cuOccupancyMaxActiveClusters(&clusters, function, &config) == CUDA_SUCCESS;
    return known ? clusters : 0;
  }

  // The same with dynamic shared memory. `together`: all blocks at once, so that they may meet; false: the device
  // refuses that, and nothing has run. `cluster`: blocks of a cluster, or 0.
  struct WithShared {
    const CudaCall &call;
    size_t bytes;
    bool together;
    unsigned cluster;
    template <class... Parameters, class... Arguments>
    bool operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments &&...arguments) const {
      std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...); // of the kernel's own types
      return std::apply(
          [&](auto &...value) {
            void *addresses[] = {&value...};
            return call.launch(call.function_of(kernel, bytes), *this, grid, block, addresses);
          },
          values);
    }
  };
  WithShared with_shared(size_t bytes) const { return {*this, bytes, false, 0}; }
  WithShared together(size_t bytes) const { return {*this, bytes, true, 0}; }
  // Blocks in clusters of `size`, of which clusters_together() has found some.
  WithShared in_clusters(unsigned size, size_t bytes) const { return {*this, bytes, false, size}; }

private:
  int attribute(CUdevice_attribute which) const {
    int value = 0;
    check(driver_->cuDeviceGetAttribute(&value, which, device_), "cuDeviceGetAttribute");
    return value;
  }

  // More than 48 KiB of shared memory must be asked for.
  template <class Kernel> CUfunction function_of(Kernel *kernel, size_t shared) const {
    CUfunction function = nullptr;
    check(find_kernel(*driver_, reinterpret_cast<const void *>(kernel), &function), "the load of a kernel");
    if (shared > 48 * 1024)
      check(driver_->cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                        static_cast<int>(shared)),
            "cuFuncSetAttribute");
    return function;
  }

  static constexpr unsigned portable_cluster = 8; // blocks that every GPU with clusters takes

  static CUlaunchAttribute of_cluster(unsigned size) {
    CUlaunchAttribute attribute{};
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = {size, 1, 1};
    return attribute;
  }

  CUlaunchConfig configured(dim3 grid, dim3 block, size_t shared, CUlaunchAttribute *attributes, unsigned count) const {
    CUlaunchConfig config{};
    config.gridDimX = grid.x, config.gridDimY = grid.y, config.gridDimZ = grid.z;
    config.blockDimX = block.x, config.blockDimY = block.y, config.blockDimZ = block.z;
    config.sharedMemBytes = static_cast<unsigned>(shared);
    config.hStream = static_cast<CUstream>(stream_);
    config.attrs = attributes;
    config.numAttrs = count;
    return config;
  }

  bool launch(CUfunction kernel, const WithShared &how, dim3 grid, dim3 block, void **addresses) const {
    CUlaunchAttribute attribute = of_cluster(how.cluster);
    if (how.together) {
      attribute.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
      attribute.value.cooperative = 1;
    }
    const CUlaunchConfig config = configured(grid, block, how.bytes, &attribute, how.together || how.cluster > 0);
    const CUresult result = driver_->cuLaunchKernelEx(&config, kernel, addresses, nullptr);
    if (how.together && (result == CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE || result == CUDA_ERROR_NOT_SUPPORTED))
      return false;
    check(result, "the launch of a kernel");
    return true;
  }

  void check(CUresult error, const char *what) const {
    if (error == CUDA_SUCCESS)
      return;
    const char *text = nullptr;
    driver_->cuGetErrorString(error, &text);
    const bool no_code = error == CUDA_ERROR_NO_BINARY_FOR_GPU || error == CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    STD_TORCH_CHECK(false, op_, ": ", what, " failed on cuda:", device_, ": ", text ? text : "unknown error",
                    no_code ? " (this build has code for " IIN_FAST_CUDA_TARGETS
                              " only; build iin-fast from source for this GPU)"
                            : "");
  }

  const char *op_;
  const CudaDriver *driver_ = cuda_driver();
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
