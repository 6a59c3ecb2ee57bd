// Which accesses of a kernel are ordered, by CUDA's rules: barriers of a warp, block, cluster and grid; between blocks
// also what comes before a fence and an atomic, for who sees that atomic and then fences. Races are what is left.
#include "runtime.h"

namespace cuda_on_cpu {
namespace {
bool same_warp(const Access& access, const Thread& thread) {
  return access.thread / 32 == thread.warp->number;
}

bool same_cluster(const Access& access, const Block& block) {
  const size_t size = block.cluster->blocks.size();
  return access.block / size == block.number / size;
}

bool covers(const Clocks& clocks, const Cell& cell, const Access& access, Readers readers) {
  if (readers == Readers::one) return clocks[access.thread % 32] >= access.clock;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (cell.reading_lanes >> lane & 1 && clocks[lane] < access.clock) return false;
  return true;
}

bool covers(const Knowledge& knowledge, const Cell& cell, const Access& access, Readers readers) {
  const auto known = knowledge.find(access.block);
  if (known == knowledge.end()) return false;
  if (access.epoch < known->second.before_epoch) return true;
  if (readers > Readers::lanes) return false;
  const auto clocks = known->second.warps.find(access.thread / 32u);
  return clocks != known->second.warps.end() && covers(clocks->second, cell, access, readers);
}

// Whether an access of the cell, by that many readers, comes before what the thread does now.
bool before(const Cell& cell, const Access& access, Readers readers, const Thread& thread) {
  const Block& block = *thread.block;
  if (access.grid_epoch < machine.grid_epoch) return true;
  if (readers == Readers::grid) return false;
  if (same_cluster(access, block) && access.cluster_epoch < block.cluster->epoch) return true;
  if (readers == Readers::cluster) return false;
  if (access.block == block.number) {
    if (access.epoch < block.epoch || (readers == Readers::one && access.thread == thread.number)) return true;
    if (readers <= Readers::lanes && same_warp(access, thread) &&
        covers(thread.warp->clocks[thread.lane], cell, access, readers))
      return true;
  }
  return covers(block.messages.acquired, cell, access, readers) ||
         covers(thread.messages.acquired, cell, access, readers);
}

void record_read(Cell& cell, const Access& now, const Thread& thread) {
  const Access& last = cell.read;
  const uint32_t lane = uint32_t{1} << thread.lane;
  if (!last.present || before(cell, last, cell.readers, thread)) {
    cell.read = now;
    cell.readers = Readers::one;
    cell.reading_lanes = lane;
    return;
  }
  const Readers both = last.block == now.block             ? same_warp(last, thread) ? Readers::lanes : Readers::block
                       : same_cluster(last, *thread.block) ? Readers::cluster
                                                           : Readers::grid;
  // The first of them stands for all: whatever epoch counts for that many readers, they share.
  cell.readers = std::max(cell.readers, both);
  cell.reading_lanes |= lane;
  cell.read.clock = std::max(last.clock, now.clock);
}

void merge(Clocks& into, const Clocks& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}
void merge(Knowledge& into, const Knowledge& from) {
  for (const auto& [block, known] : from) {
    Known& target = into[block];
    target.before_epoch = std::max(target.before_epoch, known.before_epoch);
    for (const auto& [warp, clocks] : known.warps) merge(target.warps[warp], clocks);
  }
}

// Hands to the block what its threads have; at a barrier of all of them.
void gather(Block& block) {
  if (!block.has_messages) return;
  for (Thread* thread : block.threads) {
    if (thread->messages.empty()) continue;
    merge(block.messages, thread->messages);
    thread->messages = {};
  }
  block.has_messages = false;
}
}  // namespace

Access access_of(const Thread& thread, Kind kind, void* program_counter) {
  const Block& block = *thread.block;
  return {.block = block.number,
          .epoch = block.epoch,
          .cluster_epoch = block.cluster->epoch,
          .grid_epoch = machine.grid_epoch,
          .clock = thread.warp->clocks[thread.lane][thread.lane],
          .thread = static_cast<uint16_t>(thread.number),
          .present = true,
          .kind = kind,
          .program_counter = program_counter};
}

const Access* record(Cell& cell, const Access& now, const Thread& thread) {
  const bool both_atomic = now.kind == Kind::atomic && cell.write.kind == Kind::atomic;
  if (cell.write.present && !both_atomic && !before(cell, cell.write, Readers::one, thread)) return &cell.write;
  if (now.kind == Kind::read) {
    record_read(cell, now, thread);
    return nullptr;
  }
  if (cell.read.present && !before(cell, cell.read, cell.readers, thread)) return &cell.read;
  cell = {.write = now, .read = {}, .reading_lanes = 0, .readers = Readers::one, .initialised = true};
  return nullptr;
}

void merge(Messages& into, const Messages& from) {
  merge(into.observed, from.observed);
  merge(into.acquired, from.acquired);
}

void order_block(Block& block) {
  block.epoch++;
  gather(block);
}

void order_cluster(Cluster& cluster) {
  cluster.epoch++;
  Messages all;
  for (auto& block : cluster.blocks) {
    order_block(*block);
    if (!block->messages.empty()) merge(all, block->messages);
  }
  if (all.empty()) return;
  for (auto& block : cluster.blocks) block->messages = all;
}

// Lanes that meet here have made no access between their own clock and the highest of them.
void order_lanes(Warp& warp, unsigned lanes) {
  Clocks joint{};
  Messages messages;
  uint32_t highest = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    merge(joint, warp.clocks[lane]);
    highest = std::max(highest, warp.clocks[lane][lane]);
    const Messages& own = warp.threads[lane]->messages;
    if (!own.empty()) merge(messages, own);
  }
  for (unsigned lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) joint[lane] = highest;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    warp.clocks[lane] = joint;
    warp.clocks[lane][lane] = highest + 1;
    if (!messages.empty()) warp.threads[lane]->messages = messages;
  }
}

void order_fence(Thread& thread) {
  Block& block = *thread.block;
  Messages& own = thread.messages;
  merge(own.acquired, own.observed);
  merge(own.acquired, block.messages.observed);
  own.observed.clear();
  if (!own.empty()) block.has_messages = true;

  Clocks& clocks = thread.warp->clocks[thread.lane];
  thread.released = own.acquired;
  merge(thread.released, block.messages.acquired);
  Known& known = thread.released[block.number];
  known.before_epoch = block.epoch;
  merge(known.warps[thread.warp->number], clocks);
  clocks[thread.lane]++;
}

void order_atomic(Thread& thread, void* location) {
  Knowledge& handed_on = machine.atomics[reinterpret_cast<uintptr_t>(location)];
  if (!handed_on.empty()) {
    merge(thread.messages.observed, handed_on);
    thread.block->has_messages = true;
  }
  merge(handed_on, thread.released);
}
}  // namespace cuda_on_cpu
