// Backward of both, for kernels.inl: grad_weight = sum(dy * (x - mean)) * invstd, grad_bias = sum(dy), grad_input.
//
// With E = N * C * S * itemsize: reduce reads 2E, apply reads 2E (from cache where the channels taken together are few
// enough; E in evaluation) and writes E.
#pragma once

#include "common.inl"
#include "reduce.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

constexpr int kBackwardFactors = 4;  // mean, scale, grad_mean, projection

// partials[k, 0, c] and partials[k, 1, c] = the two sums over chunk k, with products in A.
template <class A, class T>
void planar_products(const BackwardParams& p, const Tiling& tiling, double* partials, int64_t begin, int64_t end,
                     int64_t k) {
  const auto* mean = static_cast<const Compute<T>*>(p.mean);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  const T* input = static_cast<const T*>(p.input);
  RunSums<A, T, 2> sums[kGroup] = {};
  for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
    for_runs(p, tiling.block(b), begin, end, [&](int64_t at, int64_t size, int64_t c) {
      const auto f = [m = static_cast<A>(mean[c])](auto* s, auto dy, auto x) { math::add_products(s, dy, x, m); };
      sums[c - begin].add(size, p.C * p.S, f, grad_output + at, input + at);
    });
  }
  for (int64_t c = begin; c < end; ++c)
    for (int t = 0; t < 2; ++t) partials[t * p.C + c] = sums[c - begin].total(t);
}

template <class A, class T>
void row_products(const BackwardParams& p, const Tiling& tiling, double* partials, int64_t k) {
  const Row row(p.C);
  const std::unique_ptr<double[]> sums(new double[2 * row.width()]());
  const std::unique_ptr<A[]> mean(new A[row.width()]);
  for (int64_t c = 0; c < p.C; ++c) mean[c] = static_cast<A>(static_cast<const Compute<T>*>(p.mean)[c]);
  repeat(mean.get(), row);
  const int64_t begin = tiling.block(tiling.chunk_begin(k)).plane_begin * p.C;
  const auto products = [](auto* s, auto mean, auto dy, auto x) { math::add_products(s, dy, x, mean); };
  RowSums<A, T, 2>(sums.get(), row.width())
      .add(tiling.chunk_count(k) * p.C, products, mean.get(), static_cast<const T*>(p.grad_output) + begin,
           static_cast<const T*>(p.input) + begin);
  fold(sums.get(), 2, row);
  for (int t = 0; t < 2; ++t) std::copy_n(sums.get() + t * row.width(), p.C, partials + t * p.C);
}

template <class T>
void backward_reduce(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                     Range chunks) {
  if (p.layout == Layout::planar) {
    for_groups(channels, chunks, [&](int64_t begin, int64_t end, int64_t k) {
      planar_products<Compute<T>, T>(p, tiling, scratch.partials + 2 * k * p.C, begin, end, k);
    });
    return;
  }
  for (int64_t k = chunks.begin; k < chunks.end; ++k)
    row_products<Compute<T>, T>(p, tiling, scratch.partials + 2 * k * p.C, k);
}

template <class T>
void backward_finish(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels) {
  using A = Compute<T>;
  const double count = static_cast<double>(p.count());
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const double invstd = static_cast<const A*>(p.invstd)[c],
                 weight = p.weight ? read<double>(p.weight, p.param_dtype, c) : 1;
    double sum_dy = 0, sum_dy_xmu = 0;
    for (int64_t k = 0; p.reduces() && k < tiling.chunks; ++k) {
      const double* partial = scratch.partials + 2 * k * p.C + c;
      sum_dy += partial[0];
      sum_dy_xmu += partial[p.C];
    }
    if (p.grad_bias) write(p.grad_bias, p.param_dtype, c, sum_dy);
    if (p.grad_weight) write(p.grad_weight, p.param_dtype, c, math::grad_weight(sum_dy_xmu, invstd));
    const A grad_mean = static_cast<A>(sum_dy / count);
    const A projection = static_cast<A>(math::projection(sum_dy_xmu, invstd, count));
    put_factors<kBackwardFactors, A>(
        p, scratch, c, {static_cast<const A*>(p.mean)[c], static_cast<A>(weight * invstd), grad_mean, projection});
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
