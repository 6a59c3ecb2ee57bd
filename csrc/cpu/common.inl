// What forward.inl and backward.inl share: access to [C] arrays, loops over a problem, the elementwise pass.
#pragma once

#include <algorithm>
#include <memory>

#include "../math.h"
#include "kernels.h"
#include "vec.h"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using std::int64_t;

constexpr int kGroup = 64;  // channels whose sums are kept at once (planar)

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

// sums[t, c] = the sum over a row's repetitions of channel c (see Row); sums is [terms, row.width()].
inline void fold(double* sums, int terms, const Row& row) {
  for (int t = 0; t < terms; ++t)
    for (int64_t r = 1; r < row.repeats; ++r)
      for (int64_t c = 0; c < row.C; ++c) sums[t * row.width() + c] += sums[t * row.width() + r * row.C + c];
}
template <class A>
void repeat(A* values, const Row& row) {
  for (int64_t i = row.C; i < row.width(); ++i) values[i] = values[i - row.C];
}

// Where factor j of column i lies in Scratch::factors: a vector of each factor in turn, which an elementwise pass over
// rows reads as one stream.
template <class A, int factor_count>
int64_t factor_at(int64_t j, int64_t i) {
  return (i / lanes<A> * factor_count + j) * lanes<A> + i % lanes<A>;
}
// Sets the factors of channel c.
template <int factor_count, class A>
void put_factors(const Problem& p, const Scratch& scratch, int64_t c, const A (&factors)[factor_count]) {
  const int64_t repeats = p.layout == Layout::planar ? 1 : Row(p.C).repeats;
  for (int64_t r = 0; r < repeats; ++r)
    for (int j = 0; j < factor_count; ++j)
      static_cast<A*>(scratch.factors)[factor_at<A, factor_count>(j, r * p.C + c)] = factors[j];
}

constexpr int64_t kLine = 64;  // bytes of a cache line

// out[i] = f(factors of column c, in[i]...) for i in [0, size). Only whole lines are written past the caches: to mix
// both ways of writing within one is slow.
template <bool streaming, int factor_count, class A, class F, class T, class... In>
void map_run(const A* factors, int64_t c, int64_t size, F f, T* out, const In*... in) {
  constexpr int64_t kLanes = lanes<A>, kInLine = kLine / sizeof(T);
  A factor[factor_count];
  unrolled<factor_count>([&](auto j) { factor[j] = factors[factor_at<A, factor_count>(j, c)]; });
  const auto at = [&](int64_t i) { return f(factor, load<A>(in + i)...); };
  if constexpr (streaming) {
    const int64_t head = std::min<int64_t>(size, -reinterpret_cast<std::uintptr_t>(out) % kLine / sizeof(T));
    const int64_t lines = (size - head) / kInLine * kInLine;
    map_run<false, factor_count>(factors, c, head, f, out, in...);
    for (int64_t i = head; i < head + lines; i += kLanes) store<true>(out + i, at(i));
    const int64_t done = head + lines;
    map_run<false, factor_count>(factors, c, size - done, f, out + done, in + done...);
    return;
  }
  if (size < kLanes) {
    for (int64_t i = 0; i < size; ++i) out[i] = from_float<T>(f(factor, static_cast<A>(to_float(in[i]))...));
    return;
  }
  for (int64_t i = 0; i + kLanes <= size; i += kLanes) store<false>(out + i, at(i));
  store<false>(out + size - kLanes, at(size - kLanes));  // may overlap the one before
}

// The same for a row: column c is channel c's.
template <bool streaming, int factor_count, class A, class F, class T, class... In>
void map_row(const A* factors, int64_t size, F f, T* out, const In*... in) {
  constexpr int kLanes = lanes<A>, kAhead = 4096 / sizeof(T);
  int64_t c = 0;
  for (; c + kLanes <= size; c += kLanes) {
    Vec<A, kLanes> factor[factor_count];
    unrolled<factor_count>([&](auto j) { factor[j] = load<A>(factors + c * factor_count + j * kLanes); });
    (prefetch<kLanes>(in + c + kAhead), ...);
    store<streaming>(out + c, f(factor, load<A>(in + c)...));
  }
  for (; c < size; ++c) map_run<false, factor_count>(factors, c, 1, f, out + c, in + c...);
}

// Copies past the caches, but for the ends that are not whole lines.
template <class T>
void copy_past_caches(T* out, const T* from, int64_t size) {
  constexpr int64_t kInLine = kLine / sizeof(T);
  const int64_t head = std::min<int64_t>(size, -reinterpret_cast<std::uintptr_t>(out) % kLine / sizeof(T));
  std::memcpy(out, from, head * sizeof(T));
  int64_t i = head;
  for (; i + kInLine <= size; i += kInLine)
    unrolled<kLine / BNEXT_VECTOR_BYTES>([&](auto j) {
      constexpr int kOffset = j * BNEXT_VECTOR_BYTES / sizeof(T);
      Vec<char, BNEXT_VECTOR_BYTES> v;
      std::memcpy(&v, from + i + kOffset, sizeof(v));
      write_past_caches(out + i + kOffset, v);
    });
  std::memcpy(out + i, from + i, (size - i) * sizeof(T));
}

// The planes of channels [begin, end) of an image, which lie side by side, past the caches: short planes, of which
// few lines belong to one alone, by way of a buffer.
template <int factor_count, class A, class F, class T, class... In>
void map_planes(const A* factors, int64_t begin, int64_t end, int64_t S, F f, T* out, const In*... in) {
  constexpr int64_t kBuffer = 16384 / sizeof(T), kShortPlane = kBuffer / 4;
  alignas(kLine) T buffer[kBuffer];
  const bool whole_lines = (reinterpret_cast<std::uintptr_t>(out) | S * sizeof(T)) % kLine == 0;
  for (int64_t c = begin; c < end;) {
    const int64_t at = (c - begin) * S;
    if (S > kShortPlane || whole_lines) {
      map_run<true, factor_count>(factors, c, S, f, out + at, in + at...);
      ++c;
      continue;
    }
    const int64_t count = std::min(end - c, kBuffer / S);
    for (int64_t i = 0; i < count; ++i)
      map_run<false, factor_count>(factors, c + i, S, f, buffer + i * S, in + at + i * S...);
    copy_past_caches(out + at, buffer, count * S);
    c += count;
  }
}

// out[i] = f(factors of i's channel, in[i]...) for a range of each channel's values, in order of memory.
template <bool streaming, class T, int factor_count, class F, class... In>
void map_in_order(const Problem& p, const Scratch& scratch, Range channels, Range values, F f, T* out,
                  const In*... in) {
  const auto* factors = static_cast<const Compute<T>*>(scratch.factors);
  if (p.layout == Layout::planar) {
    for (int64_t value = values.begin; value < values.end;) {
      const int64_t n = value / p.S, s = value % p.S, size = std::min(p.S - s, values.end - value);
      const int64_t first = (n * p.C + channels.begin) * p.S + s;
      if (streaming && size == p.S) {
        map_planes<factor_count>(factors, channels.begin, channels.end, p.S, f, out + first, in + first...);
      } else {
        for (int64_t c = channels.begin, i = first; c < channels.end; ++c, i += p.S)
          map_run<streaming, factor_count>(factors, c, size, f, out + i, in + i...);
      }
      value += size;
    }
    return;
  }
  const int64_t width = Row(p.C).width(), end = values.end * p.C;
  for (int64_t i = values.begin * p.C; i < end; i += width)
    map_row<streaming, factor_count>(factors, std::min(width, end - i), f, out + i, in + i...);
}

template <class T, int factor_count, class F, class... In>
void map(const Problem& p, const Scratch& scratch, Range channels, Range values, F f, T* out, const In*... in) {
  // A run is brought into line by its first vector; rows must be.
  constexpr std::uintptr_t kBytes = lanes<Compute<T>> * sizeof(T);
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(out + values.begin * p.C);
  const bool planar = p.layout == Layout::planar;
  const bool aligned = planar ? begin % sizeof(T) == 0 : (begin | Row(p.C).width() * sizeof(T)) % kBytes == 0;
  if (scratch.streaming && aligned) {
    map_in_order<true, T, factor_count>(p, scratch, channels, values, f, out, in...);
    fence();
  } else {
    map_in_order<false, T, factor_count>(p, scratch, channels, values, f, out, in...);
  }
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
