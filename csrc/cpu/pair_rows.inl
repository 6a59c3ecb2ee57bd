// Sums of bfloat16 numbers and of their products over rows, each column's by itself; see pairs.inl.
#pragma once

#include <algorithm>
#include <memory>

#include "pairs.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

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
    Cascade lower(columns.lower), upper(columns.upper);
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
    columns = {lower.total(), upper.total(), seen};
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
