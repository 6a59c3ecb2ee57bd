// The device functions of CUDA that kernels use; included by cuda_on_cpu.h.
#pragma once

namespace cuda_on_cpu::device {
using detail::BlockReduction;
using detail::WarpOperation;

constexpr unsigned all_lanes = 0xffffffffu;

inline void __syncthreads(Site site = Site::current()) {
  detail::sync_threads(site);
}
inline int __syncthreads_or(int predicate, Site site = Site::current()) {
  return detail::sync_threads_reduce(BlockReduction::any, predicate, site);
}
inline int __syncthreads_and(int predicate, Site site = Site::current()) {
  return detail::sync_threads_reduce(BlockReduction::all, predicate, site);
}
inline int __syncthreads_count(int predicate, Site site = Site::current()) {
  return detail::sync_threads_reduce(BlockReduction::count, predicate, site);
}

inline void __syncwarp(unsigned mask = all_lanes, Site site = Site::current()) {
  detail::warp_operation(WarpOperation::sync, mask, 0, 0, warpSize, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, Site site = Site::current()) {
  return detail::shuffle(WarpOperation::shuffle, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, Site site = Site::current()) {
  return detail::shuffle(WarpOperation::shuffle_up, mask, value, static_cast<int>(delta), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, Site site = Site::current()) {
  return detail::shuffle(WarpOperation::shuffle_down, mask, value, static_cast<int>(delta), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, Site site = Site::current()) {
  return detail::shuffle(WarpOperation::shuffle_xor, mask, value, lanes, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return static_cast<unsigned>(detail::warp_operation(WarpOperation::ballot, mask, predicate != 0, 0, warpSize, site));
}
inline int __all_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return static_cast<int>(detail::warp_operation(WarpOperation::all, mask, predicate != 0, 0, warpSize, site));
}
inline int __any_sync(unsigned mask, int predicate, Site site = Site::current()) {
  return static_cast<int>(detail::warp_operation(WarpOperation::any, mask, predicate != 0, 0, warpSize, site));
}

inline void __threadfence() {
  detail::fence();
}
inline void __nanosleep(unsigned) {
  detail::yield();
}  // a thread that spins must call it

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}

// The runtime is told of one atomic, in place of the read and the write that the compiler sees. Not inlined: the return
// address is the kernel's.
#define CUDA_ON_CPU_ATOMIC __attribute__((noinline, no_sanitize_thread))

template <class T, class Update>
__attribute__((always_inline, no_sanitize_thread)) inline T atomic(T* p, void* caller, Update update) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "a sum of floating-point atomics depends on their order");
  detail::before_atomic(p, sizeof(T), caller);
  const T old = *p;
  *p = update(old);
  return old;
}
template <class T>
CUDA_ON_CPU_ATOMIC T atomicAdd(T* p, std::type_identity_t<T> value) {
  return atomic(p, __builtin_return_address(0), [=](T old) { return old + value; });
}
template <class T>
CUDA_ON_CPU_ATOMIC T atomicInc(T* p, std::type_identity_t<T> limit) {
  return atomic(p, __builtin_return_address(0), [=](T old) { return old >= limit ? T{0} : old + 1; });
}
template <class T>
CUDA_ON_CPU_ATOMIC T atomicMax(T* p, std::type_identity_t<T> value) {
  return atomic(p, __builtin_return_address(0), [=](T old) { return std::max(old, value); });
}
template <class T>
CUDA_ON_CPU_ATOMIC T atomicMin(T* p, std::type_identity_t<T> value) {
  return atomic(p, __builtin_return_address(0), [=](T old) { return std::min(old, value); });
}
template <class T>
CUDA_ON_CPU_ATOMIC T atomicExch(T* p, std::type_identity_t<T> value) {
  return atomic(p, __builtin_return_address(0), [=](T) { return value; });
}
template <class T>
CUDA_ON_CPU_ATOMIC T atomicAnd(T* p, std::type_identity_t<T> value) {
  return atomic(p, __builtin_return_address(0), [=](T old) { return old & value; });
}
template <class T>
CUDA_ON_CPU_ATOMIC T atomicOr(T* p, std::type_identity_t<T> value) {
  return atomic(p, __builtin_return_address(0), [=](T old) { return old | value; });
}
template <class T>
CUDA_ON_CPU_ATOMIC T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return atomic(p, __builtin_return_address(0), [=](T old) { return old == expected ? value : old; });
}
#undef CUDA_ON_CPU_ATOMIC

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline unsigned __float_as_uint(float x) {
  return detail::bits<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
  return detail::bits<float>(x);
}
}  // namespace cuda_on_cpu::device

using namespace cuda_on_cpu::device;
using std::max;
using std::min;

namespace cooperative_groups {
using cuda_on_cpu::Site;

struct thread_block {
  static void sync(Site site = Site::current()) { cuda_on_cpu::detail::sync_threads(site); }
  static unsigned thread_rank() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }
  static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
};
inline thread_block this_thread_block() {
  return {};
}

struct grid_group {
  bool is_valid() const { return cuda_on_cpu::detail::is_cooperative(); }
  void sync(Site site = Site::current()) const { cuda_on_cpu::detail::sync_grid(site); }
};
inline grid_group this_grid() {
  return {};
}

struct cluster_group {
  static void sync(Site site = Site::current()) { cuda_on_cpu::detail::sync_cluster(site); }
  static unsigned block_rank() { return cuda_on_cpu::detail::cluster_rank(); }
  static unsigned num_blocks() { return cuda_on_cpu::detail::cluster_size(); }
  template <class T>
  static T* map_shared_rank(T* pointer, int rank) {
    return static_cast<T*>(cuda_on_cpu::detail::map_to_rank(pointer, static_cast<unsigned>(rank)));
  }
};
inline cluster_group this_cluster() {
  return {};
}
}  // namespace cooperative_groups
