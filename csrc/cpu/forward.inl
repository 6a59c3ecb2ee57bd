// Training and evaluation forward, for kernels.inl.
//
// Statistics are shifted sums within a block, in double, combined by Chan's formula across blocks. With E = N * C * S *
// itemsize: reduce reads E, apply reads E (from cache where the channels taken together are few enough) and writes E.
#pragma once

#include <cmath>
#include <memory>

#include "common.inl"
#include "reduce.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using Moments = math::Moments<double>;

constexpr int kForwardFactors = 3;  // mean, scale, bias

// scratch.partials is [chunks, 3, C]: Moments, part by part.
Moments get_moments(const double* partial, int64_t C) {
  return {partial[0], partial[C], partial[2 * C]};
}
void put_moments(double* partial, int64_t C, const Moments& m) {
  partial[0] = m.origin;
  partial[C] = m.offset;
  partial[2 * C] = m.m2;
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

// A block's moments from its shifted sums, unless those have overflowed.
template <class T>
Moments block_moments(const ForwardParams& p, const Tiling::Block& block, int64_t c, double shift, double sum,
                      double squares) {
  if (!std::isfinite(squares)) return wide_moments<T>(p, block, c);
  const double sums[2] = {sum, squares};
  Moments moments{shift, 0, 0};
  math::welford_push(moments, 0.0, sums, 1 / static_cast<double>(block.count()));
  return moments;
}

// The part of a block that its shift is the mean of: all of it in float64; of narrower types a 64th, at least one
// element of a plane, since the sums have 29 bits to lose.
template <class T>
Tiling::Block sample(Tiling::Block block) {
  if constexpr (!std::is_same_v<T, double>) {
    if (block.plane_end - block.plane_begin > 1) {
      block.plane_end = block.plane_begin + (block.plane_end - block.plane_begin + 63) / 64;
    } else {
      block.end = block.begin + (block.size() + 63) / 64;
    }
  }
  return block;
}

template <class T>
void forward_reduce_planar(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                           Range chunks) {
  const T* x = static_cast<const T*>(p.input);
  for_groups(channels, chunks, [&](int64_t begin, int64_t end, int64_t k) {
    Moments moments[kGroup];
    double count = 0;
    double shift[kGroup];
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b), head = sample<T>(block);
      RunSums<T, 1> heads[kGroup] = {};
      for_runs(p, head, begin, end, [&](int64_t at, int64_t size, int64_t c) {
        heads[c - begin].add(size, [](auto* s, auto v) { s[0] += v; }, x + at);
      });
      for (int64_t c = begin; c < end; ++c)
        shift[c - begin] = heads[c - begin].total(0) / static_cast<double>(head.count());
      RunSums<T, 2> sums[kGroup] = {};
      for_runs(p, block, begin, end, [&](int64_t at, int64_t size, int64_t c) {
        const auto f = [shift = shift[c - begin]](auto* s, auto v) { math::add_shifted(s, v, shift); };
        sums[c - begin].add(size, f, x + at);
      });
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = c - begin;
        const auto block_stats = block_moments<T>(p, block, c, shift[i], sums[i].total(0), sums[i].total(1));
        math::chan_combine(moments[i], count, block_stats, static_cast<double>(block.count()));
      }
      count += static_cast<double>(block.count());
    }
    for (int64_t c = begin; c < end; ++c) put_moments(scratch.partials + 3 * k * p.C + c, p.C, moments[c - begin]);
  });
}

template <class T>
void forward_reduce_channels_last(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range,
                                  Range chunks) {
  const int64_t C = p.C;
  const std::unique_ptr<double[]> memory(new double[3 * C]);
  double *sums = memory.get(), *shift = sums + 2 * C;
  RowSums<T, 1> heads(C);
  RowSums<T, 2> both(C);
  for (int64_t k = chunks.begin; k < chunks.end; ++k) {
    double* partial = scratch.partials + 3 * k * C;
    double count = 0;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b), head = sample<T>(block);
      const T* x = static_cast<const T*>(p.input) + block.plane_begin * C;
      for (int64_t c = 0; c < C; ++c) sums[c] = 0;
      heads.add(sums, head.count(), [](auto* s, auto, auto v) { s[0] += v; }, shift, x);
      for (int64_t c = 0; c < C; ++c) shift[c] = sums[c] / static_cast<double>(head.count());
      for (int64_t i = 0; i < 2 * C; ++i) sums[i] = 0;
      const auto f = [](auto* s, auto shift, auto v) { math::add_shifted(s, v, shift); };
      both.add(sums, block.count(), f, shift, x);
      for (int64_t c = 0; c < C; ++c) {
        Moments moments = get_moments(partial + c, C);
        const auto block_stats = block_moments<T>(p, block, c, shift[c], sums[c], sums[C + c]);
        math::chan_combine(moments, count, block_stats, static_cast<double>(block.count()));
        put_moments(partial + c, C, moments);
      }
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

template <class T>
void forward_finish(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels) {
  using C = Compute<T>;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    double mean = 0, var = 0;
    if (p.training) {
      Moments moments{};
      double count = 0;
      for (int64_t k = 0; k < tiling.chunks; ++k) {
        const double n = static_cast<double>(tiling.chunk_count(k));
        math::chan_combine(moments, count, get_moments(scratch.partials + 3 * k * p.C + c, p.C), n);
        count += n;
      }
      mean = moments.mean();
      var = math::biased_var(moments.m2, count);
      if (p.running_mean) {
        const double factor =
            math::average_factor(p.cumulative, p.momentum, p.num_batches_tracked ? *p.num_batches_tracked : 0);
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
    const C saved_mean = static_cast<C>(mean), saved_invstd = static_cast<C>(math::invstd(var, p.eps));
    static_cast<C*>(p.mean)[c] = saved_mean;
    static_cast<C*>(p.invstd)[c] = saved_invstd;
    const auto factor = [&](int64_t j) -> C& {
      return static_cast<C*>(scratch.factors)[factor_at<C, kForwardFactors>(j, c)];
    };
    factor(0) = saved_mean;
    factor(1) = p.weight ? static_cast<C>(read<double>(p.weight, p.param_dtype, c)) * saved_invstd : saved_invstd;
    factor(2) = p.bias ? static_cast<C>(read<double>(p.bias, p.param_dtype, c)) : C(0);
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
