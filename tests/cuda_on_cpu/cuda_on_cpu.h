// Executes CUDA kernels on the CPU for the tests, one fiber per CUDA thread. Types come from the CUDA toolkit's own
// headers, which an ordinary C++ compiler accepts; here is the execution model, in device.h the device functions in
// use. In a checked build (kernels compiled with -fsanitize=thread, see check.cpp) a launch also reports races,
// accesses outside what is registered or allocated, misaligned accesses and reads of what nobody wrote.
#pragma once

#include <cuda_runtime_api.h>  // types only: nothing of libcudart is called
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__  // and left so: GPU_SHARED and GPU_DYN_SHARED take its place
#undef __launch_bounds__
#undef __cluster_dims__
#undef __grid_constant__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))

// Hidden: a process may load a fast and a checked library, each with a runtime of its own.
#pragma GCC visibility push(hidden)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {
using Site = std::source_location;

// ---- for host code ------------------------------------------------------------------------------------------------

struct Config {
  std::string schedule = "fwd";      // order in which ready threads run: fwd, rev, rand, warp (warps at random)
  unsigned seed = 0;                 // of rand and warp
  bool check = true;                 // no effect in a fast build
  int poison = 0xFF;                 // every byte of shared memory at first: NaN in each float type
  unsigned resident_blocks = 4;      // blocks whose threads are interleaved; clusters and cooperative grids stay whole
  unsigned num_sms = 8;              // bounds cooperative grids
  size_t shared_limit = 227 * 1024;  // bytes of shared memory per block, static and dynamic
  unsigned max_cluster = 16;
};
Config& config();
void configure(const std::string& schedule, unsigned seed, bool check);

bool checked_build();      // whether kernels were compiled with -fsanitize=thread
const char* last_error();  // what the last launch reported; "" after a good one

// In a checked build every access to global memory must lie in one registered range; of ranges that overlap, the one
// registered first counts. A byte of a range that is not initialised must be written before it is read.
void register_global(const void* pointer, size_t bytes, const char* name, bool initialised = true);
void clear_globals();

// Accesses to one registered range since its registration. Widths are 1, 2, 4, 8 and 16 bytes.
struct RangeStats {
  std::string name;
  uint64_t read_bytes, written_bytes;
  uint64_t reads[5], writes[5];
  uint64_t atomics;  // counted here only
};
std::vector<RangeStats> stats();  // in the order of registration; all zero in a fast build

// Since the program's start.
struct Totals {
  uint64_t launches, blocks, threads, block_barriers, cluster_barriers, grid_barriers, warp_operations, switches;
  uint64_t shared_read_bytes, shared_written_bytes;  // in a checked build
};
const Totals& totals();

// ---- for launch() below and device.h ------------------------------------------------------------------------------

namespace detail {
struct Kernel {
  dim3 grid, block;
  size_t shared;
  unsigned cluster;
  bool cooperative;
  void (*run)(void* arguments);
  void* arguments;
  size_t arguments_size;
};
enum class BlockReduction { any, all, count };
enum class WarpOperation { sync, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, all, any };

cudaError_t launch(const Kernel&);
void* static_shared(const void* key, size_t size, size_t alignment);
void* dynamic_shared();
void sync_threads(Site);
int sync_threads_reduce(BlockReduction, bool, Site);
uint64_t warp_operation(WarpOperation, unsigned mask, uint64_t value, int argument, int width, Site);
void sync_cluster(Site);
void sync_grid(Site);
unsigned cluster_rank();
unsigned cluster_size();
void* map_to_rank(const void* pointer, unsigned rank);
bool is_cooperative();
void fence();
void before_atomic(void* pointer, size_t bytes, void* program_counter);
void yield();

template <class To, class From>
To bits(From from) {
  To to{};
  memcpy(&to, &from, std::min(sizeof to, sizeof from));
  return to;
}

template <class T>
T shuffle(WarpOperation operation, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8, "CUDA shuffles no other type");
  return bits<T>(warp_operation(operation, mask, bits<uint64_t>(value), argument, width, site));
}
}  // namespace detail

template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, unsigned cluster, bool cooperative,
                   std::decay_t<P>... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
  } call{kernel, {arguments...}};
  const auto run = [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); };
  return detail::launch({grid, block, shared, cluster, cooperative, run, &call, sizeof call});
}
}  // namespace cuda_on_cpu

#define GPU_SHARED(name, ...)                                                                         \
  static const char name##_key = 0;                                                                   \
  auto& name = *static_cast<::bnext::gpu::type_t<__VA_ARGS__>*>(::cuda_on_cpu::detail::static_shared( \
      &name##_key, sizeof(::bnext::gpu::type_t<__VA_ARGS__>), alignof(::bnext::gpu::type_t<__VA_ARGS__>)))
#define GPU_DYN_SHARED(T, name) T* name = static_cast<T*>(::cuda_on_cpu::detail::dynamic_shared())

#include "device.h"

#pragma GCC visibility pop
