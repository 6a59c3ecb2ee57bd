// Barriers of blocks, clusters and the grid; operations of warps.
#include "runtime.h"

namespace cuda_on_cpu {
namespace {
const char* name(WarpOperation operation) {
  switch (operation) {
    case WarpOperation::sync:
      return "__syncwarp";
    case WarpOperation::ballot:
    case WarpOperation::all:
    case WarpOperation::any:
      return "warp vote";
    default:
      return "warp shuffle";
  }
}

bool same_line(const Site& a, const Site& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || !strcmp(a.file_name(), b.file_name()));
}

void wait_at(Thread& thread, const char* what, Site site) {
  thread.waits_at = what;
  thread.site = site;
}

// Threads that wait at two source lines are not at one barrier, though a GPU may count them so.
void join(Barrier& barrier, Thread& thread, const char* what, Site site) {
  if (barrier.waiting.empty())
    barrier.site = site;
  else if (!same_line(barrier.site, site))
    fail("divergent barrier: " + describe(thread) + " is at " + what + " " + describe(site) + " while " +
         describe(*barrier.waiting[0]) + " waits at " + describe(barrier.site));
  wait_at(thread, what, site);
  barrier.waiting.push_back(&thread);
}

void release(Barrier& barrier) {
  machine.next.insert(machine.next.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

void check_exited(const Barrier& barrier, size_t exited, size_t threads) {
  if (barrier.waiting.empty() || exited == 0 || barrier.waiting.size() + exited != threads) return;
  const Thread& first = *barrier.waiting[0];
  fail("divergent barrier: " + std::to_string(barrier.waiting.size()) + " threads wait at " + first.waits_at + " " +
       describe(barrier.site) + " (first: " + describe(first) + ") and " + std::to_string(exited) + " have exited");
}

// The lane that this lane of a shuffle reads.
int source_lane(const WarpMeeting& meeting, int lane) {
  const int segment = ~(meeting.width - 1) & 31, first = lane & segment, last = first | (31 & ~segment);
  const int argument = meeting.arguments[lane];
  int source = lane;
  switch (meeting.operation) {
    case WarpOperation::shuffle:
      return first | (argument & ~segment & 31);
    case WarpOperation::shuffle_up:
      source = lane - argument;
      break;
    case WarpOperation::shuffle_down:
      source = lane + argument;
      break;
    default:
      source = lane ^ argument;
  }
  const bool outside = meeting.operation == WarpOperation::shuffle_up ? source < first : source > last;
  return outside ? lane : source;
}

uint64_t shuffled(const WarpMeeting& meeting, const Thread& thread) {
  const int source = source_lane(meeting, static_cast<int>(thread.lane));
  if (!(meeting.arrived >> source & 1))
    fail("warp shuffle at " + describe(meeting.site) + ": " + describe(thread) + " reads lane " +
         std::to_string(source) + ", which does not take part");
  return meeting.values[source];
}

std::string lanes(unsigned mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

void complete_if_all_arrived(Warp& warp, size_t number) {
  WarpMeeting& meeting = warp.meetings[number];
  if (meeting.mask & ~(meeting.arrived | warp.exited)) return;
  if (const unsigned gone = meeting.mask & ~meeting.arrived & ~warp.absent)
    fail("warp divergence: lanes " + lanes(gone) + " have exited but are in the mask of the " +
         name(meeting.operation) + " at " + describe(meeting.site) + ", where lanes " + lanes(meeting.arrived) +
         " wait");
  if (meeting.operation == WarpOperation::sync && kernels_are_checked) order_lanes(warp, meeting.arrived);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (meeting.arrived >> lane & 1) ballot |= static_cast<unsigned>(meeting.values[lane] & 1) << lane;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(meeting.arrived >> lane & 1)) continue;
    Thread& thread = *warp.threads[lane];
    switch (meeting.operation) {
      case WarpOperation::sync:
        break;
      case WarpOperation::ballot:
        thread.result = ballot;
        break;
      case WarpOperation::all:
        thread.result = ballot == meeting.arrived;
        break;
      case WarpOperation::any:
        thread.result = ballot != 0;
        break;
      default:
        thread.result = shuffled(meeting, thread);
    }
    machine.next.push_back(&thread);
  }
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(number));
}

void wait_for_block(Thread& thread, const char* what, Site site) {
  Block& block = *thread.block;
  machine.totals.block_barriers++;
  join(block.barrier, thread, what, site);
  if (block.barrier.waiting.size() == block.threads.size()) {
    for (Thread* waiting : block.barrier.waiting) waiting->result = static_cast<uint64_t>(block.barrier.sum);
    block.barrier.sum = 0;
    order_block(block);
    release(block.barrier);
  } else {
    check_exited(block.barrier, block.exited, block.threads.size());
  }
  reschedule();
}

size_t thread_count(const Cluster& cluster) {
  return cluster.blocks.size() * cluster.blocks[0]->threads.size();
}
}  // namespace

void thread_exits(Thread& thread) {
  Block& block = *thread.block;
  Cluster& cluster = *block.cluster;
  Warp& warp = *thread.warp;
  block.exited++;
  cluster.exited++;
  warp.exited |= 1u << thread.lane;
  for (size_t i = warp.meetings.size(); i-- > 0;) complete_if_all_arrived(warp, i);
  check_exited(block.barrier, block.exited, block.threads.size());
  check_exited(cluster.barrier, cluster.exited, thread_count(cluster));
}

namespace detail {
void sync_threads(Site site) {
  wait_for_block(*machine.current, "__syncthreads", site);
}

int sync_threads_reduce(BlockReduction reduction, bool predicate, Site site) {
  Thread& thread = *machine.current;
  thread.block->barrier.sum += predicate;
  wait_for_block(thread, "__syncthreads with a predicate", site);
  const auto count = static_cast<int>(thread.result);
  switch (reduction) {
    case BlockReduction::any:
      return count != 0;
    case BlockReduction::all:
      return static_cast<size_t>(count) == thread.block->threads.size();
    default:
      return count;
  }
}

void sync_cluster(Site site) {
  Thread& thread = *machine.current;
  Cluster& cluster = *thread.block->cluster;
  machine.totals.cluster_barriers++;
  join(cluster.barrier, thread, "cluster.sync", site);
  if (cluster.barrier.waiting.size() == thread_count(cluster)) {
    order_cluster(cluster);
    release(cluster.barrier);
  } else {
    check_exited(cluster.barrier, cluster.exited, thread_count(cluster));
  }
  reschedule();
}

void sync_grid(Site site) {
  Thread& thread = *machine.current;
  if (!machine.kernel->cooperative) fail("grid.sync in a launch that is not cooperative, at " + describe(site));
  machine.totals.grid_barriers++;
  join(machine.grid_barrier, thread, "grid.sync", site);
  if (machine.grid_barrier.waiting.size() == machine.blocks * thread.block->threads.size()) {
    machine.grid_epoch++;
    for (auto& cluster : machine.clusters) order_cluster(*cluster);
    release(machine.grid_barrier);
  }
  reschedule();
}

uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int argument, int width, Site site) {
  Thread& thread = *machine.current;
  Warp& warp = *thread.warp;
  machine.totals.warp_operations++;
  wait_at(thread, name(operation), site);
  const unsigned lane = 1u << thread.lane;
  if (!(mask & lane))
    fail(std::string(name(operation)) + " at " + describe(site) + ": " + describe(thread) + " is not in its own mask");
  size_t number = warp.meetings.size();
  for (size_t i = 0; i < warp.meetings.size(); ++i) {
    const WarpMeeting& other = warp.meetings[i];
    if (other.mask != mask) continue;  // lanes may meet in part while the rest waits for all
    if (other.operation != operation || other.width != width || !same_line(other.site, site))
      fail("warp divergence: " + describe(thread) + " is at " + name(operation) + " " + describe(site) +
           " while other lanes of its mask wait at " + name(other.operation) + " " + describe(other.site));
    number = i;
  }
  if (number == warp.meetings.size()) {
    WarpMeeting& meeting = warp.meetings.emplace_back();
    meeting.operation = operation;
    meeting.mask = mask;
    meeting.width = width;
    meeting.site = site;
  }
  WarpMeeting& meeting = warp.meetings[number];
  meeting.arrived |= lane;
  meeting.values[thread.lane] = value;
  meeting.arguments[thread.lane] = argument;
  complete_if_all_arrived(warp, number);
  reschedule();
  return thread.result;
}

bool is_cooperative() {
  return machine.kernel->cooperative;
}
unsigned cluster_rank() {
  return machine.current->block->rank;
}
unsigned cluster_size() {
  return static_cast<unsigned>(machine.current->block->cluster->blocks.size());
}

void fence() {
  if (kernels_are_checked) order_fence(*machine.current);
}

void yield() {
  machine.next.push_back(machine.current);
  reschedule();
}
}  // namespace detail
}  // namespace cuda_on_cpu
