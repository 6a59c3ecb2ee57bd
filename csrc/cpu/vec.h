// The compiler's own vector types (GCC and Clang). An instruction-set unit sets BNEXT_ISA, its namespace, and
// BNEXT_SUM_LANES, the doubles in one of its registers, before including this; the code is the same for all.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../half.h"

namespace bnext::cpu::BNEXT_ISA {

template <class T, int count>
struct VecOf {
  typedef T type __attribute__((vector_size(count * sizeof(T))));
};
template <class T, int count>
using Vec = typename VecOf<T, count>::type;

// In a vector of the elementwise passes: 16 bytes, with which they are bound by memory already.
template <class T>
inline constexpr int lanes = 16 / sizeof(T);

// `count` consecutive elements at p, converted to C.
template <class C, int count, class T>
inline Vec<C, count> load(const T* p) {
  if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
    using U = Vec<std::uint32_t, count>;
    Vec<std::uint16_t, count> bits;
    std::memcpy(&bits, p, sizeof(bits));
    return __builtin_convertvector((T::template widen<U, Vec<float, count>>(__builtin_convertvector(bits, U))),
                                   Vec<C, count>);
  } else {
    Vec<T, count> v;
    std::memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, Vec<C, count>);
  }
}

// Rounds the elements of v to T, to p and the addresses after it.
template <class T, class V>
inline void store(T* p, V v) {
  if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
    constexpr int kCount = sizeof(V) / sizeof(float);
    using U = Vec<std::uint32_t, kCount>;
    const auto bits = __builtin_convertvector(T::template narrow<U>(v), Vec<std::uint16_t, kCount>);
    std::memcpy(p, &bits, sizeof(bits));
  } else {
    static_assert(std::is_same_v<T, std::remove_cv_t<std::remove_reference_t<decltype(v[0])>>>);
    std::memcpy(p, &v, sizeof(v));
  }
}

// f(constant 0), f(constant 1), ...: a loop whose index is known to the compiler, so that arrays stay in
// registers.
template <class F, int... I>
inline void unrolled(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int count, class F>
inline void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, count>{});
}

// Asks for the cache lines of `count` elements at p; an address that is not there is no error.
template <int count, class T>
inline void prefetch(const T* p) {
  constexpr int kLines = (count * sizeof(T) + 63) / 64;
  unrolled<kLines>([&](auto i) { __builtin_prefetch(reinterpret_cast<const char*>(p) + 64 * i); });
}

}  // namespace bnext::cpu::BNEXT_ISA
