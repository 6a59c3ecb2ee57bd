// The order of a kernel's work, the same for forward and backward. What they do is an Op, an object with
//   Tile, Partial; kResident          its tiles, partial results, and whether slabs are kept in shared memory
//   begin()                           once a launch, by one thread, before anything else
//   waits(), reduces(), applies()     whether what begin() wrote is read by finish(); which phases there are
//   reduce(tile, part)                this thread's partial results
//   finish(c, place, sum, writes)     once for each channel: sums to factors; if it writes, all results [C] too
//   apply(tile)                       writes the tensor [N, C, S]
#pragma once

#include "group.cuh"

namespace bnext::cuda {

// A block's shared memory.
template <class Tile, class Partial>
struct Memory {
  using T = typename Tile::T;
  using A = Compute<T>;
  Pack<T, Tile::kPack>* cache;  // packs that are kept, tensor after tensor
  Partial* work;                // partial results being combined
  Partial* sums;                // of the slab's channels; of a cluster: [2, channels]
  A* factors;                   // what applying needs of each channel: [factor, channels]
  int channels;

  __device__ Memory(const Work& w, unsigned char* shared)
      : cache(reinterpret_cast<Pack<T, Tile::kPack>*>(shared)),
        work(reinterpret_cast<Partial*>(shared + w.cache_bytes)),
        sums(reinterpret_cast<Partial*>(shared + w.cache_bytes + w.work_bytes)),
        factors(reinterpret_cast<A*>(shared + w.cache_bytes + w.work_bytes + w.sum_bytes)),
        channels(w.channels) {}
  __device__ __forceinline__ A& factor(int f, int place) const { return factors[f * channels + place]; }
};

// A group of blocks takes slab after slab, each block its split, and reads each once, or what it does not keep twice.
// What the next slab's combination writes is safe: every thread has passed a barrier since it was read.
template <class Op>
__device__ __forceinline__ void run_resident(const Op& op, const Work& w) {
  using Tile = typename Op::Tile;
  using Partial = typename Op::Partial;
  Group<Partial> group(w);
  if (blockIdx.x == 0 && threadIdx.x == 0) op.begin();
  if (op.waits() && !group.meets_all()) cooperative_groups::this_grid().sync();
  for (int64_t slab = group.index(); slab < w.slabs; slab += group.count()) {
    const Tile tile(w, slab, group.rank());
    Partial part[Tile::kColumns] = {};
    op.reduce(tile, part);
    Partial* const sums = group.place(op.memory.sums);
    combine(tile, part, op.memory.work, sums);
    const Finishers row(tile);
    const Partial sum = group.total(tile, row, sums, op.memory.work);
    if (row.lane() == 0) op.finish(tile.first() + row.place(), row.place(), sum, group.rank() == 0);
    __syncthreads();
    op.apply(tile);
  }
  group.end();
}

// All blocks reduce their tasks to scratch; after a grid barrier, or in a second launch, each combines the splits of
// its tasks' slabs and applies, last task and last slot first: what the second-level cache still holds.
template <class Op>
__device__ __forceinline__ void run_streaming(const Op& op, const Work& w) {
  using Tile = typename Op::Tile;
  using Partial = typename Op::Partial;
  Partial* scratch = static_cast<Partial*>(w.scratch);
  if (w.reduce) {
    if (blockIdx.x == 0 && threadIdx.x == 0) op.begin();
    for (int64_t task = blockIdx.x; task < w.slabs * w.splits; task += gridDim.x) {
      const int64_t split = task / w.slabs;
      const Tile tile(w, task - split * w.slabs, split);
      Partial part[Tile::kColumns] = {};
      op.reduce(tile, part);
      combine(tile, part, op.memory.work, op.memory.sums);
      const Finishers row(tile);
      if (row.lane() == 0) scratch[split * w.C + tile.first() + row.place()] = op.memory.sums[row.place()];
      __syncthreads();
    }
    if (w.apply) cooperative_groups::this_grid().sync();
  }
  if (!w.apply) return;
  const int64_t tasks = w.slabs * (op.applies() ? w.splits : 1);
  for (int64_t task = tasks - 1 - blockIdx.x; task >= 0; task -= gridDim.x) {
    const int64_t split = task / w.slabs;
    const Tile tile(w, task - split * w.slabs, split);
    const Finishers row(tile);
    Partial sum{};
    if (op.reduces())
      sum = gather<Tile>(row, w.splits, op.memory.work,
                         [&](int from) { return scratch[from * w.C + tile.first() + row.place()]; });
    if (row.lane() == 0) op.finish(tile.first() + row.place(), row.place(), sum, split == 0);
    __syncthreads();
    if (op.applies()) op.apply(tile);
    __syncthreads();
  }
}

template <class Op>
__device__ __forceinline__ void run(const Op& op, const Work& w) {
  if constexpr (Op::kResident) {
    run_resident(op, w);
  } else {
    run_streaming(op, w);
  }
}

// f(the activation that follows), chosen once for all that f does; A is the type that elements are normalised in.
template <After after, class A, class Params, class F>
__device__ __forceinline__ void with_activation(const Params& p, F f) {
  const auto any = [&](Act act) { f(math::Activation<A>{act, static_cast<A>(p.slope)}); };
  if constexpr (after == After::nothing) {
    f(math::Identity{});
  } else if constexpr (after != After::any) {
    f(math::Relu{});
  } else {
    switch (p.act) {
      case Act::relu:
        return any(Act::relu);
      case Act::relu6:
        return any(Act::relu6);
      case Act::leaky_relu:
        return any(Act::leaky_relu);
      case Act::silu:
        return any(Act::silu);
      case Act::hardswish:
        return any(Act::hardswish);
      default:
        return any(Act::identity);
    }
  }
}

// f(slots, k) for this thread's slots, `unroll` at a time: slots[u] is slot k + u, or empty. In order; or for those
// from `begin` on, the last ones first.
template <int unroll, class Tile, class F>
__device__ __forceinline__ void with_slots(const Tile& tile, int k, F f) {
  Slot slots[unroll];
#pragma unroll
  for (int u = 0; u < unroll; ++u) slots[u] = k + u < tile.size() ? tile.slot(k + u) : Slot{0, 0, 0};
  f(slots, k);
}
template <int unroll, class Tile, class F>
__device__ __forceinline__ void for_slots(const Tile& tile, F f) {
  for (int k = 0; k < tile.size(); k += unroll) with_slots<unroll>(tile, k, f);
}
template <int unroll, class Tile, class F>
__device__ __forceinline__ void for_slots_backward(const Tile& tile, int begin, int end, F f) {
  for (int k = begin + (end - begin + unroll - 1) / unroll * unroll - unroll; k >= begin; k -= unroll)
    with_slots<unroll>(tile, k, f);
}

}  // namespace bnext::cuda
