// Lanes of the compiler's own vector type (GCC and Clang). An instruction-set unit sets BNEXT_ISA, its
// namespace, and BNEXT_VECTOR_BYTES, its register width, before including this; the code is the same for all.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace bnext::cpu::BNEXT_ISA {

template <class T, int count>
struct VecOf {
  typedef T type __attribute__((vector_size(count * sizeof(T))));
};

template <class T>
inline constexpr int lanes = BNEXT_VECTOR_BYTES / sizeof(T);

template <class T>
using Vec = typename VecOf<T, lanes<T>>::type;

// lanes<Compute> consecutive elements at p, converted.
template <class Compute, class T>
inline Vec<Compute> load(const T* p) {
  typename VecOf<T, lanes<Compute>>::type v;
  std::memcpy(&v, p, sizeof(v));
  if constexpr (std::is_same_v<T, Compute>) {
    return v;
  } else {
    return __builtin_convertvector(v, Vec<Compute>);
  }
}

template <class Compute, class T>
inline void store(T* p, Vec<Compute> v) {
  static_assert(std::is_same_v<T, Compute>);
  std::memcpy(p, &v, sizeof(v));
}

// f(constant 0), f(constant 1), ...: a loop whose index is known to the compiler, so that arrays stay in registers.
template <class F, int... I>
inline void unrolled(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int count, class F>
inline void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, count>{});
}

}  // namespace bnext::cpu::BNEXT_ISA
