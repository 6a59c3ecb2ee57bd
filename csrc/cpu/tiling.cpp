// How a problem is cut up; what each number is, kernels.h says.
#include "kernels.h"

namespace bnext::cpu {

Tiling::Tiling(const Problem& p) {
  constexpr std::int64_t kBlock = 2048, kRows = 512, kChunks = 64;
  const bool planar = p.layout == Layout::planar;
  planes = planar ? p.N : p.N * p.S;
  plane = planar ? p.S : 1;
  block_size = planar ? kBlock : kRows;
  planes_per_block = std::max<std::int64_t>(1, block_size / plane);
  blocks_per_plane = (plane + block_size - 1) / block_size;
  blocks = blocks_per_plane > 1 ? planes * blocks_per_plane : (planes + planes_per_block - 1) / planes_per_block;
  chunks = std::min(blocks, kChunks);
}

Tiling::Block Tiling::block(std::int64_t b) const {
  if (blocks_per_plane > 1) {
    const std::int64_t n = b / blocks_per_plane, begin = b % blocks_per_plane * block_size;
    return {n, n + 1, begin, std::min(begin + block_size, plane)};
  }
  return {b * planes_per_block, std::min((b + 1) * planes_per_block, planes), 0, plane};
}

std::int64_t Tiling::chunk_count(std::int64_t chunk) const {
  const auto values_before = [&](std::int64_t b) {
    return blocks_per_plane > 1 ? b / blocks_per_plane * plane + b % blocks_per_plane * block_size
                                : std::min(b * planes_per_block, planes) * plane;
  };
  return values_before(chunk_begin(chunk + 1)) - values_before(chunk_begin(chunk));
}

std::int64_t group_channels(const Problem& p, bool reduces, bool applies, int threads) {
  constexpr std::int64_t kGroupBytes = 256 * 1024;  // fits most second-level caches
  const bool feeds_threads = p.C >= 4 * static_cast<std::int64_t>(threads);
  if (!reduces || !applies || p.layout != Layout::planar || !feeds_threads) return 0;
  return std::max<std::int64_t>(1, kGroupBytes / (p.count() * itemsize(p.dtype)));
}

}  // namespace bnext::cpu
