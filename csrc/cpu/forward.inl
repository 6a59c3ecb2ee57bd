// Training and evaluation forward, for kernels.inl.
//
// Statistics are shifted sums within a block, short ones in float32, combined by Chan's formula across blocks. With E =
// N * C * S * itemsize: reduce reads E, apply reads E (from cache where the channels taken together are few enough) and
// writes E.
#pragma once

#include <cmath>
#include <limits>
#include <memory>

#include "common.inl"
#include "reduce.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using Moments = math::Moments<double>;

constexpr int kForwardFactors = 3;  // mean, scale, bias

// scratch.partials is [chunks, 3, C]: Moments, part by part.
template <class V>
math::Moments<V> get_moments(const double* partial, int64_t C) {
  return {get<V>(partial), get<V>(partial + C), get<V>(partial + 2 * C)};
}
template <class V>
void put_moments(double* partial, int64_t C, const math::Moments<V>& m) {
  put(partial, m.origin);
  put(partial + C, m.offset);
  put(partial + 2 * C, m.m2);
}

// Moments of one channel of a block in double, two passes: for values whose shifted sums overflow (an infinity, a NaN,
// a square beyond float64).
template <class T>
Moments wide_moments(const ForwardParams& p, const Tiling::Block& block, int64_t c) {
  const T* x = static_cast<const T*>(p.input);
  const bool planar = p.layout == Layout::planar;
  const auto each = [&](auto f) {
    for (int64_t n = block.plane_begin; n < block.plane_end; ++n)
      for (int64_t s = block.begin; s < block.end; ++s)
        f(static_cast<double>(to_float(x[planar ? (n * p.C + c) * p.S + s : n * p.C + c])));
  };
  double sum = 0, m2 = 0;
  each([&](double v) { sum += v; });
  const double mean = sum / static_cast<double>(block.count());
  each([&](double v) { m2 += (v - mean) * (v - mean); });
  return {0, mean, m2};
}

// Below it squares of float32 numbers begin to lose digits.
constexpr double kTiny = 1e-30;

// Whether sums in A of count values about a shift can be used. Those in float32 are then as good as in double: no
// square too large or too small, and a shift near the mean. Where all squares are 0, only a tiny eps would bring the
// difference to light.
template <class A>
bool trusted(const ForwardParams& p, double squares, double m2, double count) {
  const bool finite = squares <= std::numeric_limits<double>::max();
  if (std::is_same_v<A, double>) return finite;
  return finite & ((squares >= kTiny * count) | ((squares == 0) & (p.eps >= kTiny))) & (4 * m2 >= squares);
}

template <class V>
math::Moments<V> moments_of(V shift, V sum, V squares, double count) {
  const V sums[2] = {sum, squares};
  math::Moments<V> moments{shift, {}, {}};
  math::welford_push(moments, 0.0, sums, 1 / count);
  return moments;
}

// The part of a block that its shift comes from: a 64th, at least eight values, from one plane where that has as many.
inline Tiling::Block sample(Tiling::Block block) {
  const int64_t wanted = std::max<int64_t>(8, block.count() / 64), planes = (wanted + block.size() - 1) / block.size();
  block.plane_end = std::min(block.plane_end, block.plane_begin + planes);
  block.end = std::min(block.end, block.begin + wanted);
  return block;
}

// The shift that follows from a sample: its mean, but 0 where that is smaller than the spread, for then sums of the
// values themselves lose less than those of differences, which are rounded.
inline double shift_of(double sum, double squares, double count) {
  const double mean = sum / count;
  return 2 * mean * mean * count <= squares ? 0 : mean;
}

// Moments in each of a block's channels [begin, end), from sums in A about shifts that are means of a part of it.
template <class A, class T>
void planar_moments(const ForwardParams& p, const Tiling::Block& block, int64_t begin, int64_t end, Moments* moments) {
  const T* x = static_cast<const T*>(p.input);
  const double count = static_cast<double>(block.count());
  const Tiling::Block head = sample(block);
  A shift[kGroup];
  RunSums<A, T, 2> heads[kGroup] = {};
  for_runs(p, head, begin, end, [&](int64_t at, int64_t size, int64_t c) {
    heads[c - begin].add(size, 0, [](auto* s, auto v) { math::add_shifted(s, v, A(0)); }, x + at);
  });
  for (int64_t i = 0; i < end - begin; ++i)
    shift[i] = static_cast<A>(shift_of(heads[i].total(0), heads[i].total(1), static_cast<double>(head.count())));
  RunSums<A, T, 2> sums[kGroup] = {};
  for_runs(p, block, begin, end, [&](int64_t at, int64_t size, int64_t c) {
    const auto f = [shift = shift[c - begin]](auto* s, auto v) { math::add_shifted(s, v, shift); };
    sums[c - begin].add(size, p.C * p.S, f, x + at);
  });
  for (int64_t c = begin; c < end; ++c) {
    const int64_t i = c - begin;
    const double squares = sums[i].total(1);
    moments[i] = moments_of(static_cast<double>(shift[i]), sums[i].total(0), squares, count);
    if (trusted<A>(p, squares, moments[i].m2, count)) continue;
    if constexpr (std::is_same_v<A, float>) {
      planar_moments<double, T>(p, block, c, c + 1, moments + i);
    } else {
      moments[i] = wide_moments<T>(p, block, c);
    }
  }
}

template <class T>
void forward_reduce_planar(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                           Range chunks) {
  for_groups(channels, chunks, [&](int64_t begin, int64_t end, int64_t k) {
    Moments moments[kGroup], block_moments[kGroup];
    double count = 0;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      const double block_count = static_cast<double>(block.count());
      planar_moments<Compute<T>, T>(p, block, begin, end, block_moments);
      for (int64_t i = 0; i < end - begin; ++i) math::chan_combine(moments[i], count, block_moments[i], block_count);
      count += block_count;
    }
    for (int64_t c = begin; c < end; ++c) put_moments(scratch.partials + 3 * k * p.C + c, p.C, moments[c - begin]);
  });
}

// [4, C]: moments of all channels of a block, from sums in A about shifts that are means of a part of it, and the
// sums of squares.
template <class A, class T>
std::unique_ptr<double[]> row_moments(const ForwardParams& p, const Tiling::Block& block) {
  const int64_t C = p.C;
  const Row row(C);
  const T* x = static_cast<const T*>(p.input) + block.plane_begin * C;
  const double count = static_cast<double>(block.count()), head_count = static_cast<double>(sample(block).count());
  const std::unique_ptr<double[]> memory(new double[2 * row.width()]());
  double *sums = memory.get(), *squares = sums + row.width();
  const std::unique_ptr<A[]> shift(new A[row.width()]());
  const auto add_shifted = [](auto* s, auto shift, auto v) { math::add_shifted(s, v, shift); };
  RowSums<A, T, 2>(sums, row.width()).add(sample(block).count() * C, add_shifted, shift.get(), x);
  fold(sums, 2, row);
  for (int64_t c = 0; c < C; ++c) shift[c] = static_cast<A>(shift_of(sums[c], squares[c], head_count));
  repeat(shift.get(), row);
  std::fill_n(sums, 2 * row.width(), 0.0);
  RowSums<A, T, 2>(sums, row.width()).add(block.count() * C, add_shifted, shift.get(), x);
  fold(sums, 2, row);
  std::unique_ptr<double[]> moments(new double[4 * C]);
  for (int64_t c = 0; c < C; ++c) moments[c] = static_cast<double>(shift[c]);
  for_channels(0, C, [&](int64_t c, auto zero) {
    using V = decltype(zero);
    const V both[2] = {get<V>(sums + c), get<V>(squares + c)};
    put_moments(moments.get() + c, C, moments_of(get<V>(moments.get() + c), both[0], both[1], count));
    put(moments.get() + 3 * C + c, both[1]);
  });
  return moments;
}

// [4, C]: the same with what is not to be trusted done again in double.
template <class T>
std::unique_ptr<double[]> safe_row_moments(const ForwardParams& p, const Tiling::Block& block) {
  const int64_t C = p.C;
  const double count = static_cast<double>(block.count());
  auto moments = row_moments<Compute<T>, T>(p, block);
  const auto safe = [&](int64_t c) { return trusted<Compute<T>>(p, moments[3 * C + c], moments[2 * C + c], count); };
  int64_t safe_ones = 0;
  for (int64_t c = 0; c < C; ++c) safe_ones += safe(c);
  if (safe_ones == C) return moments;
  const auto wide = row_moments<double, T>(p, block);
  for (int64_t c = 0; c < C; ++c) {
    if (safe(c)) continue;
    const bool finite = std::isfinite(wide[3 * C + c]);
    put_moments(&moments[c], C, finite ? get_moments<double>(&wide[c], C) : wide_moments<T>(p, block, c));
  }
  return moments;
}

template <class T>
void forward_reduce_channels_last(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range,
                                  Range chunks) {
  for (int64_t k = chunks.begin; k < chunks.end; ++k) {
    double* partial = scratch.partials + 3 * k * p.C;
    double count = 0;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      const auto of_block = safe_row_moments<T>(p, block);
      for_channels(0, p.C, [&](int64_t c, auto zero) {
        using V = decltype(zero);
        auto moments = get_moments<V>(partial + c, p.C);
        math::chan_combine(moments, count, get_moments<V>(&of_block[c], p.C), static_cast<double>(block.count()));
        put_moments(partial + c, p.C, moments);
      });
      count += static_cast<double>(block.count());
    }
  }
}

template <class T>
void forward_reduce(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                    Range chunks) {
  (p.layout == Layout::planar ? forward_reduce_planar<T> : forward_reduce_channels_last<T>)(p, tiling, scratch,
                                                                                            channels, chunks);
}

// The moments of chunk 0 become those of all chunks.
inline void combine_chunks(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels) {
  for_channels(channels.begin, channels.end, [&](int64_t c, auto zero) {
    using V = decltype(zero);
    auto moments = get_moments<V>(scratch.partials + c, p.C);
    double count = static_cast<double>(tiling.chunk_count(0));
    for (int64_t k = 1; k < tiling.chunks; ++k) {
      const double n = static_cast<double>(tiling.chunk_count(k));
      math::chan_combine(moments, count, get_moments<V>(scratch.partials + 3 * k * p.C + c, p.C), n);
      count += n;
    }
    put_moments(scratch.partials + c, p.C, moments);
  });
}

template <class T>
void forward_finish(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels) {
  using A = Compute<T>;
  if (p.training) combine_chunks(p, tiling, scratch, channels);
  const double count = static_cast<double>(p.count());
  const double factor =
      p.training && p.running_mean
          ? math::average_factor(p.cumulative, p.momentum, p.num_batches_tracked ? *p.num_batches_tracked : 0)
          : 0;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    double mean = 0, var = 0;
    if (p.training) {
      const Moments moments = get_moments<double>(scratch.partials + c, p.C);
      mean = moments.mean();
      var = math::biased_var(moments.m2, count);
      if (p.running_mean) {
        const auto update = [&](void* running, double batch) {
          const double old = read<double>(running, p.param_dtype, c);
          write(running, p.param_dtype, c, math::update_running(old, batch, factor));
        };
        update(p.running_mean, mean);
        update(p.running_var, math::unbiased_var(moments.m2, count));
      }
    } else {
      mean = read<double>(p.running_mean, p.param_dtype, c);
      var = read<double>(p.running_var, p.param_dtype, c);
    }
    const A saved_mean = static_cast<A>(mean), invstd = static_cast<A>(math::invstd(var, p.eps));
    static_cast<A*>(p.mean)[c] = saved_mean;
    static_cast<A*>(p.invstd)[c] = invstd;
    const A scale = p.weight ? static_cast<A>(read<double>(p.weight, p.param_dtype, c)) * invstd : invstd;
    const A bias = p.bias ? static_cast<A>(read<double>(p.bias, p.param_dtype, c)) : A(0);
    put_factors<kForwardFactors, A>(p, scratch, c, {saved_mean, scale, bias});
  }
}

template <class T, class Epilogue>
void forward_apply(const ForwardParams& p, const Scratch& scratch, Range channels, Range values) {
  map<T, kForwardFactors>(
      p, scratch, channels, values,
      [](const auto* k, auto x) { return Epilogue::forward(math::normalize(x, k[0], k[1], k[2])); },
      static_cast<T*>(p.output), static_cast<const T*>(p.input));
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
