// The choice of a plan: a pure function of the problem and the device, so that every choice can be seen and tested
// without one.
#pragma once

#include <cstdlib>
#include <optional>

#include "plan.h"

namespace bnext::cuda {

class Planner {
 public:
  Planner(const Request& request, const Device& device) : r(request), d(device), v(request) {}

  // The plan that is expected to take the least time.
  Plan plan() const {
    Plan best = streaming();
    for (const Strategy strategy : kStrategies) {
      const std::optional<Plan> p = plan(strategy);
      if (p && microseconds(*p) < microseconds(best)) best = *p;
    }
    return best;
  }

  // The same of one strategy, if it is possible.
  std::optional<Plan> plan(Strategy strategy) const {
    if (strategy == Strategy::streaming) return streaming();
    const bool grid = strategy == Strategy::grid || strategy == Strategy::retained;
    if (!r.reads_twice() || ((grid || r.cumulative) && !d.cooperative)) return std::nullopt;
    if (strategy == Strategy::cluster && r.cumulative) return std::nullopt;  // a launch that is cooperative as well
    std::optional<Plan> best;
    const auto consider = [&](const std::optional<Plan>& p) {
      if (p && (!best || microseconds(*p) < microseconds(*best))) best = p;
    };
    for (const std::int64_t blocks : {2, 1}) {  // on a multiprocessor
      for (std::int64_t width = widest(); width > 0; width = narrower(width)) {
        if (strategy == Strategy::cluster) {
          for (int i = 0; i < kClusterSizes; ++i)
            consider(held(strategy, width, blocks, std::int64_t{2} << i, d.clustered[i]));
        } else {
          const std::int64_t splits = strategy == Strategy::block  ? 1
                                      : strategy == Strategy::grid ? grid_splits(width, blocks)
                                                                   : d.multiprocessors * blocks;
          consider(held(strategy, width, blocks, splits, d.multiprocessors));
        }
      }
    }
    return best;
  }

  // Statistics and results in one launch with a grid barrier, or in two; or one of both alone.
  Plan streaming() const {
    Plan best = streaming(widest());
    for (std::int64_t width = narrower(best.width); width > 0; width = narrower(width)) {
      const Plan p = streaming(width);
      if (microseconds(p) < microseconds(best)) best = p;
    }
    return best;
  }

  // An estimate, from what goes through memory and the cache, how evenly the multiprocessors are busy, and what the
  // barriers cost (tuning.h).
  double microseconds(const Plan& p) const {
    const std::int64_t tasks = p.slabs * p.splits, rounds = ceil_div(tasks, p.blocks);
    const double uneven = static_cast<double>(rounds * p.blocks) / static_cast<double>(tasks);
    const double busy = static_cast<double>(std::min(p.blocks, d.multiprocessors)) /
                        (tuning::kSaturation * static_cast<double>(d.multiprocessors));
    // Every task takes the partial results of all splits, a thread or a few for each channel one after the other.
    const std::int64_t channels = v.channels(p.width), taken = r.reduces && p.splits > 1 ? p.splits : 0;
    const std::int64_t in_turn = ceil_div(taken, std::max<std::int64_t>(1, p.threads / channels));
    const double bytes = static_cast<double>(p.read + p.written - p.cached) +
                         tuning::kCachePrice * static_cast<double>(p.cached + tasks * taken * channels * r.partial());
    const double pause = p.strategy == Strategy::block     ? tuning::kBlockPause
                         : p.strategy == Strategy::cluster ? tuning::kClusterPause
                                                           : tuning::kGridPause;
    const bool streams = p.strategy == Strategy::streaming, hides = p.threads < kMaxThreads && p.blocks > p.splits;
    const double pauses = streams ? (r.reduces ? 1.0 : 0.0) : static_cast<double>(rounds) * (hides ? 0.5 : 1.0);
    return bytes * 1e6 / (static_cast<double>(d.bandwidth) * std::min(1.0, busy)) * uneven + pause * pauses +
           tuning::kGather * static_cast<double>(rounds * in_turn);
  }

 private:
  Plan streaming(std::int64_t most) const {
    Plan p = common(Strategy::streaming);
    p.threads = kMaxThreads / 2;
    p.slabs = ceil_div(v.packs, most);
    p.width = round_up(ceil_div(v.packs, p.slabs), v.period);
    p.shared = Workspace(r, v, p.width, p.threads, false).total();
    p.splits = streaming_splits(p);
    p.blocks = std::min(p.slabs * p.splits, streaming_capacity(p));
    p.cooperative = r.reduces && d.cooperative;
    p.launches = r.reduces && !d.cooperative ? 2 : 1;
    p.scratch = r.reduces ? p.splits * r.C * r.partial() : 0;
    if (r.reads_twice()) again(p, first(), first());
    return p;
  }

  // What all plans have in common.
  Plan common(Strategy strategy) const {
    Plan p{};
    p.strategy = strategy;
    p.whole = v.whole;
    p.planes = v.planes;
    p.packs = r.aligned;
    p.cluster = p.launches = 1;
    p.read = first() + (!r.backward && r.residual ? r.tensor() : 0);
    p.written = r.outputs() * r.tensor() + (r.backward ? 0 : r.mask());
    return p;
  }
  // Bytes that are read for the statistics.
  std::int64_t first() const { return r.inputs() * r.tensor() + (r.backward ? r.mask() : 0); }
  // These bytes are read again, of `before` since they were read first: newest first, so that the cache still has them.
  void again(Plan& p, std::int64_t bytes, std::int64_t before) const {
    const double kept = tuning::kCacheShare * static_cast<double>(d.l2) / static_cast<double>(before);
    p.read += bytes;
    p.cached = static_cast<std::int64_t>(static_cast<double>(bytes) * std::min(1.0, kept));
    p.past_cache = kept < 1;
  }

  Kind kind(bool resident) const {
    return {resident, r.backward, v.planar, v.whole, itemsize(r.dtype), r.after(v.whole)};
  }

  // Packs of a slab: contiguous bytes about as many as tuning.h says.
  std::int64_t widest() const {
    if (v.planar) return 1;
    const std::int64_t most = std::clamp<std::int64_t>(tuning::kWidest / v.pack_bytes, 1, kMaxThreads / 4);
    return std::min(round_up(v.packs, v.period), std::max<std::int64_t>(1, most / v.period) * v.period);
  }
  // The next width to try, or 0.
  std::int64_t narrower(std::int64_t width) const {
    const std::int64_t next = width / 2 / v.period * v.period;
    return next * v.pack_bytes >= tuning::kNarrowest ? next : 0;
  }

  // Bytes of one of what splits divide, in all tensors; and how many a block has room for besides its working memory.
  std::int64_t unit(std::int64_t width) const { return r.inputs() * width * v.pack_bytes; }
  std::int64_t room(std::int64_t width, std::int64_t blocks, std::int64_t working) const {
    const std::int64_t limit = std::min(d.shared_per_block, d.shared_per_multiprocessor / blocks - kSystemShared);
    return (limit - working) / unit(width) / v.grain * v.grain;
  }

  // A plan that keeps slabs in shared memory, with so many blocks on each multiprocessor that can be had; nothing, if a
  // slab does not fit, or, retained, if it does.
  std::optional<Plan> held(Strategy strategy, std::int64_t width, std::int64_t blocks, std::int64_t splits,
                           std::int64_t multiprocessors) const {
    const bool cluster = strategy == Strategy::cluster, retained = strategy == Strategy::retained;
    Plan p = common(strategy);
    p.width = width;
    p.threads = kMaxThreads / blocks;
    if (!cluster && splits > 0) splits = used(splits);
    p.splits = splits;
    p.slabs = ceil_div(v.packs, width);
    const std::int64_t groups = splits > 0 ? std::min(p.slabs, multiprocessors * blocks / splits) : 0;
    if (groups == 0 || (splits == 1) != (strategy == Strategy::block)) return std::nullopt;
    p.blocks = groups * splits;
    p.cluster = cluster ? splits : 1;
    p.cooperative = r.cumulative || !(cluster || strategy == Strategy::block);
    if (p.cooperative && splits > 1)
      p.scratch = splits * r.C * r.partial() + groups * static_cast<std::int64_t>(sizeof(int));

    const std::int64_t step = v.step(width, p.threads), chunk = v.chunk(splits);
    if (chunk * width >= kMaxTask || (splits > 1 && chunk < step)) return std::nullopt;
    const std::int64_t working = Workspace(r, v, width, p.threads, cluster).total(),
                       room = this->room(width, blocks, working);
    if (retained == (chunk <= room)) return std::nullopt;
    p.held = ceil_div(chunk, step);
    // Of a backward whose gradient of the activation's argument is exact, that is kept, and needs no mask again.
    const bool gates = kind(true).after != After::any;
    const std::int64_t mask = r.backward ? r.mask() : 0;
    if (retained) {
      const std::int64_t at_once = unroll(kind(true));
      p.held = room / (step * at_once) * at_once;
      if (p.held <= 0) return std::nullopt;
      const std::int64_t kept = p.held * step, last = v.length() % chunk;
      const std::int64_t rest = v.length() / chunk * (chunk - kept) + std::max<std::int64_t>(0, last - kept);
      const double share = static_cast<double>(rest) / static_cast<double>(v.length());
      const std::int64_t missing = rest * (r.inputs() * r.tensor() / v.length()) +
                                   (gates ? static_cast<std::int64_t>(share * static_cast<double>(mask)) : 0);
      again(p, missing, missing / p.slabs);
    }
    if (!gates) p.read += mask;
    p.shared = round_up(std::min(chunk, p.held * step) * unit(width), kPackBytes) + working;
    return p;
  }

  // The splits with which the device is full of groups of blocks that hold a slab each; 0 if it cannot hold one.
  std::int64_t grid_splits(std::int64_t width, std::int64_t blocks) const {
    const std::int64_t threads = kMaxThreads / blocks, capacity = d.multiprocessors * blocks;
    const std::int64_t room = this->room(width, blocks, Workspace(r, v, width, threads, false).total());
    if (room <= 0) return 0;
    const std::int64_t least = ceil_div(v.length(), room), slabs = ceil_div(v.packs, width);
    if (least > capacity) return 0;
    const std::int64_t groups = std::min(slabs, capacity / least), even = ceil_div(slabs, ceil_div(slabs, groups));
    const std::int64_t most = std::max<std::int64_t>(1, v.length() / v.step(width, threads));
    return std::clamp(capacity / even, least, std::max(least, most));
  }

  // Blocks of a streaming kernel that are resident at once.
  std::int64_t streaming_capacity(const Plan& p) const {
    const std::int64_t by_threads = std::min(promised_threads(kind(false)), d.threads_per_multiprocessor) / p.threads;
    const std::int64_t by_shared = d.shared_per_multiprocessor / (p.shared + kSystemShared);
    return d.multiprocessors * std::max<std::int64_t>(1, std::min(by_threads, by_shared));
  }

  // The fewest splits that keep the device about as busy as any number does: tasks are a whole number of waves, or
  // nearly.
  std::int64_t streaming_splits(const Plan& p) const {
    const std::int64_t slots = v.length() * p.width, blocks = streaming_capacity(p);
    const std::int64_t at_once = v.step(p.width, p.threads) * p.width;
    const std::int64_t least = ceil_div(slots, kMaxTask),
                       most = std::max(least, slots / (at_once * unroll(kind(false))));
    const auto time = [&](std::int64_t s) {
      return static_cast<double>(ceil_div(p.slabs * s, blocks)) / static_cast<double>(s);
    };
    std::int64_t best = least;
    for (std::int64_t waves = 1; waves <= 8; ++waves) {
      const std::int64_t s = std::clamp(waves * blocks / p.slabs, least, most);
      if (time(s) < 0.95 * time(best)) best = s;
    }
    return used(best);
  }
  // Of so many splits of equal length, those that have any.
  std::int64_t used(std::int64_t splits) const { return ceil_div(v.length(), v.chunk(splits)); }

  const Request r;
  const Device d;
  const View v;
};

// What BNEXT_CUDA_STRATEGY says when it is first asked. Throws std::invalid_argument for a name that is none.
inline std::optional<Strategy> forced_strategy() {
  static const std::optional<Strategy> forced = [] {
    const char* const name = std::getenv("BNEXT_CUDA_STRATEGY");
    return strategy_named(name ? name : "");
  }();
  return forced;
}

// forced: the strategy to take wherever it is possible.
inline Plan make_plan(const Request& request, const Device& device, std::optional<Strategy> forced) {
  const Planner planner(request, device);
  const std::optional<Plan> plan = forced ? planner.plan(*forced) : std::nullopt;
  return plan ? *plan : planner.plan();
}

}  // namespace bnext::cuda
