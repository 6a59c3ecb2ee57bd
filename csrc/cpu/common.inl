// What forward.inl and backward.inl share: access to [C] arrays, loops over a problem, the elementwise pass.
#pragma once

#include <algorithm>
#include <memory>

#include "kernels.h"
#include "reduce.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using std::int64_t;

// Below it squares of float32 numbers begin to lose digits.
constexpr double kTiny = 1e-30;

// f(c, zero) for c in [begin, end), for a vector of channels at a time and then one by one: zero has the type that f is
// to compute in.
template <class F>
void for_channels(int64_t begin, int64_t end, F f) {
  int64_t c = begin;
  for (; c + lanes<double> <= end; c += lanes<double>) f(c, Vec<double, lanes<double>>{});
  for (; c < end; ++c) f(c, 0.0);
}
template <class V>
V get(const double* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
void put(double* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// The runs of contiguous elements that channel c has in a block.
inline Runs runs_of(const Problem& p, const Tiling::Block& block, int64_t c) {
  return {block.plane_end - block.plane_begin, block.size(), p.C * p.S,
          (block.plane_begin * p.C + c) * p.S + block.begin};
}

// sums[t, c] = the sum over a row's repetitions of channel c (see Row); sums is [2, row.width()].
inline void fold(double* sums, const Row& row) {
  for (int t = 0; t < 2; ++t)
    for (int64_t r = 1; r < row.repeats; ++r)
      for (int64_t c = 0; c < row.C; ++c) sums[t * row.width() + c] += sums[t * row.width() + r * row.C + c];
}
template <class A>
void repeat(A* values, const Row& row) {
  for (int64_t i = row.C; i < row.width(); ++i) values[i] = values[i - row.C];
}

// Where factor j of column i lies in Scratch::factors of rows: a vector of each factor in turn, in the order in which
// an elementwise pass over rows of T reads them.
template <class T, int factor_count>
int64_t factor_at(int64_t j, int64_t i) {
  constexpr int kLanes = lanes<Compute<T>>;
  const int64_t at = place<Compute<T>, T>(i);
  return (at / kLanes * factor_count + j) * kLanes + at % kLanes;
}
// Sets the factors of channel c; planar, those of a channel lie side by side.
template <class T, int factor_count>
void put_factors(const Problem& p, const Scratch& scratch, int64_t c, const Compute<T> (&factors)[factor_count]) {
  auto* all = static_cast<Compute<T>*>(scratch.factors);
  if (p.layout == Layout::planar) {
    std::copy_n(factors, factor_count, all + c * factor_count);
    return;
  }
  for (int64_t r = 0; r < Row(p.C).repeats; ++r)
    for (int j = 0; j < factor_count; ++j) all[factor_at<T, factor_count>(j, r * p.C + c)] = factors[j];
}

constexpr int64_t kAhead = 16384;  // bytes from what is read to what is asked for

// out[i] = f(factors, in[i]...) for i in [0, size). Only whole lines are written past the caches: to mix
// both ways of writing within one is slow. `ahead` elements further on is what will be wanted soon, unless 0.
template <bool streaming, int factor_count, class A, class F, class T, class... In>
void map_run(const A* factors, int64_t size, int64_t ahead, F f, T* out, const In*... in) {
  constexpr int64_t kLanes = lanes<A>, kCount = parts<A, T> * kLanes, kInLine = kLine / sizeof(T);
  A factor[factor_count];
  std::copy_n(factors, factor_count, factor);
  const auto write = [&](auto past, int64_t i) {
    if (ahead != 0) (prefetch<kCount>(in + i + ahead), ...);
    Vec<A, lanes<A>> result[parts<A, T>];
    unrolled<parts<A, T>>([&](auto v) { result[v] = f(factor, load_part<A, v>(in + i)...); });
    store_parts<past>(out + i, result);
  };
  if constexpr (streaming) {
    const int64_t head = std::min<int64_t>(size, -reinterpret_cast<std::uintptr_t>(out) % kLine / sizeof(T));
    const int64_t lines = (size - head) / kInLine * kInLine, done = head + lines;
    map_run<false, factor_count>(factors, head, ahead, f, out, in...);
    for (int64_t i = head; i < done; i += kCount) write(std::true_type{}, i);
    map_run<false, factor_count>(factors, size - done, ahead, f, out + done, in + done...);
  } else if (size >= kCount) {
    for (int64_t i = 0; i + kCount <= size; i += kCount) write(std::false_type{}, i);
    write(std::false_type{}, size - kCount);  // may overlap the one before
  } else if (size >= kLanes) {
    for (int64_t i : {int64_t(0), size - kLanes}) store<false>(out + i, f(factor, load<A>(in + i)...));
  } else {
    for (int64_t i = 0; i < size; ++i) out[i] = from_float<T>(f(factor, static_cast<A>(to_float(in[i]))...));
  }
}

// The same for `rows` rows of `width` elements, side by side, so that factors are loaded once for all: column c is
// channel c's. All loads come before the stores: rows that are a multiple of 4 KB apart would otherwise wait for one
// another. Prefetchers lose their way between rows, so the next ones are asked for in order of memory.
template <bool streaming, int factor_count, int rows, class A, class F, class T, class... In>
void map_rows(const A* factors, int64_t width, F f, T* out, const In*... in) {
  constexpr int kLanes = lanes<A>, kParts = parts<A, T>, kCount = kParts * kLanes;
  const int64_t next = std::max(rows * width, kAhead / static_cast<int64_t>(sizeof(T)));
  int64_t c = 0;
  for (; c + kCount <= width; c += kCount) {
    (prefetch<rows * kCount>(in + next + rows * c), ...);
    Vec<A, kLanes> result[rows][kParts];
    unrolled<kParts>([&](auto v) {
      Vec<A, kLanes> factor[factor_count];
      unrolled<factor_count>(
          [&](auto j) { factor[j] = load<A>(factors + c * factor_count + (v * factor_count + j) * kLanes); });
      unrolled<rows>([&](auto r) { result[r][v] = f(factor, load_part<A, v>(in + r * width + c)...); });
    });
    unrolled<rows>([&](auto r) { store_parts<streaming>(out + r * width + c, result[r]); });
  }
  for (; c < width; ++c) {
    A factor[factor_count];
    for (int j = 0; j < factor_count; ++j) factor[j] = factors[factor_at<T, factor_count>(j, c)];
    for (int64_t i = c; i < rows * width; i += width) map_run<false, factor_count>(factor, 1, 0, f, out + i, in + i...);
  }
}

// out[i] = f(factors of i's channel, in[i]...) for a range of each channel's values, in order of memory.
template <bool streaming, class T, int factor_count, class F, class... In>
void map_in_order(const Problem& p, const Scratch& scratch, Range channels, Range values, F f, T* out,
                  const In*... in) {
  const auto* factors = static_cast<const Compute<T>*>(scratch.factors);
  if (p.layout == Layout::planar) {
    // The next group of channels is read while this one is written.
    const bool grouped = values.end - values.begin == p.count() && channels.end < p.C;
    const int64_t ahead = grouped ? (channels.end - channels.begin) * p.S : 0;
    for (int64_t value = values.begin; value < values.end;) {
      const int64_t n = value / p.S, s = value % p.S, size = std::min(p.S - s, values.end - value);
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const int64_t i = (n * p.C + c) * p.S + s;
        map_run<streaming, factor_count>(factors + c * factor_count, size, ahead, f, out + i, in + i...);
      }
      value += size;
    }
    return;
  }
  constexpr int kRows = 4;
  const int64_t width = Row(p.C).width(), end = values.end * p.C;
  int64_t i = values.begin * p.C;
  for (; i + kRows * width <= end; i += kRows * width)
    map_rows<streaming, factor_count, kRows>(factors, width, f, out + i, in + i...);
  for (; i + width <= end; i += width) map_rows<streaming, factor_count, 1>(factors, width, f, out + i, in + i...);
  if (i < end) map_rows<streaming, factor_count, 1>(factors, end - i, f, out + i, in + i...);
}

template <class T, int factor_count, class F, class... In>
void map(const Problem& p, const Scratch& scratch, Range channels, Range values, F f, T* out, const In*... in) {
  // streams() wants planes and rows of whole lines, or long planes; whole lines must begin as such.
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(out + values.begin * p.C);
  if (scratch.streaming && (begin % kLine == 0 || p.layout == Layout::planar)) {
    map_in_order<true, T, factor_count>(p, scratch, channels, values, f, out, in...);
    fence();
  } else {
    map_in_order<false, T, factor_count>(p, scratch, channels, values, f, out, in...);
  }
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
