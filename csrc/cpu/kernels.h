// Between dispatch.cpp, which owns the threads, and the instruction-set units, which own the loops.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace bnext::cpu {

// How a problem is cut: a function of its shape alone, so that no bit of a result depends on the threads.
// A block is what a kernel reads twice while it is in the nearest cache: part of a plane or several planes of one
// channel (planar), or rows of all channels (channels_last). A chunk is a run of blocks, one unit of parallel work.
struct Tiling {
  std::int64_t channels, planes, plane;  // planar: C, N, S; channels_last: 1, N * S, 1
  std::int64_t block_size, planes_per_block, blocks_per_plane;
  std::int64_t blocks, chunks;  // of one channel (planar) or of all (channels_last)

  explicit Tiling(const Problem& p) {
    constexpr std::int64_t kBlock = 2048, kMinRows = 8, kSlab = 65536, kChunks = 64;
    const bool planar = p.layout == Layout::planar;
    channels = planar ? p.C : 1;
    planes = planar ? p.N : p.N * p.S;
    plane = planar ? p.S : 1;
    block_size = planar ? kBlock : std::clamp(kSlab / p.C, kMinRows, kBlock);
    planes_per_block = std::max<std::int64_t>(1, block_size / plane);
    blocks_per_plane = (plane + block_size - 1) / block_size;
    blocks = blocks_per_plane > 1 ? planes * blocks_per_plane : (planes + planes_per_block - 1) / planes_per_block;
    chunks = std::min(blocks, kChunks);
  }

  struct Block {
    std::int64_t plane_begin, plane_end, begin, end;  // planes, and elements within each
    std::int64_t count() const { return (plane_end - plane_begin) * (end - begin); }
  };
  Block block(std::int64_t b) const {
    if (blocks_per_plane > 1) {
      const std::int64_t n = b / blocks_per_plane, begin = b % blocks_per_plane * block_size;
      return {n, n + 1, begin, std::min(begin + block_size, plane)};
    }
    return {b * planes_per_block, std::min((b + 1) * planes_per_block, planes), 0, plane};
  }
  std::int64_t chunk_begin(std::int64_t chunk) const { return blocks * chunk / chunks; }
  // Values per channel in a chunk.
  std::int64_t chunk_count(std::int64_t chunk) const {
    std::int64_t count = 0;
    for (std::int64_t b = chunk_begin(chunk); b < chunk_begin(chunk + 1); ++b) count += block(b).count();
    return count;
  }
  std::int64_t units() const { return channels * chunks; }  // unit = channel * chunks + chunk
};

// Scratch of one call.
struct Scratch {
  double* partials;  // [chunks, 2, C]: what a reduction found in each chunk
  void* factors;     // [4, C] of the compute type: what the elementwise pass needs of each channel
};

// One set for an instruction set. Ranges: units for reduce and apply, channels for finish. reduce reads the tensors
// once and writes partials; finish combines them in order of chunks and writes everything of size [C]; apply
// reads them again and writes the tensor of size [N, C, S].
struct Kernels {
  template <class Params>
  using Range = void (*)(const Params&, const Tiling&, const Scratch&, std::int64_t begin, std::int64_t end);
  Range<ForwardParams> forward_reduce, forward_finish, forward_apply;
  Range<BackwardParams> backward_reduce, backward_finish, backward_apply;
};

// The instruction-set units; each compiles kernels.inl in a namespace of its own, so that the linker never merges
// two of them.
namespace scalar {
const Kernels& kernels(DType dtype);
}

}  // namespace bnext::cpu
