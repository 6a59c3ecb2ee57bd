// How a problem is cut up; what each number is, kernels.h says.
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bnext::cpu {
namespace {

// Bytes of this machine's cache of a level, or what is usual where Linux does not say. (sysconf adds up those of a
// whole socket on some machines.)
std::int64_t cache_bytes(int level, std::int64_t usual) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    int found = 0;
    std::int64_t kilobytes = 0;
    std::ifstream(folder + "level") >> found;
    if (found == level && std::ifstream(folder + "size") >> kilobytes && kilobytes > 0) return 1024 * kilobytes;
  }
  return usual;
}
std::int64_t second_level_cache() {
  static const std::int64_t bytes = cache_bytes(2, 1024 * 1024);
  return bytes;
}

constexpr std::int64_t kLongRun = 1024;  // elements that are read and written faster than fewer

}  // namespace

std::int64_t last_level_cache() {
  static const std::int64_t bytes = [] {
    const char* variable = std::getenv("BNEXT_CPU_LLC");
    if (!variable) return cache_bytes(3, 32 * 1024 * 1024);
    char* end = nullptr;
    const std::int64_t bytes = std::strtoll(variable, &end, 10);
    if (end == variable || *end || bytes < 1)
      throw std::invalid_argument("BNEXT_CPU_LLC: expected a positive number of bytes, got " + std::string(variable));
    return bytes;
  }();
  return bytes;
}

Tiling::Tiling(const Problem& p) {
  constexpr std::int64_t kBlock = 8192, kRows = 1024, kChunks = 64, kWorthwhile = 16384;
  const bool planar = p.layout == Layout::planar;
  planes = planar ? p.N : p.N * p.S;
  plane = planar ? p.S : 1;
  if (planar) {
    block_size = kBlock;
  } else {
    // An eighth of all, so that threads have something to share, but enough to be worth the bookkeeping; in multiples
    // of what is summed at once.
    const std::int64_t least = 4 * Row(p.C).repeats, worthwhile = std::max(planes / 8, kWorthwhile / p.C);
    block_size = std::max(least, std::min(kRows, worthwhile) / least * least);
  }
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

Row::Row(std::int64_t C) : C(C), repeats(1) {
  constexpr std::int64_t kAtOnce = 32, kFew = 64, kMany = 4096;  // columns
  const std::int64_t whole = kAtOnce / std::gcd(kAtOnce, C);
  if (whole * C <= kMany) repeats = whole;
  while (width() < kFew) repeats *= 2;
}

std::int64_t group_channels(const Problem& p, bool reduces, bool applies, int tensors, int threads) {
  constexpr std::int64_t kLeast = 384 * 1024;  // bytes, however small caches are
  const bool feeds_threads = p.C >= 4 * static_cast<std::int64_t>(threads);
  if (!reduces || !applies || p.layout != Layout::planar || !feeds_threads) return 0;
  // So much that a core's own cache holds it and most of the next group; and more, up to a share of the last cache,
  // where that is no long run of memory.
  const std::int64_t own = std::max(second_level_cache() * 3 / 8, kLeast);
  const std::int64_t share = last_level_cache() / std::max(16, 2 * threads);
  const std::int64_t channel = tensors * p.count() * itemsize(p.dtype), long_run = (kLongRun + p.S - 1) / p.S;
  return std::max<std::int64_t>({1, own / channel, std::min(long_run, share / channel)});
}

bool exceeds_caches(const Problem& p, int passes) {
  return 2 * passes * p.C * p.count() * itemsize(p.dtype) > last_level_cache();
}

bool streams(const Problem& p, std::int64_t group, int passes) {
  constexpr std::int64_t kPlane = 32;  // elements
  if (!exceeds_caches(p, passes)) return false;
  if (p.layout == Layout::channels_last) return Row(p.C).width() * itemsize(p.dtype) % kLine == 0;
  return p.S >= kPlane && (group ? group : p.C) * p.S >= kLongRun;
}

}  // namespace bnext::cpu
