// What the loops read and write element by element besides plain arrays of T: a residual or what the forward kept of
// it, bit by bit, and results that are two. Each is a place that `+ i` moves by elements, as a pointer.
#pragma once

#include "exp.h"

namespace bnext::cpu::BNEXT_ISA {

// Lanes of V as a comparison gives them: a bool, or a vector of integers that are 0 or -1.
template <class V>
using Lanes = decltype(V{} < V{});

// Whether identity and ReLU are compiled for T, or chosen at run time as the others: few train in the other dtypes
// here.
template <class T>
inline constexpr bool kSpecialized = std::is_same_v<T, float> || std::is_same_v<T, BFloat16>;

// `count` bits from bit i of mask on, the first of them the lowest.
template <int count>
inline std::uint32_t read_bits(const std::uint8_t* mask, std::uint64_t i) {
  constexpr int kBytes = (count + 7) / 8;
  const int shift = static_cast<int>(i % 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, mask + i / 8, kBytes);
  if (shift == 0 && count % 8 == 0) return static_cast<std::uint32_t>(bits);
  if (shift + count > 8 * kBytes) bits |= static_cast<std::uint64_t>(mask[i / 8 + kBytes]) << (8 * kBytes);
  return static_cast<std::uint32_t>(bits >> shift & ((std::uint64_t{1} << count) - 1));
}
// Of bytes that are not whole; the rest of them may be another thread's.
[[gnu::noinline]] static void write_parts(std::uint8_t* byte, int shift, int count, std::uint32_t bits) {
  std::uint64_t set = static_cast<std::uint64_t>(bits) << shift, all = ((std::uint64_t{1} << count) - 1) << shift;
  for (; all; ++byte, set >>= 8, all >>= 8) {
    __atomic_fetch_and(byte, static_cast<std::uint8_t>(~all), __ATOMIC_RELAXED);
    __atomic_fetch_or(byte, static_cast<std::uint8_t>(set), __ATOMIC_RELAXED);
  }
}
template <int count>
inline void write_bits(std::uint8_t* mask, std::uint64_t i, std::uint32_t bits) {
  if (i % 8 == 0 && count % 8 == 0) {
    std::memcpy(mask + i / 8, &bits, count / 8);
  } else {
    write_parts(mask + i / 8, static_cast<int>(i % 8), count, bits);
  }
}

// Bit i of the result is lane i.
inline std::uint32_t bits_of(bool lane) {
  return lane;
}
template <class M>
inline std::uint32_t bits_of(M lanes) {
  constexpr int kLane = sizeof(lanes[0]), kCount = sizeof(M) / kLane;
#if BNEXT_VECTOR_BYTES == 64
  if constexpr (sizeof(M) == 64 && kLane == 2) return _mm512_movepi16_mask((__m512i)lanes);
  if constexpr (sizeof(M) == 64 && kLane == 4) return _mm512_movepi32_mask((__m512i)lanes);
  if constexpr (sizeof(M) == 64 && kLane == 8) return _mm512_movepi64_mask((__m512i)lanes);
#elif BNEXT_VECTOR_BYTES == 32
  if constexpr (sizeof(M) == 32 && kLane == 4) return _mm256_movemask_ps((__m256)lanes);
  if constexpr (sizeof(M) == 32 && kLane == 8) return _mm256_movemask_pd((__m256d)lanes);
#elif defined(__SSE2__)
  if constexpr (sizeof(M) == 16 && kLane == 4) return _mm_movemask_ps((__m128)lanes);
  if constexpr (sizeof(M) == 16 && kLane == 8) return _mm_movemask_pd((__m128d)lanes);
#endif
  std::uint32_t bits = 0;
  for (int i = 0; i < kCount; ++i) bits |= static_cast<std::uint32_t>(lanes[i] & 1) << i;
  return bits;
}
// Lane i is bit `first + i * step`.
template <class V, int first = 0, int step = 1>
inline Lanes<V> lanes_of(std::uint32_t bits) {
  if constexpr (std::is_same_v<Lanes<V>, bool>) {
    return bits;
  } else {
    using Lane = std::decay_t<decltype(Lanes<V>{}[0])>;
    Lanes<V> place;
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(Lane)); ++i)
      place[i] = static_cast<Lane>(1u << (first + i * step));
    return ((Lanes<V>{} + static_cast<Lane>(bits)) & place) != 0;
  }
}

// One element or vector of a Residual.
template <class V>
struct Added {
  V value;
  Lanes<V> passes;
};
// A residual, or the mask that a forward made of it; what is null is read as 0.
template <class T>
struct Residual {
  const T* values;
  const std::uint8_t* mask;
  std::int64_t at = 0;  // bit of the mask

  [[gnu::always_inline]] Residual operator+(std::int64_t i) const {
    return {values ? values + i : nullptr, mask, at + i};
  }

  // V's elements at this place, by `read`; bit `first + i * step` is lane i's.
  template <class V, int count, int first, int step, class F>
  Added<V> get(F read) const {
    Added<V> added{};
    if (values) added.value = read(values);
    if (mask) added.passes = lanes_of<V, first, step>(read_bits<count>(mask, at));
    return added;
  }
};

// Element i at a place, to compute with in A.
template <class A, class T>
inline A element(const T* p, std::int64_t i) {
  return static_cast<A>(to_float(p[i]));
}
template <class A, class T>
inline auto element(const Residual<T>& p, std::int64_t i) {
  using C = Compute<T>;
  return (p + i).template get<C, 1, 0, 1>([](const T* q) { return element<C>(q, 0); });
}

// As load and load_part; elements are in the type that they are normalised in, whatever A is.
template <class A, class T>
inline auto load(const Residual<T>& p) {
  using V = Vec<Compute<T>, lanes<A>>;
  return p.template get<V, lanes<A>, 0, 1>([](const T* q) { return convert<V>(load<A>(q)); });
}
template <class A, int v, class T>
inline auto load_part(const Residual<T>& p) {
  constexpr int kParts = parts<A, T>;
  return p.template get<Vec<A, lanes<A>>, kParts * lanes<A>, v, kParts>([](const T* q) { return load_part<A, v>(q); });
}
template <int count, class T>
inline void prefetch(const Residual<T>& p) {
  if (p.values) prefetch<count>(p.values);
}

// A tensor where the mask has bits, and 0 elsewhere.
template <class T>
struct Gated {
  const T* values;
  const std::uint8_t* mask;
  std::int64_t at = 0;  // bit of the mask

  [[gnu::always_inline]] Gated operator+(std::int64_t i) const { return {values + i, mask, at + i}; }
};
template <class A, class T>
inline A element(const Gated<T>& p, std::int64_t i) {
  return read_bits<1>(p.mask, p.at + i) ? element<A>(p.values, i) : A(0);
}
template <class A, class T>
[[gnu::always_inline]] inline Vec<A, lanes<A>> load(const Gated<T>& p) {
  using V = Vec<A, lanes<A>>;
  return lanes_of<V>(read_bits<lanes<A>>(p.mask, p.at)) ? load<A>(p.values) : V{};
}
template <class A, int v, class T>
inline Vec<A, lanes<A>> load_part(const Gated<T>& p) {
#ifdef BNEXT_BF16
  if constexpr (parts<A, T> == 2)
    return widen_part<v>(_mm512_maskz_loadu_epi16(read_bits<2 * lanes<A>>(p.mask, p.at), p.values));
#endif
  return load<A>(p);
}
template <int count, class T>
inline void prefetch(const Gated<T>& p) {
  prefetch<count>(p.values);
}

// A result and its bit of the mask.
template <class V>
struct Marked {
  V value;
  Lanes<V> passes;
};
// Where they go; the mask may be null. Where ReLU's results go: its gradient passes those that are not 0.
template <class T>
struct Masked {
  T* values;
  std::uint8_t* mask;
  std::int64_t at = 0;

  Masked operator+(std::int64_t i) const { return {values + i, mask, at + i}; }
};

// Two results, and where they go.
template <class V>
struct Two {
  V first, second;
};
template <class T>
struct Both {
  T *first, *second;

  Both operator+(std::int64_t i) const { return {first + i, second + i}; }
};

// The address by which vectors are aligned.
template <class T>
inline std::uintptr_t address(T* p) {
  return reinterpret_cast<std::uintptr_t>(p);
}
template <template <class> class Place, class T>
inline std::uintptr_t address(const Place<T>& p) {
  return address(p.values);
}
template <class T>
inline std::uintptr_t address(const Both<T>& p) {
  return address(p.first);
}
// Whether that goes for all of a place.
template <class Out>
inline bool aligned_alike(const Out&) {
  return true;
}
template <class T>
inline bool aligned_alike(const Both<T>& p) {
  return (address(p.first) - address(p.second)) % BNEXT_VECTOR_BYTES == 0;
}

// store and store_parts for these, and of one element.
template <class T, class A>
inline void store_one(T* p, A value) {
  *p = from_float<T>(value);
}
template <class T, class A>
inline void store_one(const Masked<T>& p, const Marked<A>& one) {
  store_one(p.values, one.value);
  if (p.mask) write_bits<1>(p.mask, p.at, one.passes);
}
template <class T, class A>
inline void store_one(const Masked<T>& p, A one) {
  store_one(p.values, one);
  write_bits<1>(p.mask, p.at, one != 0);
}
template <class T, class A>
inline void store_one(const Both<T>& p, const Two<A>& one) {
  store_one(p.first, one.first);
  store_one(p.second, one.second);
}
template <bool streaming, class T, class V>
inline void store(const Masked<T>& p, const Marked<V>& v) {
  store<streaming>(p.values, v.value);
  if (p.mask) write_bits<sizeof(V) / sizeof(v.value[0])>(p.mask, p.at, bits_of(v.passes));
}
template <bool streaming, class T, class V>
inline void store(const Masked<T>& p, const V& v) {
  store<streaming>(p.values, v);
  write_bits<sizeof(V) / sizeof(v[0])>(p.mask, p.at, bits_of(v != 0));
}
template <bool streaming, class T, class V>
inline void store(const Both<T>& p, const Two<V>& v) {
  store<streaming>(p.first, v.first);
  store<streaming>(p.second, v.second);
}
template <bool streaming, class T, class Result>
inline void store_parts(const Masked<T>& p, const Result (&v)[1]) {
  store<streaming>(p, v[0]);
}
#ifdef BNEXT_BF16
template <bool streaming>
inline void store_parts(const Masked<BFloat16>& p, const Marked<Vec<float, 16>> (&v)[2]) {
  store_parts<streaming>(p.values, {v[0].value, v[1].value});
  if (!p.mask) return;
  using Words = Vec<std::int16_t, 32>;  // elements at even and at odd places
  write_bits<32>(p.mask, p.at, bits_of((Words)((v[0].passes & 0xffff) | (v[1].passes << 16))));
}
template <bool streaming>
inline void store_parts(const Masked<BFloat16>& p, const Vec<float, 16> (&v)[2]) {
  const auto bits = narrow_parts(v);
  write_vector<streaming>(p.values, bits);
  write_bits<32>(p.mask, p.at, _mm512_test_epi16_mask((__m512i)bits, _mm512_set1_epi16(0x7fff)));
}
#endif
template <bool streaming, class T, class V, int kParts>
inline void store_parts(const Both<T>& p, const Two<V> (&v)[kParts]) {
  V first[kParts], second[kParts];
  unrolled<kParts>([&](auto i) { first[i] = v[i].first, second[i] = v[i].second; });
  store_parts<streaming>(p.first, first);
  store_parts<streaming>(p.second, second);
}

// A scalar or a vector, with its elements in To's precision, or in C.
template <class To, class V>
inline To to(V v) {
  if constexpr (std::is_arithmetic_v<V>) {
    return static_cast<To>(v);
  } else {
    return convert<To>(v);
  }
}
template <class C, class V>
inline auto in(V v) {
  if constexpr (std::is_arithmetic_v<V>) {
    return to<C>(v);
  } else {
    return to<Vec<C, sizeof(V) / sizeof(v[0])>>(v);
  }
}

}  // namespace bnext::cpu::BNEXT_ISA
