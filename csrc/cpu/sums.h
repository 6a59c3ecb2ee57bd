// What sums in registers are made of, for reduce.inl and pairs.inl.
#pragma once

#include "vec.h"

namespace bnext::cpu::BNEXT_ISA {
namespace {

// The lower and the upper half of a register of floats.
inline void halves(Vec<float, lanes<float>> v, Vec<float, lanes<double>>& lower, Vec<float, lanes<double>>& upper) {
#if BNEXT_VECTOR_BYTES == 64
  lower = _mm512_castps512_ps256(v), upper = _mm512_extractf32x8_ps(v, 1);
#elif BNEXT_VECTOR_BYTES == 32
  lower = _mm256_castps256_ps128(v), upper = _mm256_extractf128_ps(v, 1);
#else
  std::memcpy(&lower, &v, sizeof(lower));
  std::memcpy(&upper, reinterpret_cast<const char*>(&v) + sizeof(lower), sizeof(upper));
#endif
}

// a + b and a - b. With AVX-512 as a + b * 1 and a - b * 1, which have the same bits, for the multipliers to do: the
// adders are the busiest units of a reduction.
template <class V>
inline V add(V a, V b) {
#if BNEXT_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, Vec<double, 8>>) return _mm512_fmadd_pd(b, _mm512_set1_pd(1.0), a);
  if constexpr (std::is_same_v<V, Vec<float, 16>>) return _mm512_fmadd_ps(b, _mm512_set1_ps(1.0f), a);
#endif
  return a + b;
}
template <class V>
inline V subtract(V a, V b) {
#if BNEXT_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, Vec<float, 16>>) return _mm512_fnmadd_ps(b, _mm512_set1_ps(1.0f), a);
#endif
  return a - b;
}

// sum[0] += the lower half of v, sum[1] += the upper one; all of v where it is of doubles already.
[[gnu::always_inline]] inline void add_in_double(Vec<double, lanes<double>>* sum, Vec<double, lanes<double>> v) {
  sum[0] += v;
}
[[gnu::always_inline]] inline void add_in_double(Vec<double, lanes<double>>* sum, Vec<float, lanes<float>> v) {
  Vec<float, lanes<double>> lower, upper;
  halves(v, lower, upper);
  sum[0] = add(sum[0], convert<Vec<double, lanes<double>>>(lower));
  sum[1] = add(sum[1], convert<Vec<double, lanes<double>>>(upper));
}

// The leading 8 bits of a float32 number. Those of a few numbers add up exactly while none is 10000 times smaller than
// another; what is left of numbers is so much less that sums of it in float32 lose nothing that counts.
inline Vec<float, lanes<float>> leading(Vec<float, lanes<float>> v) {
  constexpr std::int32_t kLeading = -65536;  // sign, exponent and 7 bits
  return bit_cast<Vec<float, lanes<float>>>(bit_cast<Vec<std::int32_t, lanes<float>>>(v) & kLeading);
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
