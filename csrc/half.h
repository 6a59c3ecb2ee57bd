// bfloat16 and float16 in memory, and their conversions to and from float32, once for scalars and vectors: U is
// std::uint32_t or a vector of it. To half: to nearest, ties to even; to float32: exact. Denormals are kept.
// BNEXT_ISA: as in math.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace bnext::inline BNEXT_ISA {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  std::uint16_t bits;

  template <class U, class F>
  static F widen(U bits) {
    return bit_cast<F>(bits << 16);
  }
  template <class U, class F>
  static U narrow(F value) {
    const U bits = bit_cast<U>(value), zero = bits & 0u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? zero + 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
};

struct Float16 {
  std::uint16_t bits;

  template <class U, class F>
  static F widen(U bits) {
    const U magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    // Below 2^-14 the magnitude counts units of 2^-24; as the mantissa of a float32 above 0.5 they are exact.
    const U small = bit_cast<U>(bit_cast<F>(magnitude + 0x3f000000u) - 0.5f);
    const U normal = (magnitude << 13) + (112u << 23);
    const U special = (magnitude << 13) | 0x7f800000u;
    return bit_cast<F>(sign | (magnitude >= 0x7c00u ? special : magnitude < 0x400u ? small : normal));
  }
  template <class U, class F>
  static U narrow(F value) {
    const U bits = bit_cast<U>(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u, zero = bits & 0u;
    const U small = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
    const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const U large = magnitude > 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
    return sign | (magnitude >= 0x477ff000u ? large : magnitude < 0x38800000u ? small : normal);
  }
};

// One element, as a number and back.
template <class T>
inline float to_float(T half) {
  return T::template widen<std::uint32_t, float>(half.bits);
}
inline float to_float(float value) {
  return value;
}
inline double to_float(double value) {
  return value;
}

template <class T, class Compute>
inline T from_float(Compute value) {
  if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
    return {static_cast<std::uint16_t>(T::template narrow<std::uint32_t>(static_cast<float>(value)))};
  } else {
    return static_cast<T>(value);
  }
}

}  // namespace bnext::inline BNEXT_ISA
