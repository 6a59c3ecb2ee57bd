#include "kernels.h"

namespace bnext::cuda {

cudaError_t query(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, index);
    return value;
  };
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  device.l2 = attribute(cudaDevAttrL2CacheSize);
  device.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  return error;
}

}  // namespace bnext::cuda
