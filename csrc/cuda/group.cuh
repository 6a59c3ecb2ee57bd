// Blocks that share a slab, and how each gets the partial results of all: through the shared memory of a cluster, or
// through global memory. All combine them in the same order, so that all have the same bits.
#pragma once

#include "reduce.cuh"

namespace bnext::cuda {

template <class P>
class Group {
 public:
  explicit __device__ Group(const Work& w)
      : w_(w),
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

  // Where the sums of this slab's channels are to go: what the last slab's were may still be read.
  __device__ __forceinline__ P* place(P* sums) const {
    return w_.strategy == Strategy::cluster ? sums + exchanges_ % 2 * w_.channels : sums;
  }

  // The sum of all blocks' of this thread's channel, at its lane 0.
  template <class Tile>
  __device__ __forceinline__ P total(const Tile& tile, const Finishers& row, P* sums, P* memory) {
    if (w_.splits == 1) return sums[row.place()];
    P* const scratch = static_cast<P*>(w_.scratch) + tile.first() + row.place();
    if (meets_all()) {
      if (row.lane() == 0) scratch[rank_ * w_.C] = sums[row.place()];
      wait();
    } else {
      gpu::cluster_sync();
    }
    ++exchanges_;
    return gather<Tile>(row, w_.splits, memory, [&](int split) {
      return meets_all() ? scratch[split * w_.C] : gpu::of_rank(sums, split)[row.place()];
    });
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
    if (threadIdx.x == 0) gpu::meet(arrived(), exchanges_ * static_cast<unsigned>(w_.splits));
    __syncthreads();
  }

  const Work& w_;
  const unsigned index_, rank_;
  unsigned exchanges_ = 0;
};

}  // namespace bnext::cuda
