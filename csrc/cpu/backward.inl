// Backward of both, for kernels.inl: grad_weight = sum(dz * (x - mean)) * invstd, grad_bias = sum(dz), grad_input
// and grad_residual = dz, the gradient of the activation's argument (dy, without activation).
//
// With E = N * C * S * itemsize: reduce reads 2E, apply reads 2E (from cache where the channels taken together are few
// enough; E in evaluation) and writes E.
#pragma once

#include <cmath>
#include <limits>

#include "gradients.inl"
#include "map.inl"
#ifdef BNEXT_BF16
#include "gates.inl"
#endif

namespace bnext::cpu::BNEXT_ISA {
namespace {

constexpr int kBackwardFactors = 5;  // mean, scale, bias, grad_mean, projection

// sum(dz) and sum(dz * (x - mean)).
struct Sum {
  double dz, dz_xmu;
};

// A way of summing has, of chunk k,
//   planar(p, tiling, k, c): the two sums of channel c;
//   rows(p, tiling, k, sums): the same of all channels, sums being [2, Row(C).width()];
//   trusted(p, c, sum, count): whether the sums of channel c can be used.

// Products in A.
template <class A, class T, class Gradient>
struct Products {
  using C = Compute<T>;
  static constexpr int kShared = Gradient::kShared;

  // Of dz, which is computed as apply does it, whatever A is.
  template <class K, class V, class... Added>
  static math::Factors<V> products(const Gradient& gradient, const K* k, V dy, V x, const Added&... added) {
    decltype(in<C>(k[0])) own[kShared];
    for (int i = 0; i < kShared; ++i) own[i] = in<C>(k[i]);
    return math::products(to<V>(gradient.of(own, in<C>(dy), in<C>(x), added...)), x, k[0]);
  }
  static void set_shared(const BackwardParams& p, int64_t c, A* shared, int64_t stride) {
    shared[0] = static_cast<A>(static_cast<const C*>(p.mean)[c]);
    if constexpr (kShared > 1) {
      const auto all = of_forward<C>(p, c);
      for (int i = 1; i < kShared; ++i) shared[i * stride] = static_cast<A>(all.factors[i]);
    }
  }

  static Sum planar(const BackwardParams& p, const Tiling& tiling, int64_t k, int64_t c) {
    const Gradient gradient(p);
    A shared[kShared];
    set_shared(p, c, shared, 1);
    const auto f = [&](auto dy, auto x, const auto&... added) { return products(gradient, shared, dy, x, added...); };
    RunSums<A, T> sums;
    with_tensors<T, Gradient>(p, 0, [&](auto... in) {
      for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b)
        sums.add(runs_of(p, tiling.block(b), c, kBackwardPasses), f, in...);
    });
    return {sums.total(0), sums.total(1)};
  }

  static void rows(const BackwardParams& p, const Tiling& tiling, int64_t k, double* sums) {
    const Row row(p.C);
    const Gradient gradient(p);
    const std::unique_ptr<A[]> shared(new A[kShared * row.width()]);
    for (int64_t c = 0; c < p.C; ++c) set_shared(p, c, &shared[c], row.width());
    for (int i = 0; i < kShared; ++i) repeat(&shared[i * row.width()], row);
    std::fill_n(sums, 2 * row.width(), 0.0);
    const auto f = [&](const auto* k, auto dy, auto x, const auto&... added) {
      return products(gradient, k, dy, x, added...);
    };
    with_tensors<T, Gradient>(p, tiling.block(tiling.chunk_begin(k)).plane_begin * p.C, [&](auto... in) {
      RowSums<A, T, kShared>(sums, row.width(), exceeds_caches(p, kBackwardPasses))
          .add(tiling.chunk_count(k) * p.C, f, shared.get(), in...);
    });
    fold(sums, row);
  }

  // In float32: nothing too large, and not all products too small.
  static bool trusted(const BackwardParams&, int64_t, Sum sum, double count) {
    constexpr double kMost = std::numeric_limits<double>::max();
    const double size = std::abs(sum.dz_xmu);
    return std::is_same_v<A, double> ||
           ((std::abs(sum.dz) <= kMost) & (size <= kMost) & ((size >= kTiny * count) | (size == 0)));
  }
};

#ifdef BNEXT_BF16
// Products of bfloat16 numbers themselves; then sum(dz * (x - mean)) = sum(dz * x) - mean * sum(dz), of which little
// cancels while the mean is a few deviations at most.
template <class Gradient>
struct PairedProducts {
  using InFloat = Products<float, BFloat16, Gradient>;

  static Sum planar(const BackwardParams& p, const Tiling& tiling, int64_t k, int64_t c) {
    const auto gate = gate_of<Gradient>(p, c);
    PairSums all{};
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const PairSums sums = PairRuns<false, std::decay_t<decltype(gate)>>::sum(
          runs_of(p, tiling.block(b), c, kBackwardPasses), gate, static_cast<const BFloat16*>(p.grad_output),
          static_cast<const BFloat16*>(p.input));
      all = {all.a + sums.a, all.ab + sums.ab, all.lost || sums.lost};
    }
    return {all.a, all.lost ? kLost : all.ab - static_cast<const float*>(p.mean)[c] * all.a};
  }

  static void rows(const BackwardParams& p, const Tiling& tiling, int64_t k, double* sums) {
    const Row row(p.C);
    const auto gate = gate_of<Gradient>(p, row);
    const PairRowSums<false, std::decay_t<decltype(gate)>> pairs(
        row.width(), exceeds_caches(p, kBackwardPasses), tiling.block(tiling.chunk_begin(k)).plane_begin * p.C,
        tiling.chunk_count(k) * p.C, gate, static_cast<const BFloat16*>(p.grad_output),
        static_cast<const BFloat16*>(p.input));
    pairs.write(sums);
    fold(sums, row);
    for (int64_t c = 0; c < p.C; ++c) sums[row.width() + c] -= static_cast<const float*>(p.mean)[c] * sums[c];
  }

  static bool trusted(const BackwardParams& p, int64_t c, Sum sum, double count) {
    const float normalized = static_cast<const float*>(p.mean)[c] * static_cast<const float*>(p.invstd)[c];
    return (std::abs(normalized) <= 8) & InFloat::trusted(p, c, sum, count);
  }
};
#endif

// Ways of summing, each for the channels for which the one before it is not to be trusted.
template <class Way, class... Others>
struct Sums {
  static Sum planar(const BackwardParams& p, const Tiling& tiling, int64_t k, int64_t c) {
    const Sum sum = Way::planar(p, tiling, k, c);
    if constexpr (sizeof...(Others) > 0) {
      if (!Way::trusted(p, c, sum, static_cast<double>(tiling.chunk_count(k))))
        return Sums<Others...>::planar(p, tiling, k, c);
    }
    return sum;
  }

  static void rows(const BackwardParams& p, const Tiling& tiling, int64_t k, double* sums) {
    Way::rows(p, tiling, k, sums);
    if constexpr (sizeof...(Others) > 0) {
      const int64_t width = Row(p.C).width();
      const double count = static_cast<double>(tiling.chunk_count(k));
      const auto trusted = [&](int64_t c) { return Way::trusted(p, c, {sums[c], sums[width + c]}, count); };
      int64_t trusted_ones = 0;  // of all, without a branch, so that they are asked by vectors
      for (int64_t c = 0; c < p.C; ++c) trusted_ones += trusted(c);
      if (trusted_ones == p.C) return;
      std::unique_ptr<double[]> others;
      for (int64_t c = 0; c < p.C; ++c) {
        if (trusted(c)) continue;
        if (!others) {
          others.reset(new double[2 * width]);
          Sums<Others...>::rows(p, tiling, k, others.get());
        }
        for (int t = 0; t < 2; ++t) sums[t * width + c] = others[t * width + c];
      }
    }
  }
};

template <class T, class Gradient>
struct SumsOf {
  using type = Sums<Products<float, T, Gradient>, Products<double, T, AnyActivation<float>>>;
};
template <class T>
struct SumsOf<T, Plain> {
  using type = Sums<Products<float, T, Plain>, Products<double, T, Plain>>;
};
template <>
struct SumsOf<double, Plain> {
  using type = Sums<Products<double, double, Plain>>;
};
template <>
struct SumsOf<double, AnyActivation<double>> {
  using type = Sums<Products<double, double, AnyActivation<double>>>;
};
#ifdef BNEXT_BF16
template <>
struct SumsOf<BFloat16, Plain> {
  using type = Sums<PairedProducts<Plain>, Products<float, BFloat16, Plain>, Products<double, BFloat16, Plain>>;
};
template <class Gradient>
struct PairedSums {
  using type = Sums<PairedProducts<Gradient>, Products<float, BFloat16, Gradient>,
                    Products<double, BFloat16, AnyActivation<float>>>;
};
template <>
struct SumsOf<BFloat16, ReluOfInput> : PairedSums<ReluOfInput> {};
template <>
struct SumsOf<BFloat16, ReluOfMask> : PairedSums<ReluOfMask> {};
#endif

// partials[k, 0, c] and partials[k, 1, c] = the two sums over chunk k.
template <class Sums>
void backward_reduce_by(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                        Range chunks) {
  if (p.layout == Layout::planar) {
    for (int64_t k = chunks.begin; k < chunks.end; ++k) {
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const Sum sum = Sums::planar(p, tiling, k, c);
        scratch.partials[2 * k * p.C + c] = sum.dz;
        scratch.partials[(2 * k + 1) * p.C + c] = sum.dz_xmu;
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
void backward_reduce(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                     Range chunks) {
  with_gradient<T>(p, [&](auto gradient) {
    backward_reduce_by<typename SumsOf<T, decltype(gradient)>::type>(p, tiling, scratch, channels, chunks);
  });
}

template <class T>
void backward_finish(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels) {
  using A = Compute<T>;
  const Row row(p.C);
  const double count = static_cast<double>(p.count());
  for (int64_t k = 1; p.reduces() && k < tiling.chunks; ++k)  // the sums of chunk 0 become those of all
    for (int t = 0; t < 2; ++t)
      for_channels(t * p.C + channels.begin, t * p.C + channels.end, [&](int64_t i, auto zero) {
        using V = decltype(zero);
        put(scratch.partials + i, get<V>(scratch.partials + i) + get<V>(scratch.partials + 2 * k * p.C + i));
      });
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const A invstd = static_cast<const A*>(p.invstd)[c];
    const double sum_dz = p.reduces() ? scratch.partials[c] : 0;
    const double sum_dz_xmu = p.reduces() ? scratch.partials[p.C + c] : 0;
    if (p.grad_bias) write(p.grad_bias, p.param_dtype, c, sum_dz);
    if (p.grad_weight) write(p.grad_weight, p.param_dtype, c, math::grad_weight(sum_dz_xmu, invstd));
    const A grad_mean = static_cast<A>(sum_dz / count);
    const A projection = static_cast<A>(math::projection(sum_dz_xmu, invstd, count));
    const auto [mean, scale, bias] = of_forward<A>(p, c).factors;
    put_factors<T, kBackwardFactors>(p.layout, row, scratch.factors, c, {mean, scale, bias, grad_mean, projection});
    if constexpr (kFlushes<T>) scratch.normal[c] = never_denormal(mean, scale, grad_mean, projection);
  }
}

template <class T>
void backward_apply(const BackwardParams& p, const Scratch& scratch, Range channels, Range values) {
  T *const grad_input = static_cast<T*>(p.grad_input), *const grad_residual = static_cast<T*>(p.grad_residual);
  const auto pass = [&](auto f, auto out, auto... in) {
    map<T, kBackwardFactors>(p, scratch, channels, values, f, out, in...);
  };
  with_gradient<T>(p, [&](auto gradient) {
    using Gradient = decltype(gradient);
    const auto train = [](const auto* k, auto dz, auto x) {
      return math::grad_input_train(dz, x, k[0], k[1], k[3], k[4]);
    };
    with_tensors<T, Gradient>(p, 0, [&](auto dy, auto x, auto... residual) {
      if constexpr (Gradient::kResidual) {
        const auto both = [=, training = p.training](const auto* k, auto dy, auto x, const auto&... added) {
          const auto dz = gradient.of(k, dy, x, added...);
          return Two<decltype(dy)>{training ? train(k, dz, x) : math::grad_input_eval(dz, k[1]), dz};
        };
        if (grad_input && grad_residual) return pass(both, Both<T>{grad_input, grad_residual}, dy, x, residual...);
        const auto one = [=](const auto* k, const auto&... in) {
          const auto found = both(k, in...);
          return grad_input ? found.first : found.second;
        };
        pass(one, grad_input ? grad_input : grad_residual, dy, x, residual...);
      } else if (p.training) {
        const auto f = [=](const auto* k, auto dy, auto x) { return train(k, gradient.of(k, dy, x), x); };
        map_normal<T, kBackwardFactors>(p, scratch, channels, values, f, grad_input, dy, x);
      } else if constexpr (Gradient::kInput) {
        pass([=](const auto* k, auto dy, auto x) { return math::grad_input_eval(gradient.of(k, dy, x), k[1]); },
             grad_input, dy, x);
      } else {
        pass([](const auto* k, auto dy) { return math::grad_input_eval(dy, k[1]); }, grad_input, dy);
      }
    });
  });
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
