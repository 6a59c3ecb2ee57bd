// The order of a kernel's work, the same for forward and backward. What they do is an Op, an object with
//   Tile, Partial; kResident          its tiles, partial results, and whether slabs are kept in shared memory
//   begin()                           once a launch, by one thread, before anything else
//   waits(), reduces(), applies()     whether what begin() wrote is read by finish(); which phases there are
//   reduce(tile, part)                this thread's partial results
//   finish(tile, part, writes)        by lane 0 of each column: sums to factors; if it writes, all results [C] too
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
  A* factors;                   // what applying needs of each column: [factor, columns of the slab]
  Partial* exchange;            // of a cluster: [2, channels of the slab]
  int columns;

  __device__ Memory(const Work& w, unsigned char* shared)
      : cache(reinterpret_cast<Pack<T, Tile::kPack>*>(shared)),
        work(reinterpret_cast<Partial*>(shared + w.cache_bytes)),
        factors(reinterpret_cast<A*>(shared + w.cache_bytes + w.work_bytes)),
        exchange(reinterpret_cast<Partial*>(shared + w.cache_bytes + w.work_bytes + w.factor_bytes)),
        columns(w.width * Tile::kColumns) {}
  __device__ __forceinline__ A& factor(const Tile& tile, int f, int j) const {
    return factors[f * columns + tile.column() + j];
  }
};

// A group of blocks takes slab after slab, each block its split, and reads each once, or what it does not keep twice.
// What the next slab's combination writes is safe: every thread has passed a barrier since it was read.
template <class Op>
__device__ __forceinline__ void run_resident(const Op& op, const Work& w) {
  using Tile = typename Op::Tile;
  using Partial = typename Op::Partial;
  Group<Partial> group(w, op.memory.exchange);
  if (blockIdx.x == 0 && threadIdx.x == 0) op.begin();
  if (op.waits() && !group.meets_all()) cooperative_groups::this_grid().sync();
  for (int64_t slab = group.index(); slab < w.slabs; slab += group.count()) {
    const Tile tile(w, slab, group.rank());
    Partial part[Tile::kColumns] = {};
    op.reduce(tile, part);
    combine_channels(tile, part, op.memory.work);
    if (w.splits > 1) {
      group.exchange(tile, part);
      combine(tile, part, op.memory.work);
    }
    if (tile.lane() == 0) op.finish(tile, part, group.rank() == 0);
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
      combine_channels(tile, part, op.memory.work);
      put(tile, part, scratch + split * w.C, false);
      __syncthreads();
    }
    if (w.apply) cooperative_groups::this_grid().sync();
  }
  if (!w.apply) return;
  const int64_t tasks = w.slabs * (op.applies() ? w.splits : 1);
  for (int64_t task = tasks - 1 - blockIdx.x; task >= 0; task -= gridDim.x) {
    const int64_t split = task / w.slabs;
    const Tile tile(w, task - split * w.slabs, split);
    Partial part[Tile::kColumns] = {};
    if (op.reduces()) {
      gather(tile, part, w.splits, [&](int64_t from, int j) { return scratch[from * w.C + tile.channel(j)]; });
      combine(tile, part, op.memory.work);
    }
    if (tile.lane() == 0) op.finish(tile, part, split == 0);
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

// f(slots, k) for this thread's slots, `unroll` at a time: slots[u] is slot k + u, or empty; in order, or the last ones
// first.
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
__device__ __forceinline__ void for_slots_backward(const Tile& tile, F f) {
  for (int k = (tile.size() - 1) / unroll * unroll; k >= 0; k -= unroll) with_slots<unroll>(tile, k, f);
}

}  // namespace bnext::cuda
