// What the planner asks of the current device.
#include <cuda_runtime.h>

#include "kernels.h"

namespace bnext::cuda {
namespace {

__global__ void probe() {}

// Blocks in clusters of that size that run at once, each with all the shared memory of a multiprocessor; 0 where there
// are no such clusters.
std::int64_t count_clustered(std::int64_t shared, unsigned size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {size, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(size);
  config.blockDim = dim3(static_cast<unsigned>(kMaxThreads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, probe, &config) != cudaSuccess) {
    cudaGetLastError();  // else the next launch of anyone would find it
    return 0;
  }
  return clusters * static_cast<std::int64_t>(size);
}

}  // namespace

cudaError_t query(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, index);
    return std::int64_t{value};
  };
  device = {};
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  device.l2 = attribute(cudaDevAttrL2CacheSize);
  // Kilohertz, two transfers a cycle, over so many bits.
  device.bandwidth = 2000 * attribute(cudaDevAttrMemoryClockRate) * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8;
  if (device.bandwidth == 0) device.bandwidth = 1000000000000;  // where it is not told
  device.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  if (attribute(cudaDevAttrClusterLaunch) == 0) return error;
  // Code of an older architecture, compiled for this one as it was loaded, knows no clusters.
  cudaFuncAttributes code = {};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, probe);
  if (code.ptxVersion < 90) return error;
  const auto with = [&](cudaFuncAttribute which, std::int64_t value) {
    if (error == cudaSuccess) error = cudaFuncSetAttribute(probe, which, static_cast<int>(value));
  };
  with(cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  with(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (int i = 0; i < kClusterSizes && error == cudaSuccess; ++i)
    device.clustered[i] = count_clustered(device.shared_per_block, 2u << i);
  return error;
}

}  // namespace bnext::cuda
