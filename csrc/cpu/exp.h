// e^x on the CPU: of float32 with the same bits in scalars and vectors, since which of them an element is computed in
// may depend on the threads.
#pragma once

#include "vec.h"

namespace bnext::inline BNEXT_ISA::math {

// By Cody and Waite's reduction and the polynomial of Cephes' expf, to two units in the last place; infinite
// above 88.4, where little is left, and 1.6e-38 below -87.
template <class U, class F>
inline F exp_of_floats(F x) {
  constexpr float kRound = 0x1.8p23f, kLog2e = 1.44269504f;
  x = x > 89.f ? F{} + 89.f : x < -87.f ? F{} - 87.f : x;
  const F shifted = x * kLog2e + kRound, n = shifted - kRound;  // the integer n is in the last bits of shifted
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;      // ln 2 in two parts
  F p = F{} + 1.9875691500e-4f;
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  return (p * r * r + r + 1.f) * bit_cast<F>((bit_cast<U>(shifted) << 23) + 0x3f800000u);
}

template <>
struct Exp<float> {
  static float of(float x) { return exp_of_floats<std::uint32_t>(x); }
};
template <>
struct Exp<cpu::BNEXT_ISA::Vec<float, cpu::BNEXT_ISA::lanes<float>>> {
  template <class V>
  static V of(V x) {
    return exp_of_floats<cpu::BNEXT_ISA::Vec<std::uint32_t, cpu::BNEXT_ISA::lanes<float>>>(x);
  }
};
template <>
struct Exp<cpu::BNEXT_ISA::Vec<float, cpu::BNEXT_ISA::lanes<double>>> {
  template <class V>
  static V of(V x) {
    return exp_of_floats<cpu::BNEXT_ISA::Vec<std::uint32_t, cpu::BNEXT_ISA::lanes<double>>>(x);
  }
};
template <>
struct Exp<cpu::BNEXT_ISA::Vec<double, cpu::BNEXT_ISA::lanes<double>>> {
  template <class V>
  static V of(V x) {
    for (int i = 0; i < cpu::BNEXT_ISA::lanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
  }
};

}  // namespace bnext::inline BNEXT_ISA::math
