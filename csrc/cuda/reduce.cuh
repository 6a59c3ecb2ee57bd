// Partial results of one channel combined over a block, always in the same order: lane by lane down the warp, then warp
// by warp (planar), or the lower half of the rows with the upper half until one is left (otherwise), and then the
// columns of a channel (planes). A partial result is a trivially copyable P with add(const P&) and a zero P{}.
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

// Every thread's part, of the tile's one channel: lane 0 gets the sum. memory: a P for each warp.
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

// Every thread's parts, of the channels of its pack: each lane 0 gets the sums. memory: kColumns of P for half the
// threads.
template <class Tile, class P>
__device__ __forceinline__ void combine_rows(const Tile& tile, P (&part)[Tile::kColumns], P* memory) {
  const int at = static_cast<int>(threadIdx.x), stride = static_cast<int>(blockDim.x) / 2;
  for (int left = tile.lanes(); left > 1;) {
    const int half = (left + 1) / 2;
    if (tile.lane() >= half && tile.lane() < left) {
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) memory[j * stride + at - half * tile.width()] = part[j];
    }
    __syncthreads();
    if (tile.lane() < left - half) {
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) part[j].add(memory[j * stride + at]);
    }
    __syncthreads();
    left = half;
  }
}

// What combine_rows has found for the columns of planes: each lane 0 gets the sums of its columns' channels. A warp
// takes a channel, its lanes column after column. memory: a P for each column.
template <class Tile, class P>
__device__ __forceinline__ void combine_columns(const Tile& tile, P (&part)[Tile::kColumns], P* memory) {
  if (tile.lane() == 0) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) memory[tile.column() + j] = part[j];
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  for (int channel = static_cast<int>(threadIdx.x) / 32; channel < tile.channels(); channel += warps) {
    P* const own = memory + channel * tile.plane();
    P sum{};
    for (int i = lane; i < tile.plane(); i += 32) sum.add(own[i]);
    combine_warp(sum);
    __syncwarp();
    if (lane == 0) *own = sum;
  }
  __syncthreads();
  if (tile.lane() == 0) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) part[j] = memory[tile.place(j) * tile.plane()];
  }
}

// Sums over the threads that share a column.
template <class Tile, class P>
__device__ __forceinline__ void combine(const Tile& tile, P (&part)[Tile::kColumns], P* memory) {
  if constexpr (Tile::kPlanar) {
    combine_lanes(part[0], memory);
  } else {
    combine_rows(tile, part, memory);
  }
}

// Sums over all that a block has of a channel.
template <class Tile, class P>
__device__ __forceinline__ void combine_channels(const Tile& tile, P (&part)[Tile::kColumns], P* memory) {
  combine(tile, part, memory);
  if constexpr (Tile::kPlanes) combine_columns(tile, part, memory);
}

}  // namespace bnext::cuda
