// The driver of NVIDIA GPUs (libcuda.so.1), looked up at run time, and the kernels of this library in it.
//
// No CUDA runtime library is linked, so this library needs no more of a driver than the compiler of its images does.
// nvcc registers the images and the kernels of each source when the library is loaded; cuda_driver.cpp notes them.
// A kernel's host function, e.g. pair_nll_kernel<float>, is its key.
#pragma once

#include <cuda.h>

namespace iin_fast {

// The functions of the driver; those that it lacks are null.
struct CudaDriver {
#define IIN_FAST_DRIVER_FUNCTIONS(f)                                                                                   \
  f(cuInit) f(cuDriverGetVersion) f(cuGetErrorString) f(cuDeviceGet) f(cuDeviceGetAttribute) f(cuCtxGetCurrent)        \
      f(cuCtxGetDevice) f(cuCtxSetCurrent) f(cuDevicePrimaryCtxRetain) f(cuDevicePrimaryCtxRelease)                    \
          f(cuThreadExchangeStreamCaptureMode) f(cuLibraryLoadData) f(cuLibraryGetKernel) f(cuKernelGetFunction)       \
              f(cuFuncSetAttribute) f(cuOccupancyMaxActiveBlocksPerMultiprocessor) f(cuOccupancyMaxActiveClusters)     \
                  f(cuLaunchKernelEx) f(cuStreamIsCapturing) f(cuStreamSynchronize)
#define IIN_FAST_DECLARE(name) decltype(&::name) name = nullptr;
  IIN_FAST_DRIVER_FUNCTIONS(IIN_FAST_DECLARE)
#undef IIN_FAST_DECLARE
};

// Loaded at the first call. Null if this machine has no driver, or one older than 525, the first of CUDA 12.
const CudaDriver *cuda_driver();

// The latest CUDA that the driver serves, as 1000 major + 10 minor; 0 without a driver.
int cuda_driver_version();

// Makes a device the current one of this thread.
CUresult use_device(const CudaDriver &driver, int index);

// The kernel with this host function, in the current context. Loads its image at the first call.
CUresult find_kernel(const CudaDriver &driver, const void *host_function, CUfunction *found);

} // namespace iin_fast
