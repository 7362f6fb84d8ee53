#include "cuda_driver/cuda_driver.h"

#include <atomic>
#include <deque>
#include <mutex>
#include <unordered_map>

#include <dlfcn.h>

namespace iin_fast {
namespace {

// The code of one source for all GPUs.
struct Image {
  const void *code;
  CUlibrary library = nullptr; // null: not loaded yet
};

struct Kernel {
  Image *image;
  const char *name;
  std::atomic<CUkernel> handle{nullptr}; // null: not looked up yet
  Kernel(Image *image, const char *name) : image(image), name(name) {}
};

// Filled while this library is loaded, only read later. Function-local: constructors of other sources register here.
struct Registry {
  std::deque<Image> images; // a deque doesn't move what it holds
  std::unordered_map<const void *, Kernel> kernels;
  std::mutex loading;
};

Registry &registry() {
  static Registry all;
  return all;
}

// Every driver has this one.
void *driver_library() {
  static void *const library = dlopen("libcuda.so.1", RTLD_LAZY);
  return library;
}

template <class F> F find(F, const char *name) { return reinterpret_cast<F>(dlsym(driver_library(), name)); }

// Two macros: cuda.h defines some names as those of a later version of the function.
#define IIN_FAST_TEXT(name) #name
#define IIN_FAST_FIND(name) find(&::name, IIN_FAST_TEXT(name))

CUresult load(const CudaDriver &driver, Kernel &kernel) {
  const std::lock_guard<std::mutex> lock(registry().loading);
  // A call that is captured in a graph may load, too: what is loaded is not part of the graph.
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  driver.cuThreadExchangeStreamCaptureMode(&mode);
  CUresult result = CUDA_SUCCESS;
  if (kernel.image->library == nullptr)
    result =
        driver.cuLibraryLoadData(&kernel.image->library, kernel.image->code, nullptr, nullptr, 0, nullptr, nullptr, 0);
  CUkernel handle = nullptr;
  if (result == CUDA_SUCCESS)
    result = driver.cuLibraryGetKernel(&handle, kernel.image->library, kernel.name);
  CUfunction function = nullptr;
  if (result == CUDA_SUCCESS)
    result = driver.cuKernelGetFunction(&function, handle); // the driver puts off loading up to here
  if (result == CUDA_SUCCESS)
    kernel.handle.store(handle, std::memory_order_release);
  driver.cuThreadExchangeStreamCaptureMode(&mode);
  return result;
}

} // namespace

const CudaDriver *cuda_driver() {
  static const CudaDriver found = [] {
    CudaDriver driver;
    if (driver_library() == nullptr)
      return driver;
#define IIN_FAST_LOOK_UP(name) driver.name = IIN_FAST_FIND(name);
    IIN_FAST_DRIVER_FUNCTIONS(IIN_FAST_LOOK_UP)
#undef IIN_FAST_LOOK_UP
    return driver;
  }();
  // libraries and kernels outside a context came with CUDA 12, and with them all that is older
  static const bool usable = found.cuKernelGetFunction != nullptr && found.cuInit(0) == CUDA_SUCCESS;
  return usable ? &found : nullptr;
}

int cuda_driver_version() {
  int version = 0;
  if (driver_library() != nullptr)
    if (const auto ask = IIN_FAST_FIND(cuDriverGetVersion))
      ask(&version);
  return version;
}

CUresult use_device(const CudaDriver &driver, int index) {
  CUdevice wanted = 0, current = 0;
  CUcontext context = nullptr;
  CUresult result = driver.cuDeviceGet(&wanted, index);
  if (result != CUDA_SUCCESS)
    return result;
  // a thread that has not called torch's runtime yet has no context
  driver.cuCtxGetCurrent(&context);
  if (context != nullptr && driver.cuCtxGetDevice(&current) == CUDA_SUCCESS && current == wanted)
    return CUDA_SUCCESS;
  result = driver.cuDevicePrimaryCtxRetain(&context, wanted);
  if (result != CUDA_SUCCESS)
    return result;
  result = driver.cuCtxSetCurrent(context);
  driver.cuDevicePrimaryCtxRelease(wanted); // torch's runtime, which has made the tensors, keeps it
  return result;
}

CUresult find_kernel(const CudaDriver &driver, const void *host_function, CUfunction *found) {
  const auto kernel = registry().kernels.find(host_function);
  if (kernel == registry().kernels.end())
    return CUDA_ERROR_NOT_FOUND;
  if (kernel->second.handle.load(std::memory_order_acquire) == nullptr) {
    const CUresult result = load(driver, kernel->second);
    if (result != CUDA_SUCCESS)
      return result;
  }
  return driver.cuKernelGetFunction(found, kernel->second.handle);
}

} // namespace iin_fast

// What the host code of nvcc calls when this library is loaded (crt/host_runtime.h of the toolkit). Hidden: torch's
// CUDA runtime has functions of the same names.
extern "C" {

struct FatBinary { // fatbinary_section.h
  int magic, version;
  const void *data;
  void *unused;
};

void **__cudaRegisterFatBinary(void *binary) {
  auto &images = iin_fast::registry().images;
  images.push_back({static_cast<const FatBinary *>(binary)->data});
  return reinterpret_cast<void **>(&images.back());
}

void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {} // at the end of the process, when the driver may be gone
char __cudaInitModule(void **) { return 0; }

void __cudaRegisterFunction(void **image, const char *host_function, char *, const char *name, int, void *, void *,
                            void *, void *, int *) {
  iin_fast::registry().kernels.try_emplace(host_function, reinterpret_cast<iin_fast::Image *>(image), name);
}

void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {} // the host sets none

// Kernels are launched by CudaCall, never by <<<>>>: the host functions of nvcc, which name these, are not called.
int __cudaPopCallConfiguration(void *, void *, void *, void *) { return CUDA_ERROR_NOT_SUPPORTED; }
int __cudaGetKernel(void *, const void *) { return CUDA_ERROR_NOT_SUPPORTED; }
int __cudaLaunchKernel() { return CUDA_ERROR_NOT_SUPPORTED; }
int cudaLaunchKernel() { return CUDA_ERROR_NOT_SUPPORTED; }
}
