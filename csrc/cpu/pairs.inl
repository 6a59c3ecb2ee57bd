// Sums of bfloat16 numbers and of their products by AVX512-BF16's dot product, for kernels.inl: sum(a) and sum(a * b),
// two elements of each channel at a time. Products are exact, short sums are in float32, the rest in double, in an
// order given by the shape alone. The instruction takes denormals for zeros.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "reduce.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using std::int64_t;

constexpr int kInRegister = 32;  // bfloat16 numbers

constexpr __mmask32 kAll = ~__mmask32(0);
inline __m512i load_some(__mmask32 present, const BFloat16* p) {
  return _mm512_maskz_loadu_epi16(present, p);
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

  void add(__m512i more_a, __m512i more_b) {
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    a = _mm512_dpbf16_ps(a, (__m512bh)more_a, (__m512bh)ones);
    ab = _mm512_dpbf16_ps(ab, (__m512bh)more_a, (__m512bh)more_b);
  }
};

// The same in double.
struct Wide {
  Vec<double, 8> of[2][2] = {};  // [a or a * b, half of the lanes]

  void add(const Short& some) {
    add_in_double(of[0], some.a);
    add_in_double(of[1], some.ab);
  }
  // Of products.
  bool any_zero() const { return bits_of((of[1][0] == 0) | (of[1][1] == 0)); }
};

// Over runs; the ends of several go into one short sum.
class PairRunSums {
  static constexpr int kMost = 8;  // registers summed in float32

 public:
  void add(const Runs& runs, const BFloat16* a) { add_runs<true>(runs, Open(), a, a); }
  template <class Gate>
  void add(const Runs& runs, const Gate& gate, const BFloat16* a, const BFloat16* b) {
    add_runs<false>(runs, gate, a, b);
  }
  double total(int term) const {
    const Vec<double, 8> both = sums_.of[term][0] + sums_.of[term][1];
    double total = 0;
    for (int i = 0; i < 8; ++i) total += both[i];
    return total;
  }
  bool lost() const { return is_lost(total(0), total(1), Seen::some(seen_.a), Seen::some(seen_.b)); }

 private:
  template <bool same, class Gate>
  void add_runs(const Runs& runs, const Gate& gate, const BFloat16* a, const BFloat16* b) {
    constexpr int kMany = kMost * kInRegister;
    const int64_t ahead = runs.ahead(), many = runs.size / kMany * kMany, whole = runs.size / kInRegister * kInRegister;
    const __mmask32 tail = first(runs.size - whole);
    const int64_t ends = (runs.size - many + kInRegister - 1) / kInRegister;  // registers
    Wide sums = sums_;
    Seen seen = seen_;
    Short end;
    int64_t held = 0;
    for (int64_t n = 0; n < runs.count; ++n) {
      const int64_t begin = runs.begin + n * runs.stride;
      const BFloat16 *of_a = a + begin, *of_b = same ? of_a : b + begin;
      const auto ask = [&](auto size, int64_t i) {
        if (ahead == 0) return;
        prefetch<size>(of_a + i + ahead);
        if (!same) prefetch<size>(of_b + i + ahead);
      };
      const auto take = [&](Short& some, int64_t i, __mmask32 present) __attribute__((always_inline)) {
        const __m512i in_b = load_some(present, of_b + i);
        const __m512i in_a = same ? in_b : gate(begin + i, present, load_some(present, of_a + i), in_b);
        seen.add<same>(in_a, in_b);
        some.add(in_a, in_b);
      };
      for (int64_t i = 0; i < many; i += kMany) {
        Short some;
        ask(std::integral_constant<int, kMany>{}, i);
        for (int64_t at = i; at < i + kMany; at += kInRegister) take(some, at, kAll);
        sums.add(some);
      }
      if (held + ends > kMost) {
        sums.add(end);
        end = {};
        held = 0;
      }
      held += ends;
      for (int64_t i = many; i < whole; i += kInRegister) {
        ask(std::integral_constant<int, kInRegister>{}, i);
        take(end, i, kAll);
      }
      if (tail) {
        ask(std::integral_constant<int, kInRegister>{}, whole);
        take(end, whole, tail);
      }
    }
    sums.add(end);
    sums_ = sums;
    seen_ = seen;
  }

  Wide sums_;
  Seen seen_;
};

// Over rows of `width` elements, one for each column. Two rows are interleaved, so that a lane has two elements of one
// column. Rows are taken in tiles that the nearest caches hold, since columns of a tile are summed one after the other;
// the next tile is asked for in order of memory meanwhile, or not.
class PairRowSums {
  static constexpr int kMost = 16;  // rows summed in float32
  static constexpr int64_t kTileBytes = 64 * 1024, kQuad = 4;

 public:
  PairRowSums(int64_t width, bool asks)
      : width_(width), asks_(asks), columns_(new Columns[(width + kInRegister - 1) / kInRegister]) {}

  // Elements from `begin` on.
  void add(int64_t begin, int64_t elements, const BFloat16* a) { add_rows<true>(begin, elements, Open(), a, a); }
  template <class Gate>
  void add(int64_t begin, int64_t elements, const Gate& gate, const BFloat16* a, const BFloat16* b) {
    add_rows<false>(begin, elements, gate, a, b);
  }

  // sums[t * width + c] = the sum for column c.
  void write(double* sums) const {
    for (int t = 0; t < 2; ++t)
      for (int64_t c = 0; c < width_; c += kQuad)
        std::memcpy(sums + t * width_ + c, at(t, c),
                    sizeof(double) * static_cast<std::size_t>(std::min(kQuad, width_ - c)));
  }
  // f(c) for every column whose sum is lost.
  template <class F>
  void each_lost(F f) const {
    for (int64_t begin = 0; begin < width_; begin += kInRegister) {
      const auto& [lower, upper, seen] = columns_[begin / kInRegister];
      if (!lower.any_zero() && !upper.any_zero()) continue;
      const __mmask32 in_a = Seen::some(seen.a), in_b = Seen::some(seen.b);
      for (int64_t c = begin; c < std::min(begin + kInRegister, width_); ++c) {
        const int i = static_cast<int>(c - begin);
        const double sum = at(0, c)[c % kQuad], products = at(1, c)[c % kQuad];
        if (is_lost(sum, products, in_a >> i & 1, in_b >> i & 1)) f(c);
      }
    }
  }

 private:
  struct Columns {      // of a register
    Wide lower, upper;  // of each eight columns
    Seen seen;
  };

  template <bool same, class Gate>
  void add_rows(int64_t begin, int64_t elements, const Gate& gate, const BFloat16* a, const BFloat16* b) {
    const int64_t rows = elements / width_, row_bytes = width_ * (same ? 2 : 4);
    const int64_t tile = std::max<int64_t>(1, kTileBytes / row_bytes / kMost) * kMost;
    const auto add_tiles = [&](auto asks) {
      for (int64_t row = 0; row < rows; row += tile) {
        int64_t asked = begin + (row + tile) * width_;  // elements, in order of memory
        const int64_t count = std::min(tile, rows - row);
        for (int64_t c = 0; c < width_; c += kInRegister, asked += count * kInRegister)
          add_columns<same, asks>(begin + row * width_, count, c, width_ - c, asked, gate.columns(c), a, b);
      }
    };
    asks_ ? add_tiles(std::true_type{}) : add_tiles(std::false_type{});
    const int64_t done = rows * width_;
    for (int64_t c = 0; c < elements - done; c += kInRegister)
      add_columns<same, false>(begin + done, 1, c, elements - done - c, 0, gate.columns(c), a, b);
  }

  // Columns c to c + size, at most a register of them, of some rows, the first at `at`. ahead: elements from `next` on
  // are what will be wanted soon.
  template <bool same, bool ahead, class Gate>
  void add_columns(int64_t at, int64_t rows, int64_t c, int64_t size, int64_t next, const Gate& gate, const BFloat16* a,
                   const BFloat16* b) {
    Columns& columns = columns_[c / kInRegister];
    const __mmask32 present = first(size);
    const auto load_b = [&](int64_t i) { return load_some(present, b + i); };
    const auto load_a = [&](int64_t i, __m512i in_b) __attribute__((always_inline)) {
      return same ? in_b : gate(i, present, load_some(present, a + i), in_b);
    };
    Wide lower = columns.lower, upper = columns.upper;
    Seen seen = columns.seen;
    at += c;
    for (int64_t row = 0; row < rows; row += kMost) {
      Short some_lower, some_upper;
      const auto add_two = [&](__m512i a0, __m512i a1, __m512i b0, __m512i b1) __attribute__((always_inline)) {
        seen.add<same>(_mm512_or_si512(a0, a1), _mm512_or_si512(b0, b1));
        some_lower.add(_mm512_unpacklo_epi16(a0, a1), _mm512_unpacklo_epi16(b0, b1));
        some_upper.add(_mm512_unpackhi_epi16(a0, a1), _mm512_unpackhi_epi16(b0, b1));
      };
      const int64_t count = std::min<int64_t>(kMost, rows - row);
      for (int64_t r = 0; r + 2 <= count; r += 2) {
        if (ahead) {
          prefetch<2 * kInRegister>(a + next);
          if (!same) prefetch<2 * kInRegister>(b + next);
          next += 2 * kInRegister;
        }
        const __m512i b0 = load_b(at), b1 = load_b(at + width_);
        add_two(load_a(at, b0), load_a(at + width_, b1), b0, b1);
        at += 2 * width_;
      }
      if (count % 2) {
        const __m512i b0 = load_b(at), zero = _mm512_setzero_si512();
        add_two(load_a(at, b0), zero, b0, zero);
      }
      lower.add(some_lower);
      upper.add(some_upper);
    }
    columns = {lower, upper, seen};
  }

  // The sums for the four columns that `column` is one of: each second four are in `lower`, the others in `upper`.
  const double* at(int t, int64_t column) const {
    const int64_t quad = column % kInRegister / kQuad;
    const Columns& columns = columns_[column / kInRegister];
    return reinterpret_cast<const double*>((quad % 2 ? columns.upper : columns.lower).of[t]) + quad / 2 * kQuad;
  }

  int64_t width_;
  bool asks_;
  std::unique_ptr<Columns[]> columns_;
};

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
