// How a problem is laid out on a GPU: what is asked of it, what it has, and what a plan says. Host only, and no CUDA
// header; planner.h chooses.
//
// A slab is what is normalised together: one channel (planar), or `width` packs side by side with all their channels
// (channels_last; planes, where only several planes together are whole packs). A pack is 16 bytes of a tensor, or one
// element where rows do not divide into packs. A slab is cut into `splits`, each the task of one block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>

#include "../params.h"
#include "tuning.h"

namespace bnext::cuda {

inline constexpr int kClusterSizes = 4;  // 2, 4, 8 and 16 blocks

struct Device {
  std::int64_t multiprocessors;
  std::int64_t shared_per_block;           // bytes of shared memory that a block may ask for
  std::int64_t shared_per_multiprocessor;  // bytes
  std::int64_t threads_per_multiprocessor;
  std::int64_t l2;                        // bytes
  std::int64_t bandwidth;                 // bytes a second between the device and its memory
  std::int64_t clustered[kClusterSizes];  // blocks in clusters that run at once, one on a multiprocessor
  bool cooperative;                       // whether a launch may be cooperative
};

// What torch's current CUDA device has; an error in a build without CUDA kernels.
Device current_device();

// Where a training step keeps a slab between the statistics and the normalisation.
enum class Strategy : std::int32_t {
  streaming,  // nowhere: statistics of everything, a grid barrier, then the tensors are read again
  block,      // shared memory of one block
  cluster,    // of the blocks of a cluster, which combine their partial results there
  grid,       // of several blocks of a cooperative launch, which combine them in global memory
  retained,   // of all blocks as much as fits; the rest is read again, from the second-level cache if that holds it
};
inline constexpr Strategy kStrategies[] = {Strategy::streaming, Strategy::block, Strategy::cluster, Strategy::grid,
                                           Strategy::retained};
inline constexpr const char* kStrategyNames[] = {"streaming", "block", "cluster", "grid", "retained"};

inline const char* name(Strategy strategy) {
  return kStrategyNames[static_cast<int>(strategy)];
}
// Nothing of an empty name. Throws std::invalid_argument.
inline std::optional<Strategy> strategy_named(const std::string& text) {
  if (text.empty()) return std::nullopt;
  for (const Strategy strategy : kStrategies)
    if (text == name(strategy)) return strategy;
  throw std::invalid_argument("expected the strategy to be streaming, block, cluster, grid or retained, got " + text);
}

// Bytes of one channel's partial result.
constexpr std::int64_t partial_bytes(bool backward, std::int64_t element) {
  return !backward && element == 8 ? 32 : 16;
}

// What follows the normalisation, by the kernels that there are for it: nothing; ReLU, whose backward computes its
// argument again, or reads the mask; any of Act, chosen at run time.
enum class After : std::int32_t { nothing, relu, relu_of_mask, any };
// Whether ReLU has kernels of its own: for whole packs of elements of so many bytes.
constexpr bool has_relu(bool whole, std::int64_t element) {
  return whole && element < 8;
}

// Numbers that the backward's apply needs of each channel: with those of which it computes the argument again.
constexpr int backward_factors(After after) {
  return after == After::relu || after == After::any ? 5 : 4;
}

// What is asked of the device.
struct Request : Problem {
  bool backward;
  bool training;
  bool reduces;     // sums over the channels are needed
  bool applies;     // output or grad_input is written
  bool cumulative;  // num_batches_tracked is read after it has been incremented
  bool aligned;     // all tensors [N, C, S] start at a multiple of 16 bytes
  Act act = Act::identity;
  bool residual = false;       // is read
  bool masked = false;         // the mask is written, or, by the backward, read
  bool grad_residual = false;  // is written

  std::int64_t tensor() const { return N * C * S * itemsize(dtype); }  // bytes
  std::int64_t mask() const { return masked ? (N * C * S + 7) / 8 : 0; }
  std::int64_t partial() const { return partial_bytes(backward, itemsize(dtype)); }
  // Whether what is read for the statistics is wanted again.
  bool reads_twice() const { return training && reduces && applies; }
  // Whether a backward computes the activation's argument again.
  bool recomputes() const { return backward && act != Act::identity && !masked; }
  // Tensors [N, C, S] that are read for the statistics, or in their place; and all that are written.
  int inputs() const { return !backward ? 1 : 1 + (reduces || recomputes()) + (residual && recomputes()); }
  int outputs() const { return applies + grad_residual; }
  After after(bool whole) const {
    if (act == Act::identity && (backward || !residual)) return After::nothing;
    if (act != Act::relu || !has_relu(whole, itemsize(dtype)) || (backward && residual)) return After::any;
    return backward && masked ? After::relu_of_mask : After::relu;
  }
};

inline constexpr std::int64_t kPackBytes = 16;

inline bool is_aligned(std::initializer_list<const void*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [](const void* t) { return reinterpret_cast<std::uintptr_t>(t) % kPackBytes == 0; });
}
inline Request request(const ForwardParams& p) {
  const bool aligned = is_aligned({p.input, p.output, p.residual});
  return {
      p, false, p.training, p.training, true, p.cumulative, aligned, p.act, p.residual != nullptr, p.mask != nullptr};
}
inline Request request(const BackwardParams& p) {
  const bool aligned = is_aligned({p.grad_output, p.input, p.grad_input, p.residual, p.grad_residual});
  return {p,
          true,
          p.training,
          p.reduces(),
          p.grad_input != nullptr,
          false,
          aligned,
          p.act,
          p.residual && !p.mask,
          p.mask != nullptr,
          p.grad_residual != nullptr};
}

struct Plan {
  Strategy strategy;
  bool whole;          // every pack is 16 bytes wide, aligned, and inside a row (planar) or slab
  bool planes;         // slabs of several planes, of images [C, S] as rows
  bool packs;          // accesses of 16 bytes where a pack lies inside a row (planar; whole implies it)
  std::int64_t width;  // packs side by side in a slab (not planar)
  std::int64_t slabs, splits;
  std::int64_t threads, blocks;
  std::int64_t held;     // slots that each thread keeps on chip
  std::int64_t cluster;  // blocks in a cluster
  bool cooperative;      // the launch has a grid barrier
  int launches;
  std::int64_t shared;         // bytes of shared memory of a block
  std::int64_t scratch;        // bytes of global memory for partial results
  std::int64_t read, written;  // bytes of the tensors [N, C, S] that kernels load and store
  std::int64_t cached;         // of those read, bytes that the second-level cache is expected to have
  bool past_cache;             // it has no room even for them: what is written should leave it first
};

inline constexpr std::int64_t kMaxThreads = 512;
inline constexpr std::int64_t kSystemShared = 1024;              // bytes that the system takes for each block
inline constexpr std::int64_t kMaxTask = std::int64_t{1} << 30;  // slots of a task: they are counted in 32 bits

// What decides how many registers a kernel needs.
struct Kind {
  bool resident, backward, planar, whole;
  std::int64_t element;  // bytes
  After after;
};
// Threads that are sure to be resident on a multiprocessor, by the registers that the kernels' __launch_bounds__ leave
// each: 64, or 128.
constexpr std::int64_t promised_threads(const Kind& k) {
  const bool few = !k.resident && !k.backward && k.planar && k.whole && k.element < 8 && k.after == After::nothing;
  return few ? 1024 : 512;
}
// Slots that a thread loads before it uses them.
constexpr int unroll(const Kind& k) {
  if (k.after == After::any) return 1;
  return k.backward && (k.element == 2 || k.resident) && !(k.planar && k.whole) ? 2 : 4;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
inline std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_div(a, b) * b;
}

// The tensors as matrices, in packs: rows are planes of one channel (planar), of all channels' elements side by side
// (channels_last), or images (planes).
struct View {
  bool planar, whole, planes;
  std::int64_t pack, pack_bytes;  // elements of a pack, and its bytes
  std::int64_t columns;           // of its channels those with sums of their own in a thread
  std::int64_t rows, packs;       // rows of a slab; packs of a row that have slabs of their own
  std::int64_t row;               // elements from one row to the next, of a matrix that is not planar
  std::int64_t row_slots;         // planar: packs that a row touches
  std::int64_t period;            // packs after which a slab may begin: with a channel, and a byte of the mask
  std::int64_t grain;             // planar: slots after which a split may
  std::int64_t S;

  explicit View(const Request& r) : S(r.S) {
    const std::int64_t full = kPackBytes / itemsize(r.dtype);
    // Packs that share a byte of a mask, which is written by neighbours in a warp.
    const std::int64_t unit = r.masked && !r.backward ? std::max<std::int64_t>(full, 8) : full;
    const bool by_channel = r.layout == Layout::planar;
    const auto divides = [&](std::int64_t row) { return r.aligned && row % unit == 0; };
    period = by_channel ? std::lcm(r.S, unit) / full : unit / full;
    // Runs as long as a slab's are read one by one.
    const bool small = !divides(r.S) || r.S * itemsize(r.dtype) < tuning::kWidest;
    planes = by_channel && small && divides(r.C * r.S) && period <= kMaxThreads / 2 && r.C > 1;
    planar = by_channel && !planes;
    whole = planes || divides(planar ? r.S : r.C);
    pack = whole || planar ? full : 1;
    pack_bytes = pack * itemsize(r.dtype);
    columns = planar ? 1 : pack;
    rows = planes || planar ? r.N : r.N * r.S;
    row = planes ? r.C * r.S : r.C;
    packs = planar ? r.C : row / pack;
    row_slots = !planar ? 0 : whole ? r.S / pack : (r.S + 2 * pack - 2) / pack;
    grain = planar && whole ? unit / full : 1;
    if (planar || !whole) period = 1;
  }
  // Channels of a slab.
  std::int64_t channels(std::int64_t width) const { return planar ? 1 : planes ? width * pack / S : width * pack; }
  // What a slab's splits divide: slots (planar) or rows.
  std::int64_t length() const { return planar ? rows * row_slots : rows; }
  std::int64_t chunk(std::int64_t splits) const { return round_up(ceil_div(length(), splits), grain); }
  // Slots that the threads of a block take at once, of those divided things how many.
  std::int64_t step(std::int64_t width, std::int64_t threads) const { return planar ? threads : threads / width; }
};

// Bytes of shared memory that a block needs besides what it holds.
struct Workspace {
  std::int64_t work, sums, factors;  // partial results being combined; the channels' sums, in a cluster for this slab
                                     // and for the next; what applying needs of each channel

  Workspace(const Request& r, const View& v, std::int64_t width, std::int64_t threads, bool cluster) {
    const std::int64_t real = r.dtype == DType::float64 ? 8 : 4, partial = r.partial();
    work = (v.planar ? threads / 32 : std::max(threads / 2, v.planes ? width : 0) * v.columns) * partial;
    sums = v.channels(width) * partial * (cluster ? 2 : 1);
    factors = v.channels(width) * (r.backward ? backward_factors(r.after(v.whole)) : 4) * real;
  }
  std::int64_t total() const { return work + sums + factors; }
};

}  // namespace bnext::cuda
