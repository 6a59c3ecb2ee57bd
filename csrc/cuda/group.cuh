// Blocks that share a slab, and how each gets the partial results of all: through the shared memory of a cluster, or
// through global memory. All combine them in the same order, so that all have the same bits.
#pragma once

#include "reduce.cuh"

namespace bnext::cuda {

// The sums of the tile's channels; by place in the slab, or by channel.
template <class Tile, class P>
__device__ __forceinline__ void put(const Tile& tile, const P (&part)[Tile::kColumns], P* to, bool by_place) {
  if (tile.lane() != 0) return;
#pragma unroll
  for (int j = 0; j < Tile::kColumns; ++j)
    if (tile.leads(j)) to[by_place ? tile.place(j) : tile.channel(j)] = part[j];
}

// Takes from(split, j), the sums of column j's channel, of all splits: some by each of the lanes, which combine() adds.
template <class Tile, class P, class F>
__device__ __forceinline__ void gather(const Tile& tile, P (&part)[Tile::kColumns], int splits, F from) {
#pragma unroll
  for (int j = 0; j < Tile::kColumns; ++j) part[j] = P{};
  if (tile.lane() == tile.lanes()) return;
  for (int split = tile.lane(); split < splits; split += tile.lanes()) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) part[j].add(from(split, j));
  }
}

template <class P>
class Group {
 public:
  __device__ Group(const Work& w, P* shared)
      : w_(w),
        shared_(shared),
        index_(blockIdx.x / static_cast<unsigned>(w.splits)),
        rank_(blockIdx.x % static_cast<unsigned>(w.splits)) {
    if (meets_all() && rank_ == 0 && threadIdx.x == 0) *arrived() = 0;
  }

  __device__ __forceinline__ int64_t index() const { return index_; }
  __device__ __forceinline__ int64_t count() const { return gridDim.x / static_cast<unsigned>(w_.splits); }
  __device__ __forceinline__ int64_t rank() const { return rank_; }
  // Whether the first exchange waits for the whole grid.
  __device__ __forceinline__ bool meets_all() const {
    return w_.strategy == Strategy::grid || w_.strategy == Strategy::retained;
  }

  // This block's sums for those of all, in parts that combine() adds.
  template <class Tile>
  __device__ __forceinline__ void exchange(const Tile& tile, P (&part)[Tile::kColumns]) {
    if (meets_all()) {
      P* const scratch = static_cast<P*>(w_.scratch);
      put(tile, part, scratch + rank_ * w_.C, false);
      wait();
      gather(tile, part, w_.splits, [&](int split, int j) { return scratch[split * w_.C + tile.channel(j)]; });
    } else {
      // Others may still read what this block gave for the slab before.
      P* const own = shared_ + exchanges_ % 2 * w_.channels;
      put(tile, part, own, true);
      gpu::cluster_sync();
      gather(tile, part, w_.splits, [&](int split, int j) { return gpu::of_rank(own, split)[tile.place(j)]; });
    }
    ++exchanges_;
  }

  // A block's shared memory is there until all others of the cluster have read it.
  __device__ __forceinline__ void end() const {
    if (w_.strategy == Strategy::cluster) gpu::cluster_sync();
  }

 private:
  __device__ __forceinline__ unsigned* arrived() const {
    return reinterpret_cast<unsigned*>(static_cast<P*>(w_.scratch) + w_.splits * w_.C) + index_;
  }

  // Until all blocks of the group are here, with what they wrote; the first time of the whole grid, because the groups'
  // counters have no value before.
  __device__ __forceinline__ void wait() const {
    if (exchanges_ == 0) return cooperative_groups::this_grid().sync();
    __syncthreads();
    if (threadIdx.x == 0) gpu::meet(arrived(), static_cast<unsigned>(exchanges_ * w_.splits));
    __syncthreads();
  }

  const Work& w_;
  P* const shared_;
  const unsigned index_, rank_;
  int exchanges_ = 0;
};

}  // namespace bnext::cuda
