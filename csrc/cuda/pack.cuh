// Packs of elements: 16 bytes of a tensor, in one load or store where it is aligned, and their elements as numbers.
#pragma once

#include "gpu.h"

#define BNEXT_ISA device
#define BNEXT_DEVICE __host__ __device__
#include "../half.h"
#include "../math.h"
#include "../running.h"

namespace bnext::cuda {

using std::int64_t;

template <class T, int kPack>
struct alignas(kPack * sizeof(T)) Pack {
  T element[kPack];
};

// Aligned to the pack. Inputs are never written by the kernel that reads them, so 16 bytes may come through the
// read-only cache. once: nobody will want them from the second-level cache again.
template <int kPack, class T>
__device__ __forceinline__ Pack<T, kPack> load(const T* p, bool once) {
  if constexpr (sizeof(Pack<T, kPack>) == sizeof(uint4)) {
    const uint4* const q = reinterpret_cast<const uint4*>(p);
    return bit_cast<Pack<T, kPack>>(once ? __ldcs(q) : __ldg(q));
  } else {
    return *reinterpret_cast<const Pack<T, kPack>*>(p);
  }
}
template <int kPack, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, kPack>& pack, bool once) {
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    uint4* const q = reinterpret_cast<uint4*>(p);
    const uint4 value = bit_cast<uint4>(pack);
    once ? __stcs(q, value) : static_cast<void>(*q = value);
  } else {
    *reinterpret_cast<Pack<T, kPack>*>(p) = pack;
  }
}

// As half.h's conversions, by the processor's instruction where it has one.
__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ double widen(double value) {
  return value;
}
__device__ __forceinline__ float widen(BFloat16 value) {
  return to_float(value);
}
__device__ __forceinline__ float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return to_float(value);
#endif
}

// Element c of an array [C] of parameters, which have T, or, beside half types, float32 (csrc/checks.h).
template <class T>
__device__ __forceinline__ Compute<T> read_param(const Problem& p, const void* array, int64_t c) {
  using A = Compute<T>;
  if constexpr (sizeof(T) < sizeof(A))
    if (p.param_dtype == p.dtype) return widen(static_cast<const T*>(array)[c]);
  return static_cast<const A*>(array)[c];
}
template <class T, class A>
__device__ __forceinline__ void write_param(const Problem& p, void* array, int64_t c, A value) {
  if constexpr (sizeof(T) < sizeof(float)) {
    if (p.param_dtype == p.dtype) {
      static_cast<T*>(array)[c] = from_float<T>(value);
      return;
    }
  }
  static_cast<Compute<T>*>(array)[c] = static_cast<Compute<T>>(value);
}

// Two numbers as halves, the first in the lower bits.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#else
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
#endif
}

template <class T, int kPack, class A>
__device__ __forceinline__ Pack<T, kPack> narrow(const A (&value)[kPack]) {
  Pack<T, kPack> pack;
  if constexpr (sizeof(T) == 2 && kPack > 1) {
    uint32_t pair[kPack / 2];
#pragma unroll
    for (int i = 0; i < kPack / 2; ++i) pair[i] = narrow_pair<T>(value[2 * i], value[2 * i + 1]);
    memcpy(&pack, pair, sizeof(pack));
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.element[i] = from_float<T>(value[i]);
  }
  return pack;
}

}  // namespace bnext::cuda
