// Lanes of the compiler's own vector type (GCC and Clang). An instruction-set unit sets BNEXT_ISA, its
// namespace, and BNEXT_VECTOR_BYTES, its register width, before including this; the code is the same for all.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../half.h"

namespace bnext::cpu::BNEXT_ISA {

// Compute type of the elementwise passes and of short sums; that of the saved mean and invstd.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

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
  constexpr int kCount = lanes<Compute>;
  if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
    typename VecOf<std::uint16_t, kCount>::type bits;
    std::memcpy(&bits, p, sizeof(bits));
    using U = typename VecOf<std::uint32_t, kCount>::type;
    return T::template widen<U, Vec<float>>(__builtin_convertvector(bits, U));
  } else {
    typename VecOf<T, kCount>::type v;
    std::memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, Vec<Compute>);
  }
}

template <class Compute, class T>
inline void store(T* p, Vec<Compute> v) {
  if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
    using U = typename VecOf<std::uint32_t, lanes<float>>::type;
    const auto bits =
        __builtin_convertvector(T::template narrow<U>(v), typename VecOf<std::uint16_t, lanes<float>>::type);
    std::memcpy(p, &bits, sizeof(bits));
  } else {
    static_assert(std::is_same_v<T, Compute>);
    std::memcpy(p, &v, sizeof(v));
  }
}

// Asks for the cache line at p; an address that is not there is no error.
inline void prefetch(const void* p) {
  __builtin_prefetch(p);
}
inline void prefetch_for_write(const void* p) {
  __builtin_prefetch(p, 1);
}

// sum[i] += v[i], in double; sum has lanes<Compute> elements.
template <class Compute>
inline void add_to(double* sum, Vec<Compute> v) {
  Compute narrow[lanes<Compute>];
  std::memcpy(narrow, &v, sizeof(v));
  for (int i = 0; i < lanes<Compute>; i += lanes<double>)
    store<double>(sum + i, load<double>(sum + i) + load<double>(narrow + i));
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

}  // namespace bnext::cpu::BNEXT_ISA
