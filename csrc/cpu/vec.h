// The compiler's own vector types (GCC and Clang). An instruction-set unit sets BNEXT_ISA, its namespace, and
// BNEXT_VECTOR_BYTES, the size of its registers, before including this; the code is the same for all.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../half.h"
#include "../math.h"

namespace bnext::cpu::BNEXT_ISA {

template <class T, int count>
struct VecOf {
  typedef T type __attribute__((vector_size(count * sizeof(T))));
};
template <class T, int count>
using Vec = typename VecOf<T, count>::type;

// Of C in a register.
template <class C>
inline constexpr int lanes = BNEXT_VECTOR_BYTES / sizeof(C);

// f(constant 0), f(constant 1), ...: a loop whose index is known to the compiler, so that arrays stay in
// registers.
template <class F, int... I>
[[gnu::always_inline]] inline void unrolled([[maybe_unused]] F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int count, class F>
[[gnu::always_inline]] inline void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, count>{});
}

// Conversions between vectors of one length. Where the length is that of a register, the machine's instruction is
// named: compilers split what __builtin_convertvector says into halves, and put them together again.
template <class To, class From>
inline To convert(From v) {
  return __builtin_convertvector(v, To);
}
#if BNEXT_VECTOR_BYTES >= 32
template <>
inline Vec<std::uint32_t, 8> convert(Vec<std::uint16_t, 8> v) {
  return (Vec<std::uint32_t, 8>)_mm256_cvtepu16_epi32((__m128i)v);
}
template <>
inline Vec<std::uint16_t, 8> convert(Vec<std::uint32_t, 8> v) {
  const __m256i words = (__m256i)(v & 0xffffu);
  return (Vec<std::uint16_t, 8>)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
template <>
inline Vec<double, 4> convert(Vec<float, 4> v) {
  return _mm256_cvtps_pd(v);
}
#endif
#if BNEXT_VECTOR_BYTES >= 64
template <>
inline Vec<std::uint32_t, 16> convert(Vec<std::uint16_t, 16> v) {
  return (Vec<std::uint32_t, 16>)_mm512_cvtepu16_epi32((__m256i)v);
}
template <>
inline Vec<std::uint16_t, 16> convert(Vec<std::uint32_t, 16> v) {
  return (Vec<std::uint16_t, 16>)_mm512_cvtepi32_epi16((__m512i)v);
}
template <>
inline Vec<double, 8> convert(Vec<float, 8> v) {
  return _mm512_cvtps_pd(v);
}
#endif

// Bits of half numbers to float32 and back.
template <class T, int count>
inline Vec<float, count> widen(Vec<std::uint16_t, count> bits) {
  using U = Vec<std::uint32_t, count>;
  return T::template widen<U, Vec<float, count>>(convert<U>(bits));
}
template <class T, int count>
inline Vec<std::uint16_t, count> narrow(Vec<float, count> v) {
  return convert<Vec<std::uint16_t, count>>(T::template narrow<Vec<std::uint32_t, count>>(v));
}
#if BNEXT_VECTOR_BYTES >= 32
template <>
inline Vec<float, 8> widen<Float16, 8>(Vec<std::uint16_t, 8> bits) {
  return _mm256_cvtph_ps((__m128i)bits);
}
template <>
inline Vec<std::uint16_t, 8> narrow<Float16, 8>(Vec<float, 8> v) {
  return (Vec<std::uint16_t, 8>)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
#endif
#if BNEXT_VECTOR_BYTES >= 64
template <>
inline Vec<float, 16> widen<Float16, 16>(Vec<std::uint16_t, 16> bits) {
  return _mm512_cvtph_ps((__m256i)bits);
}
template <>
inline Vec<std::uint16_t, 16> narrow<Float16, 16>(Vec<float, 16> v) {
  return (Vec<std::uint16_t, 16>)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
#endif

// The first `count` elements of a, the others of b.
template <class V>
inline V first_of(std::uint64_t count, V a, V b) {
  using Lane = std::conditional_t<sizeof(a[0]) == sizeof(std::int32_t), std::int32_t, std::int64_t>;
  constexpr int kCount = sizeof(V) / sizeof(Lane);
#if BNEXT_VECTOR_BYTES == 64
  const auto mask = (1u << count) - 1;
  if constexpr (kCount == 16) return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), b, a);
  if constexpr (kCount == 8) return _mm512_mask_blend_pd(static_cast<__mmask8>(mask), b, a);
#else
  Vec<Lane, kCount> lane;
  for (int i = 0; i < kCount; ++i) lane[i] = i;
  return lane < static_cast<Lane>(count) ? a : b;
#endif
}

// A register of consecutive elements at p, converted to C.
template <class C, class T>
inline Vec<C, lanes<C>> load(const T* p) {
  constexpr int kCount = lanes<C>;
  constexpr bool kHalf = sizeof(T) == sizeof(std::uint16_t);
  Vec<std::conditional_t<kHalf, std::uint16_t, T>, kCount> v;
  std::memcpy(&v, p, sizeof(v));
  if constexpr (kHalf) {
    return convert<Vec<C, kCount>>(widen<T, kCount>(v));
  } else {
    return convert<Vec<C, kCount>>(v);
  }
}

// Writes v past the caches; p is a multiple of its size. fence() before another thread may read. Sanitizers do not see
// such stores, and get plain ones.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define BNEXT_STREAM_BYTES 0
#else
#define BNEXT_STREAM_BYTES BNEXT_VECTOR_BYTES
#endif
template <class V>
inline void write_past_caches(void* p, V v) {
#if BNEXT_STREAM_BYTES >= 64
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if BNEXT_STREAM_BYTES >= 32
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__SSE2__) && BNEXT_STREAM_BYTES >= 16
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#endif
  std::memcpy(p, &v, sizeof(v));
}
inline void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <bool streaming, class V>
inline void write_vector(void* p, V v) {
  if constexpr (streaming) {
    write_past_caches(p, v);
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// Rounds the elements of v to T, to p and the addresses after it.
template <bool streaming, class T, class V>
inline void store(T* p, V v) {
  if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
    write_vector<streaming>(p, narrow<T, sizeof(V) / sizeof(float)>(v));
  } else {
    static_assert(std::is_same_v<T, std::remove_cv_t<std::remove_reference_t<decltype(v[0])>>>);
    write_vector<streaming>(p, v);
  }
}

// An elementwise pass takes as many elements at once as this many vectors of A hold, and vector v of them is
// load_part<A, v>: one vector of consecutive elements or, with BF16 instructions, those at even and those at odd
// places.
template <class A, class T>
inline constexpr int parts = 1;
template <class A, int v, class T>
inline Vec<A, lanes<A>> load_part(const T* p) {
  return load<A>(p);
}
template <bool streaming, class T, class V>
inline void store_parts(T* p, const V (&v)[1]) {
  store<streaming>(p, v[0]);
}
// The place of element i among those of its vectors, one vector after the other.
template <class A, class T>
inline std::int64_t place(std::int64_t i) {
  constexpr int kCount = parts<A, T> * lanes<A>;
  return i / kCount * kCount + i % parts<A, T> * lanes<A> + i % kCount / parts<A, T>;
}

#ifdef BNEXT_BF16
template <>
inline constexpr int parts<float, BFloat16> = 2;
// Part v of a register of bfloat16 numbers.
template <int v>
inline Vec<float, 16> widen_part(__m512i bits) {
  return (Vec<float, 16>)(v == 0 ? _mm512_slli_epi32(bits, 16) : _mm512_and_si512(bits, _mm512_set1_epi32(-65536)));
}
template <>
inline Vec<float, 16> load_part<float, 0>(const BFloat16* p) {
  return widen_part<0>(_mm512_loadu_si512(p));
}
template <>
inline Vec<float, 16> load_part<float, 1>(const BFloat16* p) {
  return widen_part<1>(_mm512_loadu_si512(p));
}
// The instruction takes denormals for zeros.
inline Vec<std::uint16_t, 32> narrow_normal_parts(const Vec<float, 16> (&v)[2]) {
  using Bits = Vec<std::uint16_t, 32>;
  const Bits order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Bits)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]));
}
// Where there are any, BFloat16::narrow rounds.
inline Vec<std::uint16_t, 32> narrow_parts(const Vec<float, 16> (&v)[2]) {
  constexpr int kDenormal = 0x20;
  using U = Vec<std::uint32_t, 16>;
  if (__builtin_expect(_mm512_fpclass_ps_mask(v[0], kDenormal) | _mm512_fpclass_ps_mask(v[1], kDenormal), 0))
    return (Vec<std::uint16_t, 32>)(BFloat16::narrow<U>(v[0]) | BFloat16::narrow<U>(v[1]) << 16);
  return narrow_normal_parts(v);
}
template <bool streaming>
inline void store_parts(BFloat16* p, const Vec<float, 16> (&v)[2]) {
  write_vector<streaming>(p, narrow_parts(v));
}
#endif

// Asks for the cache lines of `count` elements at p, for the second-level cache; an address that is not there is no
// error. Inlined at once, as everything around it must be: GCC drops calls of functions that do nothing else.
template <int count, class T>
[[gnu::always_inline]] inline void prefetch(const T* p) {
  constexpr int kLines = (count * sizeof(T) + 63) / 64;
  for (int i = 0; i < kLines; ++i) __builtin_prefetch(reinterpret_cast<const char*>(p) + 64 * i, 0, 2);
}

}  // namespace bnext::cpu::BNEXT_ISA

#ifdef BNEXT_BF16
// This unit has bits of its own anyway, and multiplies and adds in one instruction.
namespace bnext::inline BNEXT_ISA::math {
template <>
struct MultiplyAdd<float> {
  static float of(float a, float b, float c) { return std::fma(a, b, c); }
};
template <>
struct MultiplyAdd<cpu::BNEXT_ISA::Vec<float, 16>> {
  template <class P, class Q>
  static __m512 of(__m512 a, P b, Q c) {
    return _mm512_fmadd_ps(a, all(b), all(c));
  }
  static __m512 all(__m512 v) { return v; }
  static __m512 all(float value) { return _mm512_set1_ps(value); }
};
template <>
struct MultiplyAdd<cpu::BNEXT_ISA::Vec<float, 8>> {
  template <class V, class P, class Q>
  static V of(V a, P b, Q c) {
    for (int i = 0; i < 8; ++i) a[i] = std::fma(a[i], at(b, i), at(c, i));
    return a;
  }
  template <class V>
  static float at(const V& v, int i) {
    return v[i];
  }
  static float at(float value, int) { return value; }
};
}  // namespace bnext::inline BNEXT_ISA::math
#endif
