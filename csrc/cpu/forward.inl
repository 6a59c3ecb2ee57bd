// Training and evaluation forward, for kernels.inl.
//
// Statistics are shifted sums within a block, short ones in float32, combined by Chan's formula across blocks. With E =
// N * C * S * itemsize: reduce reads E, apply reads E (from cache where the channels taken together are few enough) and
// writes E; with a residual it reads E more, and writes a bit an element.
#pragma once

#include "../running.h"
#include "map.inl"
#include "statistics.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

constexpr int kForwardFactors = 3;  // mean, scale, bias

// scratch.partials is [chunks, 3, C]: Moments.
template <class T>
void forward_reduce_planar(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                           Range chunks) {
  for (int64_t k = chunks.begin; k < chunks.end; ++k) {
    const Range blocks{tiling.chunk_begin(k), tiling.chunk_begin(k + 1)};
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      Moments moments{};
      double count = 0;
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const Tiling::Block block = tiling.block(b);
        const double block_count = static_cast<double>(block.count());
        math::chan_combine(moments, count, StatisticsOf<T>::type::planar(p, block, c), block_count);
        count += block_count;
      }
      put_moments(scratch.partials + 3 * k * p.C + c, p.C, moments);
    }
  }
}

template <class T>
void forward_reduce_channels_last(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range,
                                  Range chunks) {
  for (int64_t k = chunks.begin; k < chunks.end; ++k) {
    double* partial = scratch.partials + 3 * k * p.C;
    double count = 0;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      StatisticsOf<T>::type::rows(p, block, [&](int64_t c, const auto& of_block) {
        auto moments = get_moments<std::decay_t<decltype(of_block.m2)>>(partial + c, p.C);
        math::chan_combine(moments, count, of_block, static_cast<double>(block.count()));
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
  double count = static_cast<double>(tiling.chunk_count(0));
  for (int64_t k = 1; k < tiling.chunks; ++k) {
    const double n = static_cast<double>(tiling.chunk_count(k));
    for_channels(channels.begin, channels.end, [&](int64_t c, auto zero) {
      using V = decltype(zero);
      auto moments = get_moments<V>(scratch.partials + c, p.C);
      math::chan_combine(moments, count, get_moments<V>(scratch.partials + 3 * k * p.C + c, p.C), n);
      put_moments(scratch.partials + c, p.C, moments);
    });
    count += n;
  }
}

template <class T>
void forward_finish(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels) {
  using A = Compute<T>;
  if (p.training) combine_chunks(p, tiling, scratch, channels);
  const Row row(p.C);
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
      if (p.running_mean) update_running(p, c, mean, math::unbiased_var(moments.m2, count), factor);
    } else {
      mean = read<double>(p.running_mean, p.param_dtype, c);
      var = read<double>(p.running_var, p.param_dtype, c);
    }
    const A saved_mean = static_cast<A>(mean), invstd = static_cast<A>(math::invstd(var, p.eps));
    static_cast<A*>(p.mean)[c] = saved_mean;
    static_cast<A*>(p.invstd)[c] = invstd;
    const A scale = scale_of(p, c, invstd), bias = bias_of<A>(p, c);
    put_factors<T, kForwardFactors>(p.layout, row, scratch.factors, c, {saved_mean, scale, bias});
    if constexpr (kFlushes<T>) scratch.normal[c] = never_denormal(saved_mean, scale, bias);
  }
}

template <class T>
void forward_apply(const ForwardParams& p, const Scratch& scratch, Range channels, Range values) {
  T* const output = static_cast<T*>(p.output);
  const T *const input = static_cast<const T*>(p.input), *const residual = static_cast<const T*>(p.residual);
  const auto pass = [&](auto f, auto out, auto... in) {
    map<T, kForwardFactors>(p, scratch, channels, values, f, out, input, in...);
  };
  const auto pass_normal = [&](auto f) {
    map_normal<T, kForwardFactors>(p, scratch, channels, values, f, output, input);
  };
  if (p.act == Act::identity && !residual)
    return pass_normal([](const auto* k, auto x) { return math::normalize(x, k[0], k[1], k[2]); });
  if constexpr (kSpecialized<T>) {
    if (p.act == Act::identity)
      return pass([](const auto* k, auto x, auto r) { return math::normalize(x, k[0], k[1], k[2]) + r; }, output,
                  residual);
    if (p.act == Act::relu && !residual)
      return pass_normal(
          [](const auto* k, auto x) { return math::Relu::forward(math::normalize(x, k[0], k[1], k[2])); });
    if (p.act == Act::relu) {
      const auto f = [](const auto* k, auto x, auto r) {
        return math::Relu::forward(math::normalize(x, k[0], k[1], k[2]) + r);
      };
      return p.mask ? pass(f, Masked<T>{output, p.mask}, residual) : pass(f, output, residual);
    }
  }
  const math::Activation<Compute<T>> activation{p.act, static_cast<Compute<T>>(p.slope)};
  const auto epilogue = [activation](auto z) [[gnu::noinline]] {
    return Marked<decltype(z)>{activation.forward(z), activation.passes(z)};
  };
  const auto f = [epilogue, adds = residual != nullptr](const auto* k, auto x, const auto& added) {
    auto z = math::normalize(x, k[0], k[1], k[2]);
    if (adds) z = z + added.value;
    return epilogue(z);
  };
  pass(f, Masked<T>{output, p.mask}, Residual<T>{residual, nullptr});  // either may be null
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
