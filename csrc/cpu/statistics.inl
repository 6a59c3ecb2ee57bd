// The moments of a block, for forward.inl: from sums about a shift, in float32 where that is as good, else in double;
// of bfloat16 by its own instructions first.
//
// A way of summing has, for the values of a block,
//   planar(p, block, c, squares): the moments and the sum of squares of channel c;
//   rows(p, block, shifts): what the moments of all channels follow from, RowShifts that were 0;
//   trusted(p, moments, squares, count): whether these can be used.
#pragma once

#include <cmath>
#include <limits>
#include <memory>

#include "common.inl"
#ifdef BNEXT_BF16
#include "pair_rows.inl"
#endif

namespace bnext::cpu::BNEXT_ISA {
namespace {

using Moments = math::Moments<double>;

// Moments as rows of an array [3, C].
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
// a square beyond float64), and for few channels of many.
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

template <class V>
math::Moments<V> moments_of(V shift, V sum, V squares, double count) {
  const V sums[2] = {sum, squares};
  math::Moments<V> moments{shift, {}, {}};
  math::welford_push(moments, 0.0, sums, 1 / count);
  return moments;
}

// Values that a block's shift comes from, at least: of rows some from all over the block, since neighbours are often
// alike; of planes the first 64th.
constexpr int64_t kSample = 8;

inline Tiling::Block sample(Tiling::Block block) {
  const int64_t wanted = std::max(kSample, block.count() / 64), planes = (wanted + block.size() - 1) / block.size();
  block.plane_end = std::min(block.plane_end, block.plane_begin + planes);
  block.end = std::min(block.end, block.begin + wanted);
  return block;
}

// The shift that follows from a sample: its mean, but 0 where that is smaller than most deviations, for then sums of
// the values themselves lose less than those of differences, which are rounded.
template <class V>
V shift_of(V sum, V squares, double count) {
  const V mean = sum * (1 / count);
  return 2 * count * mean * mean <= squares ? V{} : mean;
}

// Shifts of all channels and the sums about them, each [width], squares right behind sums.
struct RowShifts {
  double *shifts, *sums, *squares;

  template <class V>
  math::Moments<V> moments(int64_t c, double count) const {
    return moments_of(get<V>(shifts + c), get<V>(sums + c), get<V>(squares + c), count);
  }
};

// Sums in A about shifts that come from a part of the block.
template <class A, class T>
struct Shifted {
  static Moments planar(const ForwardParams& p, const Tiling::Block& block, int64_t c, double& squares) {
    const T* x = static_cast<const T*>(p.input);
    const Tiling::Block head = sample(block);
    RunSums<A, T> of_head, sums;
    of_head.add(runs_of(p, head, c, kForwardPasses), [](auto v) { return math::shifted(v, A(0)); }, x);
    const A shift = static_cast<A>(shift_of(of_head.total(0), of_head.total(1), static_cast<double>(head.count())));
    sums.add(runs_of(p, block, c, kForwardPasses), [shift](auto v) { return math::shifted(v, shift); }, x);
    squares = sums.total(1);
    return moments_of(static_cast<double>(shift), sums.total(0), squares, static_cast<double>(block.count()));
  }

  static void rows(const ForwardParams& p, const Tiling::Block& block, const RowShifts& all) {
    const int64_t C = p.C;
    const Row row(C);
    const T* x = static_cast<const T*>(p.input) + block.plane_begin * C;
    const std::unique_ptr<A[]> shift(new A[row.width()]());
    const auto shifted = [](const auto* shift, auto v) { return math::shifted(v, shift[0]); };
    const RowSums<A, T> of_block(all.sums, row.width(), exceeds_caches(p, kForwardPasses));
    const int64_t some = of_block.add_some(block.count() * C, kSample / row.repeats, shifted, shift.get(), x) / C;
    fold(all.sums, row);
    for_channels(0, C, [&](int64_t c, auto zero) {
      using V = decltype(zero);
      const V squares = get<V>(all.squares + c);
      const auto rounded = in<A>(shift_of(get<V>(all.sums + c), squares, static_cast<double>(some)));
      std::memcpy(&shift[c], &rounded, sizeof(rounded));
      put(all.shifts + c, to<V>(rounded));
    });
    repeat(shift.get(), row);
    std::fill_n(all.sums, 2 * row.width(), 0.0);
    of_block.add(block.count() * C, shifted, shift.get(), x);
    fold(all.sums, row);
  }

  // In float32: no square too large or too small, and a shift near the mean. Where all squares are 0, only a tiny eps
  // would bring the difference to light.
  template <class V>
  static Lanes<V> trusted(const ForwardParams& p, const math::Moments<V>& m, V squares, double count) {
    const Lanes<V> finite = squares <= std::numeric_limits<double>::max(), none = squares == 0;
    if (std::is_same_v<A, double>) return finite;
    return finite & ((squares >= kTiny * count) | (p.eps >= kTiny ? none : Lanes<V>{})) & (4 * m.m2 >= squares);
  }
};

#ifdef BNEXT_BF16
// Sums of bfloat16 numbers themselves.
struct Paired {
  static Moments planar(const ForwardParams& p, const Tiling::Block& block, int64_t c, double& squares) {
    const BFloat16* x = static_cast<const BFloat16*>(p.input);
    const PairSums sums = PairRuns<true, Open>::sum(runs_of(p, block, c, kForwardPasses), Open(), x, x);
    squares = sums.lost ? kLost : sums.ab;
    return moments_of(0.0, sums.a, squares, static_cast<double>(block.count()));
  }

  static void rows(const ForwardParams& p, const Tiling::Block& block, const RowShifts& all) {
    const Row row(p.C);
    const BFloat16* x = static_cast<const BFloat16*>(p.input);
    const Open gate;
    const PairRowSums<true, Open> pairs(row.width(), exceeds_caches(p, kForwardPasses), block.plane_begin * p.C,
                                        block.count() * p.C, gate, x, x);
    pairs.write(all.sums);
    fold(all.sums, row);
  }

  // What lies nearer together than to 0 has squares of few digits, whose short sums are exact; but their sum must not
  // exceed the squares of deviations by more than double has digits to spare.
  template <class V>
  static Lanes<V> trusted(const ForwardParams& p, const math::Moments<V>& m, V squares, double count) {
    const Lanes<V> finite = squares <= std::numeric_limits<double>::max(), none = (squares == 0) & (m.offset == 0);
    return (p.eps >= kTiny ? none : Lanes<V>{}) | (finite & (squares >= kTiny * count) & (0x1p20 * m.m2 >= squares));
  }
};
#endif

// Ways of summing values of T, each for the channels for which the one before it is not to be trusted.
template <class T, class Way, class... Others>
struct Statistics {
  static constexpr int64_t kFew = 32;  // one channel of so many costs less alone, a value at a time

  static Moments planar(const ForwardParams& p, const Tiling::Block& block, int64_t c) {
    double squares = 0;
    const Moments moments = Way::planar(p, block, c, squares);
    if (Way::trusted(p, moments, squares, static_cast<double>(block.count()))) return moments;
    if constexpr (sizeof...(Others) > 0) {
      return Statistics<T, Others...>::planar(p, block, c);
    } else {
      return wide_moments<T>(p, block, c);
    }
  }

  // f(c, moments) for all channels, in vectors or one by one.
  template <class F>
  static void rows(const ForwardParams& p, const Tiling::Block& block, F f) {
    const int64_t C = p.C;
    const double count = static_cast<double>(block.count());
    const int64_t width = Row(C).width();
    const std::unique_ptr<double[]> values(new double[3 * width]());
    const RowShifts all{&values[0], &values[width], &values[2 * width]};
    Way::rows(p, block, all);
    const auto trusted = [&](int64_t c, auto zero) {
      using V = decltype(zero);
      return Way::trusted(p, all.moments<V>(c, count), get<V>(all.squares + c), count);
    };
    int64_t trusted_ones = 0;
    for_channels(0, C, [&](int64_t c, auto zero) { trusted_ones += __builtin_popcount(bits_of(trusted(c, zero))); });
    if (trusted_ones == C)
      return for_channels(0, C, [&](int64_t c, auto zero) { f(c, all.moments<decltype(zero)>(c, count)); });
    const bool few = kFew * (C - trusted_ones) <= C;
    std::unique_ptr<double[]> others;
    if constexpr (sizeof...(Others) > 0) {
      if (!few) {
        others.reset(new double[3 * C]);
        Statistics<T, Others...>::rows(p, block, [&](int64_t c, const auto& m) { put_moments(&others[c], C, m); });
      }
    }
    for (int64_t c = 0; c < C; ++c)
      f(c, trusted(c, 0.0) ? all.moments<double>(c, count)
           : others        ? get_moments<double>(&others[c], C)
                           : wide_moments<T>(p, block, c));
  }
};

template <class T>
struct StatisticsOf {
  using type = Statistics<T, Shifted<float, T>, Shifted<double, T>>;
};
template <>
struct StatisticsOf<double> {
  using type = Statistics<double, Shifted<double, double>>;
};
#ifdef BNEXT_BF16
template <>
struct StatisticsOf<BFloat16> {
  using type = Statistics<BFloat16, Paired, Shifted<float, BFloat16>, Shifted<double, BFloat16>>;
};
#endif

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
