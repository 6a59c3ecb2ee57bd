// Backward of both, for kernels.inl: grad_weight = sum(dy * (x - mean)) * invstd, grad_bias = sum(dy), grad_input.
//
// With E = N * C * S * itemsize: reduce reads 2E, apply reads 2E (from cache where the channels taken together are few
// enough; E in evaluation) and writes E.
#pragma once

#include <cmath>
#include <limits>

#include "common.inl"
#ifdef BNEXT_BF16
#include "pairs.inl"
#endif

namespace bnext::cpu::BNEXT_ISA {
namespace {

constexpr int kBackwardFactors = 4;  // mean, scale, grad_mean, projection

// sum(dy) and sum(dy * (x - mean)).
struct Sum {
  double dy, dy_xmu;
};

// A way of summing has, of chunk k,
//   planar(p, tiling, k, c): the two sums of channel c;
//   rows(p, tiling, k, sums): the same of all channels, sums being [2, Row(C).width()];
//   trusted(p, c, sum, count): whether the second sum of channel c can be used.

// Products in A.
template <class A, class T>
struct Products {
  static Sum planar(const BackwardParams& p, const Tiling& tiling, int64_t k, int64_t c) {
    const auto f = [mean = static_cast<A>(static_cast<const Compute<T>*>(p.mean)[c])](auto dy, auto x) {
      return math::products(dy, x, mean);
    };
    RunSums<A, T> sums;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b)
      sums.add(runs_of(p, tiling.block(b), c), f, static_cast<const T*>(p.grad_output), static_cast<const T*>(p.input));
    return {sums.total(0), sums.total(1)};
  }

  static void rows(const BackwardParams& p, const Tiling& tiling, int64_t k, double* sums) {
    const Row row(p.C);
    const std::unique_ptr<A[]> mean(new A[row.width()]);
    for (int64_t c = 0; c < p.C; ++c) mean[c] = static_cast<A>(static_cast<const Compute<T>*>(p.mean)[c]);
    repeat(mean.get(), row);
    std::fill_n(sums, 2 * row.width(), 0.0);
    const int64_t begin = tiling.block(tiling.chunk_begin(k)).plane_begin * p.C;
    const auto products = [](auto mean, auto dy, auto x) { return math::products(dy, x, mean); };
    RowSums<A, T>(sums, row.width())
        .add(tiling.chunk_count(k) * p.C, products, mean.get(), static_cast<const T*>(p.grad_output) + begin,
             static_cast<const T*>(p.input) + begin);
    fold(sums, row);
  }

  // In float32: no product too large, and not all of them too small.
  static bool trusted(const BackwardParams&, int64_t, double sum, double count) {
    const double size = std::abs(sum);
    return std::is_same_v<A, double> ||
           (size <= std::numeric_limits<double>::max() && (size >= kTiny * count || size == 0));
  }
};

#ifdef BNEXT_BF16
// Products of bfloat16 numbers themselves; then sum(dy * (x - mean)) = sum(dy * x) - mean * sum(dy), of which little
// cancels while the mean is a few deviations at most.
struct PairedProducts {
  static Sum planar(const BackwardParams& p, const Tiling& tiling, int64_t k, int64_t c) {
    PairRunSums sums;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b)
      sums.add(runs_of(p, tiling.block(b), c), static_cast<const BFloat16*>(p.grad_output),
               static_cast<const BFloat16*>(p.input));
    if (sums.lost()) return {sums.total(0), kLost};
    return {sums.total(0), sums.total(1) - static_cast<const float*>(p.mean)[c] * sums.total(0)};
  }

  static void rows(const BackwardParams& p, const Tiling& tiling, int64_t k, double* sums) {
    const Row row(p.C);
    const int64_t begin = tiling.block(tiling.chunk_begin(k)).plane_begin * p.C;
    PairRowSums pairs(row.width());
    pairs.add(tiling.chunk_count(k) * p.C, static_cast<const BFloat16*>(p.grad_output) + begin,
              static_cast<const BFloat16*>(p.input) + begin);
    pairs.write(sums);
    fold(sums, row);
    for (int64_t c = 0; c < p.C; ++c) sums[row.width() + c] -= static_cast<const float*>(p.mean)[c] * sums[c];
    pairs.each_lost([&](int64_t column) { sums[row.width() + column % p.C] = kLost; });
  }

  static bool trusted(const BackwardParams& p, int64_t c, double sum, double count) {
    const float normalized = static_cast<const float*>(p.mean)[c] * static_cast<const float*>(p.invstd)[c];
    return std::abs(normalized) <= 8 && Products<float, BFloat16>::trusted(p, c, sum, count);
  }
};
#endif

// Ways of summing, each for the channels for which the one before it is not to be trusted.
template <class Way, class... Others>
struct Sums {
  static Sum planar(const BackwardParams& p, const Tiling& tiling, int64_t k, int64_t c) {
    const Sum sum = Way::planar(p, tiling, k, c);
    if constexpr (sizeof...(Others) > 0) {
      if (!Way::trusted(p, c, sum.dy_xmu, static_cast<double>(tiling.chunk_count(k))))
        return Sums<Others...>::planar(p, tiling, k, c);
    }
    return sum;
  }

  static void rows(const BackwardParams& p, const Tiling& tiling, int64_t k, double* sums) {
    Way::rows(p, tiling, k, sums);
    if constexpr (sizeof...(Others) > 0) {
      const int64_t width = Row(p.C).width();
      std::unique_ptr<double[]> others;
      for (int64_t c = 0; c < p.C; ++c) {
        if (Way::trusted(p, c, sums[width + c], static_cast<double>(tiling.chunk_count(k)))) continue;
        if (!others) {
          others.reset(new double[2 * width]);
          Sums<Others...>::rows(p, tiling, k, others.get());
        }
        for (int t = 0; t < 2; ++t) sums[t * width + c] = others[t * width + c];
      }
    }
  }
};

template <class T>
struct SumsOf {
  using type = Sums<Products<float, T>, Products<double, T>>;
};
template <>
struct SumsOf<double> {
  using type = Sums<Products<double, double>>;
};
#ifdef BNEXT_BF16
template <>
struct SumsOf<BFloat16> {
  using type = Sums<PairedProducts, Products<float, BFloat16>, Products<double, BFloat16>>;
};
#endif

// partials[k, 0, c] and partials[k, 1, c] = the two sums over chunk k.
template <class T>
void backward_reduce(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                     Range chunks) {
  using Sums = typename SumsOf<T>::type;
  if (p.layout == Layout::planar) {
    for (int64_t k = chunks.begin; k < chunks.end; ++k) {
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const Sum sum = Sums::planar(p, tiling, k, c);
        scratch.partials[2 * k * p.C + c] = sum.dy;
        scratch.partials[(2 * k + 1) * p.C + c] = sum.dy_xmu;
      }
    }
    return;
  }
  const int64_t width = Row(p.C).width();
  const std::unique_ptr<double[]> sums(new double[2 * width]);
  for (int64_t k = chunks.begin; k < chunks.end; ++k) {
    Sums::rows(p, tiling, k, sums.get());
    for (int t = 0; t < 2; ++t) std::copy_n(sums.get() + t * width, p.C, scratch.partials + (2 * k + t) * p.C);
  }
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
    put_factors<T, kBackwardFactors>(
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
