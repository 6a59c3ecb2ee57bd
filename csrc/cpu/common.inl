// What forward.inl and backward.inl share: access to [C] arrays, loops over a problem, the elementwise pass.
#pragma once

#include "../math.h"
#include "kernels.h"
#include "vec.h"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using std::int64_t;

constexpr int kGroup = 64;  // channels whose sums are kept at once (planar)

// Where factor j of channel c lies in Scratch::factors: a vector of each factor in turn, which an elementwise
// pass over rows reads as one stream.
template <class C, int factor_count>
int64_t factor_at(int64_t j, int64_t c) {
  return (c / lanes<C> * factor_count + j) * lanes<C> + c % lanes<C>;
}

// f(offset, size, c) for the runs of contiguous elements of channels [begin, end) in a block, in order of
// memory.
template <class F>
void for_runs(const Problem& p, const Tiling::Block& block, int64_t begin, int64_t end, F f) {
  for (int64_t n = block.plane_begin; n < block.plane_end; ++n)
    for (int64_t c = begin; c < end; ++c) f((n * p.C + c) * p.S + block.begin, block.size(), c);
}

// f(first channel, last channel, chunk) for the groups of the channels in each of the chunks.
template <class F>
void for_groups(Range channels, Range chunks, F f) {
  for (int64_t k = chunks.begin; k < chunks.end; ++k)
    for (int64_t c = channels.begin; c < channels.end; c += kGroup) f(c, std::min(c + kGroup, channels.end), k);
}

// out[i] = f(factors of channel c, in[i]...) for i in [begin, end), all of channel c.
template <class C, int factor_count, class F, class T, class... In>
void map_run(const C* factors, int64_t c, int64_t begin, int64_t end, F f, T* out, const In*... in) {
  C factor[factor_count];
  unrolled<factor_count>([&](auto j) { factor[j] = factors[factor_at<C, factor_count>(j, c)]; });
  int64_t i = begin;
  for (; i + lanes<C> <= end; i += lanes<C>) store(out + i, f(factor, load<C, lanes<C>>(in + i)...));
  for (; i < end; ++i) out[i] = from_float<T>(f(factor, to_float(in[i])...));
}

// The same for `count` rows of C channels side by side, so that factors are loaded once for all of them. All loads come
// before the stores: rows that are a multiple of 4 KB apart would otherwise wait for one another.
template <class A, int factor_count, int count, class F, class T, class... In>
void map_rows(const A* factors, int64_t C, F f, T* out, const In*... in) {
  constexpr int kLanes = lanes<A>;
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
    Vec<A, kLanes> factor[factor_count], result[count];
    unrolled<factor_count>([&](auto j) { factor[j] = load<A, kLanes>(factors + c * factor_count + j * kLanes); });
    unrolled<count>([&](auto r) { result[r] = f(factor, load<A, kLanes>(in + r * C + c)...); });
    unrolled<count>([&](auto r) { store(out + r * C + c, result[r]); });
  }
  for (; c < C; ++c)
    for (int64_t i = c; i < count * C; i += C) map_run<A, factor_count>(factors, c, i, i + 1, f, out, in...);
}

// out[i] = f(factors of i's channel, in[i]...) for a range of each channel's values, in order of memory.
template <class T, int factor_count, class F, class... In>
void map(const Problem& p, const Scratch& scratch, Range channels, Range values, F f, T* out, const In*... in) {
  using A = Compute<T>;
  const A* factors = static_cast<const A*>(scratch.factors);
  if (p.layout == Layout::planar) {
    for (int64_t value = values.begin; value < values.end;) {
      const int64_t n = value / p.S, s = value % p.S, size = std::min(p.S - s, values.end - value);
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const int64_t i = (n * p.C + c) * p.S + s;
        map_run<A, factor_count>(factors, c, i, i + size, f, out, in...);
      }
      value += size;
    }
    return;
  }
  constexpr int kRows = 4;
  const int64_t row_bytes = p.C * static_cast<int64_t>(sizeof(T));
  int64_t row = values.begin;
  if (row_bytes >= 8192)  // a row's factors alone fill the nearest cache
    for (; row + kRows <= values.end; row += kRows)
      map_rows<A, factor_count, kRows>(factors, p.C, f, out + row * p.C, in + row * p.C...);
  for (; row < values.end; ++row) map_rows<A, factor_count, 1>(factors, p.C, f, out + row * p.C, in + row * p.C...);
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
