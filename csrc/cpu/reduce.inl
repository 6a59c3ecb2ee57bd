// Sums over a channel, for kernels.inl: in double from the first addition, in an order that does not depend on the
// instruction set.
#pragma once

#include "vec.h"

namespace bnext::cpu::BNEXT_ISA {
namespace {

// Sums over runs of consecutive elements: term t is what f adds to sum[t] for each element. Element i of a run goes
// into slot i % kSlots.
template <class T, int terms>
class RunSums {
  static constexpr int kSlots = 8, kLanes = BNEXT_SUM_LANES, kVectors = kSlots / kLanes;
  static constexpr int kLine = 64 / sizeof(T), kAhead = 128 * kLine;

 public:
  template <class F, class... P>
  void add(std::int64_t count, F f, const P*... p) {
    Vec<double, kLanes> sum[kVectors][terms];
    unrolled<kVectors * terms>(
        [&](auto i) { sum[i / terms][i % terms] = load<double, kLanes>(at(i / terms, i % terms)); });
    const auto step = [&](std::int64_t i) {
      unrolled<kVectors>([&](auto v) { f(sum[v], load<double, kLanes>(p + i + v * kLanes)...); });
    };
    std::int64_t i = 0;
    for (; i + kLine <= count; i += kLine) {
      (prefetch<kLine>(p + i + kAhead), ...);
      unrolled<kLine / kSlots>([&](auto u) { step(i + u * kSlots); });
    }
    for (; i + kSlots <= count; i += kSlots) step(i);
    unrolled<kVectors * terms>([&](auto i) { store(at(i / terms, i % terms), sum[i / terms][i % terms]); });
    for (int slot = 0; i < count; ++i, ++slot) {
      double one[terms] = {};
      f(one, static_cast<double>(to_float(p[i]))...);
      for (int t = 0; t < terms; ++t) sums_[t][slot] += one[t];
    }
  }
  double total(int term) const {
    double total = 0;
    for (double slot : sums_[term]) total += slot;
    return total;
  }

 private:
  double* at(int vector, int term) { return sums_[term] + vector * kLanes; }
  double sums_[terms][kSlots] = {};
};

// Sums over rows of C channels, one for each channel: what f adds to sum[t] for each row's element c goes, row by row,
// into sums[t * C + c], by way of short sums of 64 rows. f also gets channel[c], a value that all rows share. Rows are
// taken four side by side (two, of two tensors), so that sums are seldom loaded; a prefetcher loses its way between
// them, so the memory ahead is asked for in its own order; where a row has several tiles, in the next rows.
template <class T, int terms>
class RowSums {
  static constexpr int kLanes = BNEXT_SUM_LANES, kTile = 1024;  // channels at a time
  static constexpr int kAhead = 4096 / sizeof(T);               // elements

 public:
  explicit RowSums(std::int64_t C) : C_(C) {}

  template <class F, class K, class... P>
  void add(double* sums, std::int64_t rows, F f, const K* channel, const P*... p) {
    constexpr int kSide = 4 / sizeof...(P), kRun = 64;
    for (std::int64_t c = 0; c < C_; c += kTile) {
      const std::int64_t size = C_ - c < kTile ? C_ - c : kTile;
      for (std::int64_t row = 0; row < rows; row += kRun) {
        const std::int64_t end = rows - row < kRun ? rows : row + kRun;
        for (std::int64_t i = 0; i < terms * size; ++i) tile_[i] = 0;
        std::int64_t r = row;
        for (; r + kSide <= end; r += kSide) add_side_by_side<kSide>(size, f, channel + c, p + r * C_ + c...);
        for (; r < end; ++r) add_side_by_side<1>(size, f, channel + c, p + r * C_ + c...);
        add_tile(sums + c, size);
      }
    }
  }

 private:
  template <int rows, class F, class K, class... P>
  void add_side_by_side(std::int64_t size, F f, const K* channel, const P*... p) {
    std::int64_t c = 0;
    for (; c + kLanes <= size; c += kLanes) {
      double* tile = tile_ + c * terms;
      if (C_ <= kTile) {
        (prefetch<rows * kLanes>(p + kAhead + rows * c), ...);
      } else {
        unrolled<rows>([&](auto r) { (prefetch<kLanes>(p + (rows + r) * C_ + c), ...); });
      }
      Vec<double, kLanes> sum[terms];
      const auto shared = load<double, kLanes>(channel + c);
      unrolled<terms>([&](auto t) { sum[t] = load<double, kLanes>(tile + t * kLanes); });
      unrolled<rows>([&](auto r) { f(sum, shared, load<double, kLanes>(p + r * C_ + c)...); });
      unrolled<terms>([&](auto t) { store(tile + t * kLanes, sum[t]); });
    }
    for (; c < size; ++c)
      unrolled<rows>([&](auto r) {
        f(tile_ + c * terms, static_cast<double>(channel[c]), static_cast<double>(to_float(p[r * C_ + c]))...);
      });
  }

  void add_tile(double* sums, std::int64_t size) const {
    for (std::int64_t c = 0; c < size; ++c) {
      const bool in_vector = c < size / kLanes * kLanes;
      for (int t = 0; t < terms; ++t)
        sums[t * C_ + c] +=
            in_vector ? tile_[c / kLanes * kLanes * terms + t * kLanes + c % kLanes] : tile_[c * terms + t];
    }
  }

  std::int64_t C_;
  // A vector of each term in turn, then, past the last whole vector, the terms of each channel.
  double tile_[terms * kTile];
};

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
