// Training and evaluation forward: y = (x - mean) * (weight * invstd) + bias, running statistics and the counter.
//
// Statistics: Welford's update for kUnroll packs at a time in each thread, then Chan's formula over warp, block and
// splits, in that order, in the compute type. With E = N * C * S * itemsize, kernels load 2E and store E (streaming),
// or E and E (resident, and evaluation; retained: and what is not kept once more). A residual and an activation that
// follow (After) load E more, and store a bit an element.
#pragma once

#include "driver.cuh"

namespace bnext::cuda {

template <class A>
struct BatchPart {
  math::Moments<A> moments;
  A count;
  __device__ __forceinline__ void add(const BatchPart& other) {
    math::chan_combine(moments, count, other.moments, other.count);
    math::recenter(moments);
    count += other.count;
  }
};

template <class Tile_, bool kResident_, After kAfter>
struct Forward {
  using Params = ForwardParams;
  using Tile = Tile_;
  using T = typename Tile::T;
  using A = Compute<T>;
  using Partial = BatchPart<A>;
  static constexpr bool kResident = kResident_;
  static constexpr int kPack = Tile::kPack, kColumns = Tile::kColumns;
  static constexpr Kind kKind{kResident, false, Tile::kPlanar, Tile::kWhole, sizeof(T), kAfter};
  static constexpr int kUnroll = unroll(kKind);
  // Whether there may be a residual, and a mask.
  static constexpr bool kAdds = kAfter != After::nothing;
  enum Factor { kMean, kScale, kBias };

  const Params& p;
  const Work& w;
  const Memory<Tile, Partial> memory;

  __device__ __forceinline__ void begin() const {
    if (p.num_batches_tracked) ++*p.num_batches_tracked;
  }
  __device__ __forceinline__ bool waits() const { return p.cumulative; }
  __device__ __forceinline__ bool reduces() const { return p.training; }
  __device__ __forceinline__ bool applies() const { return true; }

  __device__ __forceinline__ void reduce(const Tile& tile, Partial (&part)[kColumns]) const {
    A count = 0;
    for_slots<kUnroll>(tile, [&](const Slot(&slots)[kUnroll], int k) {
      const bool keeps = kResident && k < w.held;
      Pack<T, kPack> x[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) x[u] = load<Tile>(w, static_cast<const T*>(p.input), slots[u], keeps);
      int taken = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (keeps && slots[u].size()) memory.cache[tile.cached(k + u)] = x[u];
        taken += slots[u].size();
      }
      if (taken == 0) return;
      const A all = count + static_cast<A>(taken / kColumns), inverse = 1 / all;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        math::Moments<A>& m = part[c].moments;
        const auto each = [&](auto f) {
#pragma unroll
          for (int u = kUnroll - 1; u >= 0; --u) {
#pragma unroll
            for (int i = kPack / kColumns - 1; i >= 0; --i)
              if (holds<Tile>(slots[u], c + i)) f(static_cast<A>(widen(x[u].element[c + i])));
          }
        };
        if (count == 0) each([&](A value) { m.origin = value; });
        A sum[2] = {0, 0};
        each([&](A value) { math::add(sum, math::shifted(value, m.origin)); });
        math::welford_push(m, count, sum, inverse);
        math::recenter(m);
      }
      count = all;
    });
#pragma unroll
    for (int c = 0; c < kColumns; ++c) part[c].count = count;
  }

  __device__ __forceinline__ void finish(int64_t c, int place, const Partial& sum, bool writes) const {
    A mean, var;
    if (kResident || p.training) {  // slabs are kept in training only
      const A count = static_cast<A>(p.count());
      mean = sum.moments.mean();
      var = math::biased_var(sum.moments.m2, count);
      if (writes && p.running_mean) {
        const int64_t batches = p.cumulative ? *p.num_batches_tracked : 0;  // otherwise block 0 may be writing it
        const A factor = static_cast<A>(math::average_factor(p.cumulative, p.momentum, batches));
        update_running(p, c, mean, math::unbiased_var(sum.moments.m2, count), factor);
      }
    } else {
      mean = read_param<T>(p, p.running_mean, c);
      var = read_param<T>(p, p.running_var, c);
    }
    const A invstd = math::invstd(var, static_cast<A>(p.eps));
    if (writes) {
      static_cast<A*>(p.mean)[c] = mean;
      static_cast<A*>(p.invstd)[c] = invstd;
    }
    memory.factor(kMean, place) = mean;
    memory.factor(kScale, place) = p.weight ? read_param<T>(p, p.weight, c) * invstd : invstd;
    memory.factor(kBias, place) = p.bias ? read_param<T>(p, p.bias, c) : A(0);
  }

  __device__ __forceinline__ void apply(const Tile& tile) const {
    if (tile.size() == 0) return;
    A factor[3][kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int place = tile.place(j);
#pragma unroll
      for (int f = 0; f < 3; ++f) factor[f][j] = memory.factor(f, place);
    }
    const int kept = kResident ? min(w.held, tile.size()) : 0;
    apply<false>(tile, factor, kept, tile.size());
    if constexpr (kResident) apply<true>(tile, factor, 0, kept);
  }

 private:
  // Slots [begin, end), which are all kept, or none.
  template <bool kKept>
  __device__ __forceinline__ void apply(const Tile& tile, const A (&factor)[3][kColumns], int begin, int end) const {
    constexpr int kAtOnce = kAdds && kUnroll > 2 ? 2 : kUnroll;  // as many as registers allow
    for_slots_backward<kAtOnce>(tile, begin, end, [&](const Slot(&slots)[kAtOnce], int k) {
      Pack<T, kPack> x[kAtOnce], residual[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if constexpr (kAdds)
          residual[u] = load<Tile>(w, static_cast<const T*>(p.residual), p.residual ? slots[u] : Slot{0, 0, 0});
        if constexpr (!kKept) x[u] = load<Tile>(w, static_cast<const T*>(p.input), slots[u]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (kKept && slots[u].size()) x[u] = memory.cache[tile.cached(k + u)];
        A z[kPack];
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const int c = j % kColumns;
          z[j] = math::normalize(widen(x[u].element[j]), factor[kMean][c], factor[kScale][c], factor[kBias][c]);
          if (kAdds && p.residual) z[j] += widen(residual[u].element[j]);
        }
        unsigned passes = 0;
        with_activation<kAfter, A>(p, [&](auto activation) {
#pragma unroll
          for (int j = 0; j < kPack; ++j) {
            if constexpr (kAdds)
              if (p.mask) passes |= static_cast<unsigned>(activation.passes(z[j])) << j;
            z[j] = activation.forward(z[j]);
          }
        });
        if (kAdds && p.mask) store_bits<Tile>(p.mask, slots[u], passes);
        store<Tile>(w, static_cast<T*>(p.output), slots[u], narrow<T>(z));
      }
    });
  }
};

}  // namespace bnext::cuda
