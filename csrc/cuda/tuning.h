// Numbers that the planner weighs strategies by. None of them has been measured yet: each says where it comes from, and
// make gpu-check measures every strategy on every layer, from which they are to be set.
#pragma once

namespace bnext::cuda::tuning {

// Contiguous bytes of a row that a slab has, at most and where narrower ones would fit better: not measured; memory is
// read in sectors of 32 bytes, and by 64 where both are missing.
constexpr int kWidest = 512, kNarrowest = 64;

// Microseconds in which a block neither loads nor stores, from its last load to its first store, and on to its first
// load: not measured; a handful of latencies of shared memory and of memory (0.6 us, public microbenchmarks of H100).
// Two blocks on a multiprocessor hide each other's, if they do not wait for each other.
constexpr double kBlockPause = 1.0;
// The same with a cluster's barrier between: not measured; 0.2 us a barrier, and blocks that wait for the slowest.
constexpr double kClusterPause = 1.6;
// With a barrier through global memory: not measured; two round trips of 0.7 us to the second-level cache.
constexpr double kGridPause = 3.0;

// Microseconds in which a thread takes one more partial result: not measured; a load from the second-level cache that
// is on its way already, and Chan's formula with its division.
constexpr double kGather = 0.06;

// A device with this share of its multiprocessors busy already uses all of its memory's bandwidth: not measured.
constexpr double kSaturation = 0.6;

// Share of the second-level cache that can be counted on to keep what was read: not measured; of H100's two halves,
// each may keep a copy of the other's lines.
constexpr double kCacheShare = 0.5;
// What a byte costs that it has, against one from memory: not measured; public microbenchmarks of H100 give 5.5 TB/s.
constexpr double kCachePrice = 0.4;

}  // namespace bnext::cuda::tuning
