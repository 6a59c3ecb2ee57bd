// Backward of both: grad_bias = sum(dz), grad_weight = sum(dz * (x - mean)) * invstd, grad_input, and grad_residual =
// dz, the gradient of the activation's argument; without activation dz = dy.
//
// Sums over kUnroll packs in the compute type, then in double: over the thread's packs, warp, block and splits, in that
// order. With E = N * C * S * itemsize, kernels load in training 4E and store E (streaming), or 2E and E (resident;
// retained: and what is not kept once more). In evaluation grad_input needs no sum and is written while they are taken:
// 2E and E; E and E without them. ReLU's dz is of x, and loads nothing more. After a residual dz is of a bit an
// element, or of the residual, loaded as often as dy, and grad_residual is E more to store.
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

template <class Tile_, bool kResident_, After kAfter>
struct Backward {
  using Params = BackwardParams;
  using Tile = Tile_;
  using T = typename Tile::T;
  using A = Compute<T>;
  using Partial = ProductsPart;
  static constexpr bool kResident = kResident_;
  static constexpr int kPack = Tile::kPack, kColumns = Tile::kColumns;
  static constexpr Kind kKind{kResident, true, Tile::kPlanar, Tile::kWhole, sizeof(T), kAfter};
  static constexpr int kUnroll = unroll(kKind);
  // How dz comes from dy. ReLU's is dy or 0, so that it can take dy's place at once, and be kept; others are computed
  // beside it, from what is kept or read again.
  static constexpr bool kAny = kAfter == After::any, kGates = kAfter != After::nothing && !kAny;
  static constexpr bool kMasks = kAfter == After::relu_of_mask || kAny, kRecomputes = kAfter == After::relu || kAny;
  enum Factor { kMean, kScale, kGradMean, kProjection, kBias };
  static constexpr int kFactors = backward_factors(kAfter);

  const Params& p;
  const Work& w;
  const Memory<Tile, Partial> memory;

  __device__ __forceinline__ void begin() const {}
  __device__ __forceinline__ bool waits() const { return false; }
  __device__ __forceinline__ bool reduces() const { return p.reduces(); }
  // If nothing that is written needs the sums, reduce() writes it, if there is anything to reduce.
  __device__ __forceinline__ bool applies() const { return needs_sums() || !p.reduces(); }

  __device__ __forceinline__ void reduce(const Tile& tile, Partial (&part)[kColumns]) const {
    const bool writes = p.applies() && !needs_sums();
    A factor[kFactors][kColumns];
    if (tile.size() > 0) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int64_t c = tile.first() + tile.place(j);
        factor[kMean][j] = static_cast<const A*>(p.mean)[c];
        factor[kScale][j] = writes || kRecomputes ? slope(c) : A(0);
        if constexpr (kRecomputes) factor[kBias][j] = bias(c);
      }
    }
    for_slots<kUnroll>(tile, [&](const Slot(&slots)[kUnroll], int k) {
      const bool keeps = kResident && k < w.held;
      Packs packs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) packs[u] = load_all(slots[u], true, keeps);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) compute(packs[u], factor);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        A sum[2] = {0, 0};
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int i = 0; i < kPack / kColumns; ++i) {
            gate(packs[u], c + i, factor);
            const A dz = gradient(packs[u], c + i), x = widen(packs[u].x.element[c + i]);
            if (holds<Tile>(slots[u], c + i)) math::add(sum, math::products(dz, x, factor[kMean][c]));
          }
        }
        part[c].add({static_cast<double>(sum[0]), static_cast<double>(sum[1])});
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (keeps && slots[u].size()) keep(tile, k + u, packs[u]);
        if (writes) write_now(slots[u], packs[u], factor);
      }
    });
  }

  __device__ __forceinline__ void finish(int64_t c, int place, const Partial& sum, bool writes) const {
    const double invstd = static_cast<const A*>(p.invstd)[c], count = static_cast<double>(p.count());
    if (writes && p.grad_bias) write_param<T>(p, p.grad_bias, c, sum.sum_dy);
    if (writes && p.grad_weight) write_param<T>(p, p.grad_weight, c, math::grad_weight(sum.sum_dy_xmu, invstd));
    memory.factor(kMean, place) = static_cast<const A*>(p.mean)[c];
    memory.factor(kScale, place) = slope(c);
    memory.factor(kGradMean, place) = static_cast<A>(sum.sum_dy / count);
    memory.factor(kProjection, place) = static_cast<A>(math::projection(sum.sum_dy_xmu, invstd, count));
    if constexpr (kRecomputes) memory.factor(kBias, place) = bias(c);
  }

  __device__ __forceinline__ void apply(const Tile& tile) const {
    if (tile.size() == 0) return;
    A factor[kFactors][kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int place = tile.place(j);
#pragma unroll
      for (int f = 0; f < kFactors; ++f) factor[f][j] = memory.factor(f, place);
    }
    const int kept = kResident ? min(w.held, tile.size()) : 0;
    apply<false>(tile, factor, kept, tile.size());
    if constexpr (kResident) apply<true>(tile, factor, 0, kept);
  }

 private:
  // Of the same elements: dy, or dz in its place, and what else dz is computed of.
  struct Packs {
    Pack<T, kPack> dy, x, residual;
    unsigned passes;
    A dz[kPack];  // where it cannot take dy's place
  };

  // Slabs are kept only when there is something to read again.
  __device__ __forceinline__ bool needs_sums() const { return kResident || (p.training && p.grad_input); }

  __device__ __forceinline__ bool adds() const { return kAny && p.residual && !p.mask; }

  __device__ __forceinline__ Packs load_all(const Slot& slot, bool x, bool once = false) const {
    Packs packs;
    packs.dy = load<Tile>(w, static_cast<const T*>(p.grad_output), slot, once);
    if (x) packs.x = load<Tile>(w, static_cast<const T*>(p.input), slot, once);
    // Not conditions around loads: that the compiler makes loops of their own for each costs registers.
    if constexpr (kAny)
      packs.residual = load<Tile>(w, static_cast<const T*>(p.residual), adds() ? slot : Slot{0, 0, 0}, once);
    if constexpr (kMasks) packs.passes = load_bits(p.mask, !kAny || p.mask ? slot : Slot{0, 0, 0});
    return packs;
  }

  __device__ __forceinline__ A argument(const Packs& packs, int j, const A (&factor)[kFactors][kColumns]) const {
    const int c = j % kColumns;
    return math::normalize(widen(packs.x.element[j]), factor[kMean][c], factor[kScale][c], factor[kBias][c]);
  }

  // Puts dz of element j in the place of dy, if it can.
  __device__ __forceinline__ void gate(Packs& packs, int j, const A (&factor)[kFactors][kColumns]) const {
    if constexpr (kGates) {
      bool passes;
      if constexpr (kMasks) {
        passes = packs.passes >> j & 1;
      } else {
        passes = math::Relu::passes(argument(packs, j, factor));
      }
      packs.dy.element[j] = math::Relu::gate(packs.dy.element[j], passes);
    }
  }
  // All of dz, if it cannot take dy's place.
  __device__ __forceinline__ void compute(Packs& packs, const A (&factor)[kFactors][kColumns]) const {
    if constexpr (kAny) {
      with_activation<kAfter, A>(p, [&](auto activation) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const A dy = widen(packs.dy.element[j]);
          if (p.mask) {
            packs.dz[j] = activation.gate(dy, (packs.passes >> j & 1) != 0);
          } else {
            A z = argument(packs, j, factor);
            if (adds()) z += widen(packs.residual.element[j]);
            packs.dz[j] = activation.backward(dy, z);
          }
        }
      });
    }
  }
  // dz, after these.
  __device__ __forceinline__ A gradient(const Packs& packs, int j) const {
    if constexpr (kAny) {
      return packs.dz[j];
    } else {
      return widen(packs.dy.element[j]);
    }
  }

  // Slots [begin, end), which are all kept, or none.
  template <bool kKept>
  __device__ __forceinline__ void apply(const Tile& tile, const A (&factor)[kFactors][kColumns], int begin,
                                        int end) const {
    constexpr int kAtOnce = kResident && !kKept && kUnroll > 2 ? 2 : kUnroll;  // as many as registers allow
    for_slots_backward<kAtOnce>(tile, begin, end, [&](const Slot(&slots)[kAtOnce], int k) {
      Packs packs[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if constexpr (kKept) {
          if (slots[u].size()) packs[u] = fetch(tile, k + u, slots[u]);
        } else {
          packs[u] = load_all(slots[u], needs_sums() || kRecomputes);
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if constexpr (!kKept) {
#pragma unroll
          for (int j = 0; j < kPack; ++j) gate(packs[u], j, factor);
        }
        compute(packs[u], factor);
        if (!needs_sums()) {
          write_now(slots[u], packs[u], factor);
          continue;
        }
        A dx[kPack];
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const int c = j % kColumns;
          dx[j] = math::grad_input_train(gradient(packs[u], j), widen(packs[u].x.element[j]), factor[kMean][c],
                                         factor[kScale][c], factor[kGradMean][c], factor[kProjection][c]);
        }
        store<Tile>(w, static_cast<T*>(p.grad_input), slots[u], narrow<T>(dx));
        write_residual(slots[u], packs[u]);
      }
    });
  }

  // The cache has all of dy, or dz, then all of x, then of the residual.
  __device__ __forceinline__ Pack<T, kPack>& kept(const Tile& tile, int k, int tensor) const {
    return memory
        .cache[tile.cached(k) + tensor * (w.cache_bytes / static_cast<int>(w.inputs * sizeof(Pack<T, kPack>)))];
  }
  __device__ __forceinline__ void keep(const Tile& tile, int k, const Packs& packs) const {
    kept(tile, k, 0) = packs.dy;
    kept(tile, k, 1) = packs.x;
    if (adds()) kept(tile, k, 2) = packs.residual;
  }
  __device__ __forceinline__ Packs fetch(const Tile& tile, int k, const Slot& slot) const {
    Packs packs;
    packs.dy = kept(tile, k, 0);
    packs.x = kept(tile, k, 1);
    if (adds()) packs.residual = kept(tile, k, 2);
    if (kAny && p.mask) packs.passes = load_bits(p.mask, slot);
    return packs;
  }

  __device__ __forceinline__ A slope(int64_t c) const {
    const A invstd = static_cast<const A*>(p.invstd)[c];
    return p.weight ? read_param<T>(p, p.weight, c) * invstd : invstd;
  }
  __device__ __forceinline__ A bias(int64_t c) const { return p.bias ? read_param<T>(p, p.bias, c) : A(0); }

  // What needs no sums.
  __device__ __forceinline__ void write_now(const Slot& slot, const Packs& packs,
                                            const A (&factor)[kFactors][kColumns]) const {
    if (p.grad_input) {
      A dx[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) dx[j] = math::grad_input_eval(gradient(packs, j), factor[kScale][j % kColumns]);
      store<Tile>(w, static_cast<T*>(p.grad_input), slot, narrow<T>(dx));
    }
    write_residual(slot, packs);
  }
  __device__ __forceinline__ void write_residual(const Slot& slot, const Packs& packs) const {
    if constexpr (kMasks) {
      if (!p.grad_residual) return;
      A dz[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) dz[j] = gradient(packs, j);
      store<Tile>(w, static_cast<T*>(p.grad_residual), slot, narrow<T>(dz));
    }
  }
};

}  // namespace bnext::cuda
