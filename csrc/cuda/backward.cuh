// Backward of both: grad_bias = sum(dy), grad_weight = sum(dy * (x - mean)) * invstd, and grad_input.
//
// Sums over kUnroll packs in the compute type, then in double: over the thread's packs, warp, block and splits, in that
// order. With E = N * C * S * itemsize, kernels load in training 4E and store E (streaming), or 2E and E (resident;
// retained: and what is not kept once more). In evaluation grad_input needs no sum and is written while they are taken:
// 2E and E; E and E without them.
#pragma once

#include "driver.cuh"

namespace bnext::cuda {

struct ProductsPart {
  double sum_dy, sum_dy_xmu;
  __device__ __forceinline__ void add(const ProductsPart& other) {
    sum_dy += other.sum_dy;
    sum_dy_xmu += other.sum_dy_xmu;
  }
};

template <class Tile_, bool kResident_>
struct Backward {
  using Params = BackwardParams;
  using Tile = Tile_;
  using T = typename Tile::T;
  using A = Compute<T>;
  using Partial = ProductsPart;
  static constexpr bool kResident = kResident_;
  static constexpr int kPack = Tile::kPack, kColumns = Tile::kColumns;
  static constexpr Kind kKind{kResident, true, Tile::kPlanar, Tile::kWhole, sizeof(T)};
  static constexpr int kUnroll = unroll(kKind);
  enum Factor { kMean, kScale, kGradMean, kProjection };

  const Params& p;
  const Work& w;
  const Memory<Tile, Partial> memory;

  __device__ __forceinline__ void begin() const {}
  __device__ __forceinline__ bool waits() const { return false; }
  __device__ __forceinline__ bool reduces() const { return p.reduces(); }
  // In evaluation reduce() writes grad_input, if there is anything to reduce.
  __device__ __forceinline__ bool applies() const { return p.grad_input && (training() || !p.reduces()); }

  __device__ __forceinline__ void reduce(const Tile& tile, Partial (&part)[kColumns]) const {
    const bool writes = p.grad_input && !training();
    A mean[kColumns], scale[kColumns];
    if (tile.size() > 0) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int64_t c = tile.first() + tile.place(j);
        mean[j] = static_cast<const A*>(p.mean)[c];
        scale[j] = writes ? slope(c) : A(0);
      }
    }
    for_slots<kUnroll>(tile, [&](const Slot(&slots)[kUnroll], int k) {
      const bool keeps = kResident && k < w.held;
      Pack<T, kPack> dy[kUnroll], x[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        dy[u] = load<Tile>(w, static_cast<const T*>(p.grad_output), slots[u], keeps);
        x[u] = load<Tile>(w, static_cast<const T*>(p.input), slots[u], keeps);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (keeps && slots[u].size()) keep(tile, k + u, dy[u], x[u]);
        if (writes) write_eval(slots[u], dy[u], scale);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        A sum[2] = {0, 0};
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int i = 0; i < kPack / kColumns; ++i) {
            const A dy_i = widen(dy[u].element[c + i]), x_i = widen(x[u].element[c + i]);
            if (holds<Tile>(slots[u], c + i)) math::add(sum, math::products(dy_i, x_i, mean[c]));
          }
        }
        part[c].add({static_cast<double>(sum[0]), static_cast<double>(sum[1])});
      }
    });
  }

  __device__ __forceinline__ void finish(int64_t c, int place, const Partial& sum, bool writes) const {
    const double invstd = static_cast<const A*>(p.invstd)[c], count = static_cast<double>(p.count());
    if (writes && p.grad_bias) write(p.grad_bias, p.param_dtype, c, sum.sum_dy);
    if (writes && p.grad_weight) write(p.grad_weight, p.param_dtype, c, math::grad_weight(sum.sum_dy_xmu, invstd));
    memory.factor(kMean, place) = static_cast<const A*>(p.mean)[c];
    memory.factor(kScale, place) = slope(c);
    memory.factor(kGradMean, place) = static_cast<A>(sum.sum_dy / count);
    memory.factor(kProjection, place) = static_cast<A>(math::projection(sum.sum_dy_xmu, invstd, count));
  }

  __device__ __forceinline__ void apply(const Tile& tile) const {
    if (tile.size() == 0) return;
    A factor[4][kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int place = tile.place(j);
#pragma unroll
      for (int f = 0; f < 4; ++f) factor[f][j] = memory.factor(f, place);
    }
    const int kept = kResident ? min(w.held, tile.size()) : 0;
    apply<false>(tile, factor, kept, tile.size());
    if constexpr (kResident) apply<true>(tile, factor, 0, kept);
  }

 private:
  // Slabs are kept in training only, when there is something to read again.
  __device__ __forceinline__ bool training() const { return kResident || p.training; }

  // Slots [begin, end), which are all kept, or none.
  template <bool kKept>
  __device__ __forceinline__ void apply(const Tile& tile, const A (&factor)[4][kColumns], int begin, int end) const {
    constexpr int kAtOnce = kResident && !kKept ? 2 : kUnroll;  // as many as registers allow
    for_slots_backward<kAtOnce>(tile, begin, end, [&](const Slot(&slots)[kAtOnce], int k) {
      Pack<T, kPack> dy[kAtOnce], x[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if constexpr (kKept) {
          if (slots[u].size()) fetch(tile, k + u, dy[u], x[u]);
        } else {
          dy[u] = load<Tile>(w, static_cast<const T*>(p.grad_output), slots[u]);
          if (training()) x[u] = load<Tile>(w, static_cast<const T*>(p.input), slots[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (!training()) {
          write_eval(slots[u], dy[u], factor[kScale]);
          continue;
        }
        A dx[kPack];
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const int c = j % kColumns;
          dx[j] = math::grad_input_train(widen(dy[u].element[j]), widen(x[u].element[j]), factor[kMean][c],
                                         factor[kScale][c], factor[kGradMean][c], factor[kProjection][c]);
        }
        store<Tile>(w, static_cast<T*>(p.grad_input), slots[u], narrow<T>(dx));
      }
    });
  }

  // The cache has all of dy, then all of x.
  __device__ __forceinline__ int kept_x(const Tile& tile, int k) const {
    return tile.cached(k) + w.cache_bytes / static_cast<int>(2 * sizeof(Pack<T, kPack>));
  }
  __device__ __forceinline__ void keep(const Tile& tile, int k, const Pack<T, kPack>& dy,
                                       const Pack<T, kPack>& x) const {
    memory.cache[tile.cached(k)] = dy;
    memory.cache[kept_x(tile, k)] = x;
  }
  __device__ __forceinline__ void fetch(const Tile& tile, int k, Pack<T, kPack>& dy, Pack<T, kPack>& x) const {
    dy = memory.cache[tile.cached(k)];
    x = memory.cache[kept_x(tile, k)];
  }

  __device__ __forceinline__ A slope(int64_t c) const {
    const A invstd = static_cast<const A*>(p.invstd)[c];
    return p.weight ? read<A>(p.weight, p.param_dtype, c) * invstd : invstd;
  }

  __device__ __forceinline__ void write_eval(const Slot& slot, const Pack<T, kPack>& dy,
                                             const A (&scale)[kColumns]) const {
    A dx[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) dx[j] = math::grad_input_eval(widen(dy.element[j]), scale[j % kColumns]);
    store<Tile>(w, static_cast<T*>(p.grad_input), slot, narrow<T>(dx));
  }
};

}  // namespace bnext::cuda
