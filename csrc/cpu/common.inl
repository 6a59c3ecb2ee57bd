// What forward.inl and backward.inl share: access to [C] arrays, and where in a problem they are used.
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

// weight * invstd and bias of channel c, with the same bits in the forward and the backward.
template <class Params, class A>
A scale_of(const Params& p, int64_t c, A invstd) {
  return p.weight ? static_cast<A>(read<double>(p.weight, p.param_dtype, c)) * invstd : invstd;
}
template <class A, class Params>
A bias_of(const Params& p, int64_t c) {
  return p.bias ? static_cast<A>(read<double>(p.bias, p.param_dtype, c)) : A(0);
}

// The runs of contiguous elements that channel c has in a block, for a call with so many passes.
inline Runs runs_of(const Problem& p, const Tiling::Block& block, int64_t c, int passes) {
  return {block.plane_end - block.plane_begin, block.size(), p.C * p.S,
          (block.plane_begin * p.C + c) * p.S + block.begin, exceeds_caches(p, passes)};
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
void put_factors(Layout layout, const Row& row, void* all, int64_t c, const Compute<T> (&factors)[factor_count]) {
  auto* const to = static_cast<Compute<T>*>(all);
  if (layout == Layout::planar) {
    std::copy_n(factors, factor_count, to + c * factor_count);
    return;
  }
  for (int64_t i = c; i < row.width(); i += row.C)
    for (int j = 0; j < factor_count; ++j) to[factor_at<T, factor_count>(j, i)] = factors[j];
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
