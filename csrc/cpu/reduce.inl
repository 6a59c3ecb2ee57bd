// Sums over a channel, for kernels.inl. Two levels: a short run in the compute type, then double.
#pragma once

#include <vector>

#include "vec.h"

namespace bnext::cpu::BNEXT_ISA {
namespace {

// Sums over runs of consecutive elements: term t is what f adds to sum[t] for each element.
template <class T, int terms>
class RunSums {
  using C = Compute<T>;
  static constexpr int kLanes = lanes<C>, kChains = 4, kDepth = 4, kAhead = 8192 / sizeof(C);

 public:
  template <class F, class... P>
  void add(std::int64_t count, F f, const P*... p) {
    std::int64_t i = 0;
    for (; i + kLanes * kChains * kDepth <= count; i += kLanes * kChains * kDepth) {
      for (int u = 0; u < kChains * kDepth * kLanes; u += 64 / sizeof(C)) (prefetch(p + i + u + kAhead), ...);
      Vec<C> part[kChains][terms] = {};
      unrolled<kChains * kDepth>([&](auto u) { f(part[u % kChains], load<C>(p + i + u * kLanes)...); });
      fold(part);
    }
    if (i + kLanes <= count) {
      Vec<C> part[kChains][terms] = {};
      for (; i + kLanes * kChains <= count; i += kLanes * kChains)
        unrolled<kChains>([&](auto u) { f(part[u], load<C>(p + i + u * kLanes)...); });
      for (; i + kLanes <= count; i += kLanes) f(part[0], load<C>(p + i)...);
      fold(part);
    }
    for (; i < count; ++i) f(tail_, static_cast<double>(to_float(p[i]))...);
  }
  double total(int term) const {
    double total = tail_[term];
    for (double lane : sums_[term]) total += lane;
    return total;
  }

 private:
  void fold(const Vec<C> (&part)[kChains][terms]) {
    unrolled<terms>([&](auto t) { add_to<C>(sums_[t], (part[0][t] + part[1][t]) + (part[2][t] + part[3][t])); });
  }
  double sums_[terms][kLanes] = {};
  double tail_[terms] = {};
};

// Sums over rows of C channels, one for each channel: what f adds to sum[t] for each row's element c goes
// into sums[t * C + c]. f also gets channel[c], a value that all rows share. Rows are taken four side by side
// (two, of two tensors), so that sums are seldom loaded; a prefetcher loses its way between them, so the
// memory ahead is asked for in its own order.
template <class T, int terms>
class RowSums {
  using A = Compute<T>;
  static constexpr int kLanes = lanes<A>, kTile = 2048;  // channels at a time
  static constexpr int kAhead = 4096 / sizeof(A);        // elements

 public:
  explicit RowSums(std::int64_t C) : C_(C) {}

  template <class F, class... P>
  void add(double* sums, std::int64_t rows, F f, const A* channel, const P*... p) {
    constexpr int kSide = 4 / sizeof...(P), kRun = 12 * kSide;  // rows side by side; rows in a short sum
    for (std::int64_t c = 0; c < C_; c += kTile) {
      const std::int64_t size = std::min<std::int64_t>(kTile, C_ - c);
      for (std::int64_t row = 0; row < rows; row += kRun) {
        const std::int64_t end = std::min<std::int64_t>(row + kRun, rows);
        std::fill_n(part_, terms * size, A(0));
        std::int64_t r = row;
        for (; r + kSide <= end; r += kSide) add_side_by_side<kSide>(size, f, channel + c, p + r * C_ + c...);
        for (; r < end; ++r) add_side_by_side<1>(size, f, channel + c, p + r * C_ + c...);
        fold(sums + c, size);
      }
    }
  }

 private:
  template <int rows, class F, class... P>
  void add_side_by_side(std::int64_t size, F f, const A* channel, const P*... p) {
    std::int64_t c = 0;
    for (; c + kLanes <= size; c += kLanes) {
      A* part = part_ + c * terms;
      if (size <= kAhead) unrolled<rows>([&](auto r) { (prefetch(p + kAhead + rows * c + r * kLanes), ...); });
      Vec<A> sum[terms] = {};
      const Vec<A> shared = load<A>(channel + c);
      unrolled<rows>([&](auto r) { f(sum, shared, load<A>(p + r * C_ + c)...); });
      unrolled<terms>([&](auto t) { store<A>(part + t * kLanes, load<A>(part + t * kLanes) + sum[t]); });
    }
    for (; c < size; ++c)
      unrolled<rows>([&](auto r) { f(part_ + c * terms, channel[c], static_cast<A>(to_float(p[r * C_ + c]))...); });
  }

  void fold(double* sums, std::int64_t size) const {
    std::int64_t c = 0;
    for (; c + kLanes <= size; c += kLanes)
      unrolled<terms>([&](auto t) { add_to<A>(sums + t * C_ + c, load<A>(part_ + c * terms + t * kLanes)); });
    for (; c < size; ++c)
      for (int t = 0; t < terms; ++t) sums[t * C_ + c] += static_cast<double>(part_[c * terms + t]);
  }

  std::int64_t C_;
  // The short sums: a vector of each term in turn, then, past the last whole vector, the terms of each
  // channel.
  A part_[terms * kTile];
};

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
