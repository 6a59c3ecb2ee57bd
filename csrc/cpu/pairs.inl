// Sums of bfloat16 numbers and of their products by AVX512-BF16's dot product, for kernels.inl: sum(a) and sum(a * b),
// two elements of each channel at a time. Products are exact, short sums are in float32, the rest in double, in an
// order given by the shape alone. The instruction takes denormals for zeros. Here those of planes' runs; pair_rows.inl
// has those of rows.
#pragma once

#include <immintrin.h>

#include <limits>
#include <utility>

#include "reduce.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using std::int64_t;

constexpr int kInRegister = 32;  // bfloat16 numbers

constexpr __mmask32 kAll = ~__mmask32(0);
inline __m512i load_some(__mmask32 present, const BFloat16* p) {
  __m512i v = _mm512_maskz_loadu_epi16(present, p);
  asm("" : "+v"(v));  // GCC would load it again for each use, and one across two lines takes two cycles
  return v;
}
// The first `count` of a register.
inline __mmask32 first(int64_t count) {
  return count >= kInRegister ? kAll : (__mmask32(1) << count) - 1;
}

// What is summed of a register of a, gate(i, present, a, b): i is the place of its first element in the tensor, present
// tells which are there, b is what they are multiplied by. columns(c) is the gate of rows' columns from c on.
struct Open {
  __m512i operator()(int64_t, __mmask32, __m512i a, __m512i) const { return a; }
  const Open& columns(int64_t) const { return *this; }
};

// In the place of sums that are lost.
constexpr double kLost = std::numeric_limits<double>::quiet_NaN();

// Which bits, but for signs, have been seen in a and in b.
struct Seen {
  using Bits = Vec<std::uint16_t, kInRegister>;
  Bits a = {}, b = {};

  // same: b is a.
  template <bool same>
  void add(__m512i more_a, __m512i more_b) {
    a |= (Bits)more_a;
    if constexpr (same) {
      b = a;
    } else {
      b |= (Bits)more_b;
    }
  }
  static __mmask32 some(Bits bits) { return _mm512_test_epi16_mask((__m512i)bits, _mm512_set1_epi16(0x7fff)); }
};

// Whether a sum of products is 0 and should perhaps not be: for denormals in a, or in b.
inline bool is_lost(double sum, double products, bool in_a, bool in_b) {
  return products == 0 && in_a && (in_b || sum == 0);
}

// Sums of a and of a * b in float32, each lane two elements.
struct Short {
  Vec<float, 16> a = {}, ab = {};

  void add(const Short& other) {
    a += other.a;
    ab += other.ab;
  }
  void add(__m512i more_a, __m512i more_b) {
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    a = _mm512_dpbf16_ps(a, (__m512bh)more_a, (__m512bh)ones);
    ab = _mm512_dpbf16_ps(ab, (__m512bh)more_a, (__m512bh)more_b);
  }
};

// The same in double.
struct Wide {
  Vec<double, 8> of[2][2] = {};  // [a or a * b, half of the lanes]

  [[gnu::always_inline]] void add(const Short& some) {
    add_in_double(of[0], some.a);
    add_in_double(of[1], some.ab);
  }
  double total(int t) const { return _mm512_reduce_add_pd(of[t][0] + of[t][1]); }
  // Of products.
  bool any_zero() const { return bits_of((of[1][0] == 0) | (of[1][1] == 0)); }
};

// Adds short sums, a few of them in float32: so few that those of neighbouring numbers' squares, which have few digits,
// stay exact.
class Cascade {
  static constexpr int kMost = 4;

 public:
  explicit Cascade(const Wide& wide) : wide_(wide) {}
  [[gnu::always_inline]] void add(const Short& some) {
    held_.add(some);
    if (++count_ == kMost) flush();
  }
  [[gnu::always_inline]] const Wide& total() {
    flush();
    return wide_;
  }

 private:
  [[gnu::always_inline]] void flush() {
    wide_.add(held_);
    held_ = {};
    count_ = 0;
  }

  Wide wide_;
  Short held_;
  int count_ = 0;
};

// The sums of a and of a * b.
struct PairSums {
  double a, ab;
  bool lost;
};

// Over runs, two at a time, the short sums of a few registers each.
template <bool same, class Gate>
class PairRuns {
  static constexpr int kMost = 8, kMany = kMost * kInRegister;  // registers and elements in a sum of a run

 public:
  static PairSums sum(const Runs& runs, const Gate& gate, const BFloat16* a, const BFloat16* b) {
    return sum(runs, gate, a, b, std::make_integer_sequence<int, kMost>{});
  }

 private:
  template <int... whole>
  static PairSums sum(const Runs& runs, const Gate& gate, const BFloat16* a, const BFloat16* b,
                      std::integer_sequence<int, whole...>) {
    static constexpr decltype(&sum_ending<0>) kTable[] = {sum_ending<whole>...};
    return kTable[(runs.size - 1) % kMany / kInRegister](runs, gate, a, b);
  }

  // Of runs that end in `whole` registers and some elements more.
  template <int whole>
  static PairSums sum_ending(const Runs& runs, const Gate& gate, const BFloat16* a, const BFloat16* b) {
    const int64_t ahead = runs.ahead(), many = (runs.size - 1) / kMany * kMany;
    const __mmask32 tail = first(runs.size - many - whole * kInRegister);
    Cascade sums{Wide()};
    Seen seen;
    const auto take = [&](Short& some, int64_t i, __mmask32 present) __attribute__((always_inline)) {
      const __m512i in_b = load_some(present, b + i);
      const __m512i in_a = same ? in_b : gate(i, present, load_some(present, a + i), in_b);
      seen.add<same>(in_a, in_b);
      some.add(in_a, in_b);
    };
    const auto ask = [&](auto size, int64_t i) __attribute__((always_inline)) {
      if (ahead == 0) return;
      prefetch<size>(a + i + ahead);
      if (!same) prefetch<size>(b + i + ahead);
    };
    const auto take_begin = [&](int64_t begin) __attribute__((always_inline)) {
      for (int64_t i = begin; i < begin + many; i += kMany) {
        Short some;
        ask(std::integral_constant<int, kMany>{}, i);
        unrolled<kMost>([&](auto r) __attribute__((always_inline)) { take(some, i + r * kInRegister, kAll); });
        sums.add(some);
      }
    };
    const auto take_end = [&](Short& some, int64_t i) __attribute__((always_inline)) {
      ask(std::integral_constant<int, (whole + 1) * kInRegister>{}, i);
      unrolled<whole>([&](auto r) __attribute__((always_inline)) { take(some, i + r * kInRegister, kAll); });
      take(some, i + whole * kInRegister, tail);
    };
    int64_t begin = runs.begin;
    for (int64_t n = 0; n + 2 <= runs.count; n += 2, begin += 2 * runs.stride) {
      take_begin(begin);
      take_begin(begin + runs.stride);
      Short some[2];
      take_end(some[0], begin + many);
      take_end(some[1], begin + runs.stride + many);
      some[0].add(some[1]);
      sums.add(some[0]);
    }
    if (runs.count % 2) {
      take_begin(begin);
      Short some;
      take_end(some, begin + many);
      sums.add(some);
    }
    const Wide& wide = sums.total();
    const double sum = wide.total(0), products = wide.total(1);
    return {sum, products, is_lost(sum, products, Seen::some(seen.a), Seen::some(seen.b))};
  }
};

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
