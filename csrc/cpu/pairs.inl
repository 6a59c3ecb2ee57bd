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

inline __m512i load_some(const BFloat16* p, int64_t count) {
  const __mmask32 present = count >= kInRegister ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
  return _mm512_maskz_loadu_epi16(present, p);
}

// In the place of sums that are lost.
constexpr double kLost = std::numeric_limits<double>::quiet_NaN();

// Which bits, but for signs, have been seen in a and in b.
struct Seen {
  using Bits = Vec<std::uint16_t, kInRegister>;
  Bits a = {}, b = {};

  void add(__m512i more_a, __m512i more_b) {
    a |= (Bits)more_a;
    b |= (Bits)more_b;
  }
  static __mmask32 some(Bits bits) { return _mm512_test_epi16_mask((__m512i)bits, _mm512_set1_epi16(0x7fff)); }
};

// Whether a sum of products is 0 and should perhaps not be: for denormals in a, or in b.
inline bool is_lost(double sum, double products, bool in_a, bool in_b) {
  return products == 0 && in_a && (in_b || sum == 0);
}

// some[0] += a, some[1] += a * b, each lane two elements.
inline void add_pairs(Vec<float, 16>* some, __m512i a, __m512i b) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  some[0] = _mm512_dpbf16_ps(some[0], (__m512bh)a, (__m512bh)ones);
  some[1] = _mm512_dpbf16_ps(some[1], (__m512bh)a, (__m512bh)b);
}

// Over runs of consecutive elements; the ends of several go into one short sum.
class PairRunSums {
  static constexpr int kMost = 8;  // registers summed in float32

 public:
  // `ahead` elements further on is what will be wanted soon.
  void add(int64_t count, int64_t ahead, const BFloat16* a, const BFloat16* b) {
    const auto ask = [&](auto size, int64_t i) {
      prefetch<size>(a + i + ahead);
      if (b != a) prefetch<size>(b + i + ahead);
    };
    constexpr std::integral_constant<int, kInRegister> one;
    constexpr std::integral_constant<int, kMost * kInRegister> many;
    Seen seen = seen_;
    int64_t i = 0;
    for (; i + many <= count; i += many) {
      Vec<float, 16> some[2] = {};
      ask(many, i);
      unrolled<kMost>([&](auto u) {
        const int64_t at = i + u * kInRegister;
        const __m512i of_a = _mm512_loadu_si512(a + at), of_b = _mm512_loadu_si512(b + at);
        seen.add(of_a, of_b);
        add_pairs(some, of_a, of_b);
      });
      for (int t = 0; t < 2; ++t) add_in_double(sums_[t], some[t]);
    }
    if (i < count) {
      const int registers = static_cast<int>((count - i + one - 1) / one);
      if (held_ + registers > kMost) release();
      held_ += registers;
      Vec<float, 16> some[2] = {some_[0], some_[1]};
      for (; i < count; i += one) {
        ask(one, i);
        const __m512i of_a = load_some(a + i, count - i), of_b = load_some(b + i, count - i);
        seen.add(of_a, of_b);
        add_pairs(some, of_a, of_b);
      }
      std::memcpy(some_, some, sizeof(some));
    }
    seen_ = seen;
  }
  double total(int term) {
    release();
    const Vec<double, 8> both = sums_[term][0] + sums_[term][1];
    double total = 0;
    for (int i = 0; i < 8; ++i) total += both[i];
    return total;
  }
  bool lost() { return is_lost(total(0), total(1), Seen::some(seen_.a), Seen::some(seen_.b)); }

 private:
  void release() {
    for (int t = 0; t < 2; ++t) {
      add_in_double(sums_[t], some_[t]);
      some_[t] = Vec<float, 16>{};
    }
    held_ = 0;
  }

  Vec<double, 8> sums_[2][2] = {};
  Vec<float, 16> some_[2] = {};
  Seen seen_;
  int held_ = 0;
};

// Over rows of `width` elements, one for each column. Two rows are interleaved, so that a lane has two elements of one
// column. Tiles of rows as in RowSums.
class PairRowSums {
  static constexpr int kMost = 16;  // rows summed in float32

 public:
  explicit PairRowSums(int64_t width) : width_(width), columns_(new Columns[(width + kInRegister - 1) / kInRegister]) {}

  void add(int64_t elements, const BFloat16* a, const BFloat16* b) {
    const int64_t rows = elements / width_, row_bytes = width_ * (a == b ? 2 : 4);
    const int64_t tile = std::max<int64_t>(1, kTileBytes / row_bytes / kMost) * kMost;
    for (int64_t row = 0; row < rows; row += tile) {
      int64_t asked = (row + tile) * width_;  // elements, in order of memory
      const int64_t count = std::min(tile, rows - row);
      for (int64_t c = 0; c < width_; c += kInRegister, asked += count * kInRegister)
        add_columns<true>(count, c, width_ - c, a + row * width_, b + row * width_, a + asked, b + asked);
    }
    const int64_t done = rows * width_;
    for (int64_t c = 0; c < elements - done; c += kInRegister)
      add_columns<false>(1, c, elements - done - c, a + done, b + done, a, b);
  }

  // sums[t * width + c] = the sum for column c.
  void write(double* sums) const {
    for (int t = 0; t < 2; ++t)
      for (int64_t c = 0; c < width_; ++c) sums[t * width_ + c] = sum(t, c);
  }
  // f(c) for every column whose sum is lost.
  template <class F>
  void each_lost(F f) const {
    for (int64_t begin = 0; begin < width_; begin += kInRegister) {
      const Seen& seen = columns_[begin / kInRegister].seen;
      const __mmask32 in_a = Seen::some(seen.a), in_b = Seen::some(seen.b);
      for (int64_t c = begin; c < std::min(begin + kInRegister, width_); ++c) {
        const int i = static_cast<int>(c - begin);
        if (is_lost(sum(0, c), sum(1, c), in_a >> i & 1, in_b >> i & 1)) f(c);
      }
    }
  }

 private:
  struct Columns {                      // of a register
    Vec<double, 8> sums[2][2][2] = {};  // [term, half of the columns, half of the lanes]
    Seen seen;
  };

  // Columns c to c + size, at most a register of them, of some rows.
  template <bool ahead>
  void add_columns(int64_t rows, int64_t c, int64_t size, const BFloat16* a, const BFloat16* b, const BFloat16* next_a,
                   const BFloat16* next_b) {
    Columns& columns = columns_[c / kInRegister];
    Seen seen = columns.seen;
    for (int64_t row = 0; row < rows; row += kMost) {
      Vec<float, 16> some[2][2] = {};  // of each half both terms
      const auto add_two = [&](int64_t r, bool both) {
        if (ahead) {
          prefetch<2 * kInRegister>(next_a + r * kInRegister);
          if (b != a) prefetch<2 * kInRegister>(next_b + r * kInRegister);
        }
        const int64_t at = r * width_ + c;
        const __m512i zero = _mm512_setzero_si512();
        const __m512i a0 = load_some(a + at, size), a1 = both ? load_some(a + at + width_, size) : zero;
        const __m512i b0 = load_some(b + at, size), b1 = both ? load_some(b + at + width_, size) : zero;
        seen.add(_mm512_or_si512(a0, a1), _mm512_or_si512(b0, b1));
        add_pairs(some[0], _mm512_unpacklo_epi16(a0, a1), _mm512_unpacklo_epi16(b0, b1));
        add_pairs(some[1], _mm512_unpackhi_epi16(a0, a1), _mm512_unpackhi_epi16(b0, b1));
      };
      if (row + kMost <= rows) {
        unrolled<kMost / 2>([&](auto u) { add_two(row + 2 * u, true); });
      } else {
        for (int64_t r = row; r < rows; r += 2) add_two(r, r + 1 < rows);
      }
      for (int t = 0; t < 2; ++t)
        for (int half = 0; half < 2; ++half) add_in_double(columns.sums[t][half], some[half][t]);
    }
    columns.seen = seen;
  }

  // The sum for a column. Columns 0 to 3 of each eight are in the first, 4 to 7 in the second of two registers.
  double sum(int t, int64_t column) const {
    const int64_t i = column % kInRegister, half = i / 4 % 2, lane = i / 8 * 4 + i % 4;
    return columns_[column / kInRegister].sums[t][half][lane / 8][lane % 8];
  }

  int64_t width_;
  std::unique_ptr<Columns[]> columns_;
};

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
