// Partial results of a block combined, always in the same order: lane by lane down the warp, then warp by warp
// (planar), or the lower half of the rows with the upper half until one is left (otherwise), and then the columns of a
// channel (planes). A partial result is a trivially copyable P with add(const P&) and a zero P{}.
#pragma once

#include "tile.cuh"

namespace bnext::cuda {

template <class P>
__device__ __forceinline__ P shuffle_down(const P& part, int lanes) {
  constexpr int kWords = sizeof(P) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &part, sizeof(P));
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = __shfl_down_sync(0xffffffffu, words[w], lanes);
  P other;
  memcpy(&other, words, sizeof(P));
  return other;
}

// The first lane gets the sum of all.
template <class P>
__device__ __forceinline__ void combine_warp(P& part) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) part.add(shuffle_down(part, lanes));
}

// Every thread's part, of one channel: thread 0 gets the sum. memory: a P for each warp.
template <class P>
__device__ __forceinline__ void combine_lanes(P& part, P* memory) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  combine_warp(part);
  if (lane == 0) memory[warp] = part;
  __syncthreads();
  if (warp == 0) {
    part = lane < blockDim.x / 32 ? memory[lane] : P{};
    combine_warp(part);
  }
}

// The parts of threads that stand in rows of `width`: those of the first row get the sums of their columns. memory:
// columns of P for half the threads.
template <int columns, class Row, class P>
__device__ __forceinline__ void combine_rows(const Row& row, P (&part)[columns], P* memory) {
  const int at = static_cast<int>(threadIdx.x), stride = static_cast<int>(blockDim.x) / 2;
  for (int left = row.lanes(); left > 1;) {
    const int half = (left + 1) / 2;
    if (row.lane() >= half && row.lane() < left) {
#pragma unroll
      for (int j = 0; j < columns; ++j) memory[j * stride + at - half * row.width()] = part[j];
    }
    __syncthreads();
    if (row.lane() < left - half) {
#pragma unroll
      for (int j = 0; j < columns; ++j) part[j].add(memory[j * stride + at]);
    }
    __syncthreads();
    left = half;
  }
}

// The columns' parts of the first row, to the sums of their channels: a warp takes a channel, its lanes column after
// column. memory: a P for each column.
template <class Tile, class P>
__device__ __forceinline__ void combine_columns(const Tile& tile, const P (&part)[Tile::kColumns], P* memory, P* sums) {
  if (tile.lane() == 0) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) memory[tile.column() + j] = part[j];
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int channel = static_cast<int>(threadIdx.x) / 32; channel < tile.channels(); channel += warps) {
    P sum{};
    for (int i = lane; i < tile.plane(); i += 32) sum.add(memory[channel * tile.plane() + i]);
    combine_warp(sum);
    if (lane == 0) sums[channel] = sum;
  }
}

// All that a block has of each channel of its slab, to sums, [channels].
template <class Tile, class P>
__device__ __forceinline__ void combine(const Tile& tile, P (&part)[Tile::kColumns], P* memory, P* sums) {
  if constexpr (Tile::kPlanar) {
    combine_lanes(part[0], memory);
    if (tile.lane() == 0) sums[0] = part[0];
  } else {
    combine_rows(tile, part, memory);
    if constexpr (Tile::kPlanes) {
      combine_columns(tile, part, memory, sums);
    } else if (tile.lane() == 0) {
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) sums[tile.place(j)] = part[j];
    }
  }
  __syncthreads();
}

// The channels of a slab, each with a row's column of threads that finish it.
class Finishers {
 public:
  template <class Tile>
  __device__ explicit Finishers(const Tile& tile)
      : width_(tile.channels()),
        lane_(static_cast<int>(threadIdx.x) / width_),
        place_(static_cast<int>(threadIdx.x) - lane_ * width_) {}
  __device__ __forceinline__ int width() const { return width_; }
  __device__ __forceinline__ int lane() const { return lane_; }
  __device__ __forceinline__ int lanes() const { return static_cast<int>(blockDim.x) / width_; }
  __device__ __forceinline__ int place() const { return place_; }

 private:
  int width_, lane_, place_;
};

// The sum of what from(split) gives for this thread's channel, at its lane 0.
template <class Tile, class P, class F>
__device__ __forceinline__ P gather(const Finishers& row, int splits, P* memory, F from) {
  P part[1] = {};
  if (row.lane() < row.lanes())
    for (int split = row.lane(); split < splits; split += row.lanes()) part[0].add(from(split));
  if constexpr (Tile::kPlanar) {
    combine_lanes(part[0], memory);
  } else {
    combine_rows(row, part, memory);
  }
  return part[0];
}

}  // namespace bnext::cuda
