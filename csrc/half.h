// The elements of tensors: bfloat16 and float16 in memory, and their conversions to and from float32, once for scalars
// and vectors: U is std::uint32_t or a vector of it. To half: to nearest, ties to even; to float32: exact. Denormals
// are kept. BNEXT_ISA: as in math.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "params.h"

namespace bnext::inline BNEXT_ISA {

template <class To, class From>
BNEXT_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  std::uint16_t bits;

  template <class U, class F>
  BNEXT_DEVICE static F widen(U bits) {
    return bit_cast<F>(bits << 16);
  }
  template <class U, class F>
  BNEXT_DEVICE static U narrow(F value) {
    const U bits = bit_cast<U>(value), zero = bits & 0u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? zero + 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
};

struct Float16 {
  std::uint16_t bits;

  template <class U, class F>
  BNEXT_DEVICE static F widen(U bits) {
    const U magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    // Below 2^-14 the magnitude counts units of 2^-24; as the mantissa of a float32 above 0.5 they are exact.
    const U small = bit_cast<U>(bit_cast<F>(magnitude + 0x3f000000u) - 0.5f);
    const U normal = (magnitude << 13) + (112u << 23);
    const U special = (magnitude << 13) | 0x7f800000u;
    return bit_cast<F>(sign | (magnitude >= 0x7c00u ? special : magnitude < 0x400u ? small : normal));
  }
  template <class U, class F>
  BNEXT_DEVICE static U narrow(F value) {
    const U bits = bit_cast<U>(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u, zero = bits & 0u;
    const U small = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
    const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const U large = magnitude > 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
    return sign | (magnitude >= 0x477ff000u ? large : magnitude < 0x38800000u ? small : normal);
  }
};

// One element, as a number and back.
template <class T>
BNEXT_DEVICE inline float to_float(T half) {
  return T::template widen<std::uint32_t, float>(half.bits);
}
BNEXT_DEVICE inline float to_float(float value) {
  return value;
}
BNEXT_DEVICE inline double to_float(double value) {
  return value;
}

template <class T, class Compute>
BNEXT_DEVICE inline T from_float(Compute value) {
  if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
    return {static_cast<std::uint16_t>(T::template narrow<std::uint32_t>(static_cast<float>(value)))};
  } else {
    return static_cast<T>(value);
  }
}

// The type in which the elements of a T are normalised, and in which mean and invstd are saved.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(a value of the type that dtype names).
BNEXT_ANY_CALLEE
template <class F>
BNEXT_DEVICE inline auto with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float64:
      return f(double{});
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

// Element i of an array of dtype.
template <class A>
BNEXT_DEVICE inline A read(const void* p, DType dtype, std::int64_t i) {
  return with_type(dtype, [&](auto t) -> A { return static_cast<A>(to_float(static_cast<const decltype(t)*>(p)[i])); });
}
template <class A>
BNEXT_DEVICE inline void write(void* p, DType dtype, std::int64_t i, A value) {
  with_type(dtype, [&](auto t) { static_cast<decltype(t)*>(p)[i] = from_float<decltype(t)>(value); });
}

}  // namespace bnext::inline BNEXT_ISA
