// Sums of bfloat16 numbers and of their products over rows, each column's by itself; see pairs.inl.
#pragma once

#include <algorithm>
#include <memory>

#include "pairs.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

// sum(a) and sum(a * b) over `elements` elements from `begin` on, rows of `width` columns, the last of which may be
// short. same: b is a. Rows are from kRows parts of a stretch, each read in order of memory, as in reduce.inl; two are
// interleaved, so that a lane has two elements of one column. What will be wanted soon is asked for, or not.
template <bool same, class Gate>
class PairRowSums {
  static constexpr int kRows = same ? 8 : 4;  // together
  static constexpr int kHeld = 64 / kRows;    // times that they are summed in float32: as few numbers as in Cascade
  static constexpr int64_t kQuad = 4;

 public:
  PairRowSums(int64_t width, bool asks, int64_t begin, int64_t elements, const Gate& gate, const BFloat16* a,
              const BFloat16* b)
      : width_(width),
        begin_(begin),
        elements_(elements),
        gate_(gate),
        a_(a),
        b_(b),
        held_(new Columns<Short>[registers()]),
        wide_(new Columns<Wide>[registers()]) {
    asks ? add_all<true>() : add_all<false>();
  }

  // sums[c] = the sum for column c, sums[width + c] = that of products, or kLost.
  void write(double* sums) const {
    double* const products = sums + width_;
    for (int64_t c = 0; c < width_; c += kQuad) {
      const Columns<Wide>& columns = wide_[c / kInRegister];
      const int64_t quad = c % kInRegister / kQuad;  // each second is in `lower`, the others in `upper`
      const Wide& wide = quad % 2 ? columns.upper : columns.lower;
      for (int t = 0; t < 2; ++t) {
        const double* from = reinterpret_cast<const double*>(wide.of[t]) + quad / 2 * kQuad;
        double* to = sums + t * width_ + c;
        if (c + kQuad <= width_) {
          std::memcpy(to, from, kQuad * sizeof(double));
        } else {
          std::copy_n(from, width_ - c, to);
        }
      }
    }
    for (int64_t begin = 0; begin < width_; begin += kInRegister) {
      const auto& [lower, upper] = wide_[begin / kInRegister];
      if (!lower.any_zero() && !upper.any_zero()) continue;
      const int64_t end = std::min(begin + kInRegister, width_);  // what lies behind it is 0 too
      if (std::none_of(products + begin, products + end, [](double sum) { return sum == 0; })) continue;
      const Seen seen = look(begin);
      const __mmask32 in_a = Seen::some(seen.a), in_b = Seen::some(seen.b);
      for (int64_t c = begin; c < end; ++c) {
        const int i = static_cast<int>(c - begin);
        if (is_lost(sums[c], products[c], in_a >> i & 1, in_b >> i & 1)) products[c] = kLost;
      }
    }
  }

 private:
  template <class S>
  struct Columns {   // of a register
    S lower, upper;  // of each half of them
  };

  std::size_t registers() const { return static_cast<std::size_t>((width_ + kInRegister - 1) / kInRegister); }

  template <bool asks>
  void add_all() {
    in_stretches<BFloat16, kRows>(elements_, width_, [&](auto rows, int64_t row, int64_t apart, int64_t size) {
      add_rows<rows, asks>(row * width_, apart * width_, size);
    });
    flush();
  }

  // The first `size` columns of `rows` rows that are `apart` elements apart, the first of them at `row`.
  template <int rows, bool asks>
  void add_rows(int64_t row, int64_t apart, int64_t size) {
    for (int64_t c = 0; c < size; c += kInRegister) {
      const __mmask32 present = first(size - c);
      const auto& gate = gate_.columns(c);
      Columns<Short> some;
      unrolled<(rows + 1) / 2>([&](auto pair) __attribute__((always_inline)) {
        __m512i a[2] = {}, b[2] = {};
        unrolled<std::min(rows, 2)>([&](auto r) __attribute__((always_inline)) {
          const int64_t i = begin_ + row + (2 * pair + r) * apart + c;
          if constexpr (asks) {
            prefetch<kInRegister>(b_ + i + kAhead<BFloat16>);
            if constexpr (!same) prefetch<kInRegister>(a_ + i + kAhead<BFloat16>);
          }
          b[r] = load_some(present, b_ + i);
          a[r] = same ? b[r] : gate(i, present, load_some(present, a_ + i), b[r]);
        });
        some.lower.add(_mm512_unpacklo_epi16(a[0], a[1]), _mm512_unpacklo_epi16(b[0], b[1]));
        some.upper.add(_mm512_unpackhi_epi16(a[0], a[1]), _mm512_unpackhi_epi16(b[0], b[1]));
      });
      Columns<Short>& held = held_[c / kInRegister];
      held.lower.add(some.lower);
      held.upper.add(some.upper);
    }
    if (++count_ == kHeld) flush();
  }

  void flush() {
    for (std::size_t i = 0; i < registers(); ++i) {
      wide_[i].lower.add(held_[i].lower);
      wide_[i].upper.add(held_[i].upper);
      held_[i] = {};
    }
    count_ = 0;
  }

  // What a register's columns from c on have in all rows.
  Seen look(int64_t c) const {
    Seen seen;
    const auto& gate = gate_.columns(c);
    const int64_t end = begin_ + elements_;
    for (int64_t i = begin_ + c; i < end; i += width_) {
      const __mmask32 present = first(std::min(width_ - c, end - i));
      const __m512i b = load_some(present, b_ + i);
      seen.add<same>(same ? b : gate(i, present, load_some(present, a_ + i), b), b);
    }
    return seen;
  }

  int64_t width_, begin_, elements_;
  const Gate& gate_;
  const BFloat16 *a_, *b_;
  int count_ = 0;  // of short sums held
  std::unique_ptr<Columns<Short>[]> held_;
  std::unique_ptr<Columns<Wide>[]> wide_;
};

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
