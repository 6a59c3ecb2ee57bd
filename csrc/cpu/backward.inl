// Backward of both, for kernels.inl: grad_weight = sum(dy * (x - mean)) * invstd, grad_bias = sum(dy), grad_input.
//
// Sums are in double. With E = N * C * S * itemsize:
// reduce reads 2E, apply reads 2E (from cache where the channels taken together are few enough; E in evaluation) and
// writes E.
#pragma once

#include "common.inl"
#include "reduce.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

constexpr int kBackwardFactors = 4;  // mean, scale, grad_mean, projection

// partials[k, 0, c] and partials[k, 1, c] = the two sums over chunk k.
template <class T>
void backward_reduce(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                     Range chunks) {
  const Compute<T>* mean = static_cast<const Compute<T>*>(p.mean);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  const T* input = static_cast<const T*>(p.input);
  const auto products = [](auto* s, auto mean, auto dy, auto x) { math::add_products(s, dy, x, mean); };
  if (p.layout == Layout::planar) {
    for_groups(channels, chunks, [&](int64_t begin, int64_t end, int64_t k) {
      RunSums<T, 2> sums[kGroup] = {};
      for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
        for_runs(p, tiling.block(b), begin, end, [&](int64_t at, int64_t size, int64_t c) {
          const auto f = [=, m = static_cast<double>(mean[c])](auto* s, auto dy, auto x) { products(s, m, dy, x); };
          sums[c - begin].add(size, f, grad_output + at, input + at);
        });
      }
      for (int64_t c = begin; c < end; ++c)
        for (int t = 0; t < 2; ++t) scratch.partials[(2 * k + t) * p.C + c] = sums[c - begin].total(t);
    });
    return;
  }
  RowSums<T, 2> rows(p.C);
  for (int64_t k = chunks.begin; k < chunks.end; ++k) {
    double* sums = scratch.partials + 2 * k * p.C;
    for (int64_t i = 0; i < 2 * p.C; ++i) sums[i] = 0;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      const int64_t at = block.plane_begin * p.C;
      rows.add(sums, block.count(), products, mean, grad_output + at, input + at);
    }
  }
}

template <class T>
void backward_finish(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels) {
  using C = Compute<T>;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const double invstd = static_cast<const C*>(p.invstd)[c],
                 weight = p.weight ? read<double>(p.weight, p.param_dtype, c) : 1;
    const auto factor = [&](int64_t j) -> C& {
      return static_cast<C*>(scratch.factors)[factor_at<C, kBackwardFactors>(j, c)];
    };
    factor(0) = static_cast<const C*>(p.mean)[c];
    factor(1) = static_cast<C>(weight * invstd);
    if (!p.reduces()) continue;
    double sum_dy = 0, sum_dy_xmu = 0;
    for (int64_t k = 0; k < tiling.chunks; ++k) {
      const double* partial = scratch.partials + 2 * k * p.C + c;
      sum_dy += partial[0];
      sum_dy_xmu += partial[p.C];
    }
    if (p.grad_bias) write(p.grad_bias, p.param_dtype, c, sum_dy);
    if (p.grad_weight) write(p.grad_weight, p.param_dtype, c, math::grad_weight(sum_dy_xmu, invstd));
    const double count = static_cast<double>(p.count());
    factor(2) = static_cast<C>(sum_dy / count);
    factor(3) = static_cast<C>(math::projection(sum_dy_xmu, invstd, count));
  }
}

template <class T>
void backward_apply(const BackwardParams& p, const Scratch& scratch, Range channels, Range values) {
  T* grad_input = static_cast<T*>(p.grad_input);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  if (p.training) {
    map<T, kBackwardFactors>(
        p, scratch, channels, values,
        [](const auto* k, auto dy, auto x) { return math::grad_input_train(dy, x, k[0], k[1], k[2], k[3]); },
        grad_input, grad_output, static_cast<const T*>(p.input));
  } else {
    map<T, kBackwardFactors>(
        p, scratch, channels, values, [](const auto* k, auto dy) { return math::grad_input_eval(dy, k[1]); },
        grad_input, grad_output);
  }
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
