// The one header that kernel sources include: CUDA under nvcc; under an ordinary C++ compiler, with
// BNEXT_CUDA_ON_CPU, the execution of the same source on the CPU by the tests (tests/cuda_on_cpu). No torch here or
// below.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace bnext::gpu {
template <class T>
struct TypeId {
  using type = T;
};
template <class T>
using type_t = typename TypeId<T>::type;  // float[32][33], spelled as one type
}  // namespace bnext::gpu

#if defined(BNEXT_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
// GPU_SHARED(tile, float[32][33]);   GPU_DYN_SHARED(unsigned char, memory);
#define GPU_SHARED(name, ...) __shared__::bnext::gpu::type_t<__VA_ARGS__> name
#define GPU_DYN_SHARED(T, name)                                             \
  extern __shared__ __align__(16) unsigned char bnext_gpu_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(bnext_gpu_dynamic_shared)
#endif

namespace bnext::gpu {

struct Launch {
  dim3 grid{1}, block{1};
  size_t shared = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;      // blocks per cluster along x; 1: no clusters
  bool cooperative = false;  // all blocks are resident at once, and grid.sync() is allowed
};

#if defined(BNEXT_CUDA_ON_CPU)
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const Launch& l, A&&... args) {
  return cuda_on_cpu::launch(kernel, l.grid, l.block, l.shared, l.cluster, l.cooperative, P(std::forward<A>(args))...);
}
#else
// Errors of the launch itself are returned, not left for the next call to find.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const Launch& l, A&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.shared;
  config.stream = l.stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (l.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = l.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (l.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (l.cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  if (l.shared > 48 * 1024) {
    // All that a block may have, not what this launch needs: another thread may be about to launch with more.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    // Two blocks are to fit, which share it with the first-level cache.
    if (error == cudaSuccess)
      error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, P(std::forward<A>(args))...);
}
#endif

// Barrier of the cluster, and where another of its blocks has what this one has at p in shared memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // no clusters, and no plan with one
__device__ __forceinline__ void cluster_sync() {
  __trap();
}
template <class T>
__device__ __forceinline__ T* of_rank(T* p, int) {
  return p;
}
#else
__device__ __forceinline__ void cluster_sync() {
  cooperative_groups::this_cluster().sync();
}
template <class T>
__device__ __forceinline__ T* of_rank(T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#endif

// Waits until *arrived, which counts this call, has come to `all`. What came before, in all threads that had met, can
// be read after it, by all threads that meet then.
__device__ __forceinline__ void meet(unsigned* arrived, unsigned all) {
  __threadfence();
  atomicAdd(arrived, 1u);
  while (atomicAdd(arrived, 0u) < all) __nanosleep(20);
  __threadfence();
}

}  // namespace bnext::gpu
