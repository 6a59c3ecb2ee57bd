// A launch from its configuration to its last block: which blocks are resident, and who runs next.
#include "runtime.h"

namespace cuda_on_cpu {
Machine machine;

namespace {
std::vector<std::unique_ptr<Thread>> idle_threads;  // with their stacks

cudaError_t refuse(cudaError_t error, const char* message) {
  machine.error = message;
  return error;
}

size_t threads_per_block() {
  const dim3& block = machine.kernel->block;
  return size_t{block.x} * block.y * block.z;
}

uint3 index_of(unsigned number, const dim3& extent) {
  return {number % extent.x, number / extent.x % extent.y, number / extent.x / extent.y};
}

Thread* new_thread() {
  if (idle_threads.empty()) {
    auto thread = std::make_unique<Thread>();
    thread->stack = new_stack();
    return thread.release();
  }
  Thread* thread = idle_threads.back().release();
  idle_threads.pop_back();
  char* stack = thread->stack;
  *thread = Thread{};
  thread->stack = stack;
  return thread;
}

void add_warps(Block& block) {
  const size_t threads = block.threads.size();
  block.warps.resize((threads + 31) / 32);
  for (unsigned i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.number = i;
    warp.threads = &block.threads[i * size_t{32}];
    if (!kernels_are_checked) continue;
    warp.clocks = {};
    for (size_t lane = 0; lane < 32; ++lane) warp.clocks[lane][lane] = 1;
  }
  if (threads % 32) block.warps.back().exited = block.warps.back().absent = ~0u << (threads % 32);
}

void add_threads(Block& block) {
  block.threads.resize(threads_per_block());
  for (unsigned i = 0; i < block.threads.size(); ++i) {
    Thread& thread = *(block.threads[i] = new_thread());
    thread.block = &block;
    thread.number = i;
    thread.lane = i % 32;
    thread.index = index_of(i, machine.kernel->block);
    prepare_fiber(thread);
  }
  add_warps(block);
  for (Thread* thread : block.threads) thread->warp = &block.warps[thread->number / 32];
  if (machine.config.schedule == "rev")
    machine.next.insert(machine.next.end(), block.threads.rbegin(), block.threads.rend());
  else
    machine.next.insert(machine.next.end(), block.threads.begin(), block.threads.end());
}

void add_block(Cluster& cluster, unsigned number) {
  const detail::Kernel& kernel = *machine.kernel;
  auto owned = std::make_unique<Block>();
  Block& block = *owned;
  block.number = number;
  block.rank = static_cast<unsigned>(cluster.blocks.size());
  block.cluster = &cluster;
  block.index = index_of(number, kernel.grid);
  block.slot = machine.free_slots.back();
  machine.free_slots.pop_back();
  machine.slots[block.slot] = &block;
  block.shared = machine.pool + block.slot * slot_size;
  poison(block);
  if (kernels_are_checked) {
    block.dynamic_cells.resize(kernel.shared);
    block.static_cells.resize(machine.static_used);
  }
  add_threads(block);
  machine.totals.blocks++;
  machine.totals.threads += block.threads.size();
  cluster.blocks.push_back(std::move(owned));
}

void remove_block(Block& block) {
  for (Thread* thread : block.threads) idle_threads.emplace_back(thread);
  machine.slots[block.slot] = nullptr;
  machine.free_slots.push_back(block.slot);
}

void remove_clusters(bool all) {
  std::erase_if(machine.clusters, [all](const std::unique_ptr<Cluster>& cluster) {
    const auto finished = [](const std::unique_ptr<Block>& block) { return block->finished; };
    if (!all && !std::all_of(cluster->blocks.begin(), cluster->blocks.end(), finished)) return false;
    for (const auto& block : cluster->blocks) remove_block(*block);
    return true;
  });
}

void shuffle_warps() {
  machine.rounds++;
  for (const Thread* thread : machine.round) {
    Warp& warp = *thread->warp;
    if (warp.order_round == machine.rounds) continue;
    warp.order_round = machine.rounds;
    warp.order_key = machine.random();
  }
  std::stable_sort(machine.round.begin(), machine.round.end(),
                   [](const Thread* a, const Thread* b) { return a->warp->order_key < b->warp->order_key; });
}

void next_round() {
  machine.round.swap(machine.next);
  machine.next.clear();
  machine.position = 0;
  if (machine.config.schedule == "rand") std::shuffle(machine.round.begin(), machine.round.end(), machine.random);
  if (machine.config.schedule == "warp") shuffle_warps();
}

void report_deadlock() {
  std::string message = "deadlock:";
  size_t waiting = 0;
  for (const auto& cluster : machine.clusters)
    for (const auto& block : cluster->blocks)
      for (const Thread* thread : block->threads)
        if (!thread->done && waiting++ < 4)
          message += " " + describe(*thread) + " waits at " + thread->waits_at + " " + describe(thread->site) + ";";
  machine.failed = true;
  machine.error = message + " " + std::to_string(waiting) + " threads wait";
}

// First blocks of all clusters, in the order in which they start.
std::vector<unsigned> starting_order(unsigned cluster_size) {
  std::vector<unsigned> order(machine.blocks / cluster_size);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i) * cluster_size;
  if (machine.config.schedule == "rand") std::shuffle(order.begin(), order.end(), machine.random);
  if (machine.config.schedule == "rev") std::reverse(order.begin(), order.end());
  return order;
}

void start_over(const detail::Kernel& kernel, size_t resident) {
  machine.free_slots.clear();
  for (size_t i = resident; i-- > 0;) machine.free_slots.push_back(static_cast<unsigned>(i));
  machine.static_variables.clear();
  machine.static_used = machine.static_bytes = 0;
  machine.grid_barrier = {};
  machine.grid_epoch = 1;
  machine.random.seed(machine.config.seed);
  machine.round.clear();
  machine.next.clear();
  machine.position = 0;
  blockDim = kernel.block;
  gridDim = kernel.grid;
  forget_accesses();
}

void run_blocks(unsigned cluster_size) {
  const std::vector<unsigned> order = starting_order(cluster_size);
  for (size_t started = 0; started < order.size() || !machine.clusters.empty();) {
    while (started < order.size() && machine.free_slots.size() >= cluster_size) {
      Cluster& cluster = *machine.clusters.emplace_back(std::make_unique<Cluster>());
      for (unsigned rank = 0; rank < cluster_size; ++rank) add_block(cluster, order[started] + rank);
      started++;
    }
    next_round();
    if (machine.round.empty()) {
      report_deadlock();
      return;
    }
    resume_from_host(*machine.round[machine.position++]);
    if (machine.failed) return;
    remove_clusters(false);
  }
}
}  // namespace

std::string describe(const Thread& thread) {
  const auto text = [](const uint3& i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  return "block " + text(thread.block->index) + " thread " + text(thread.index);
}

std::string describe(const Site& site) {
  const char* slash = strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

void run_thread() {
  machine.kernel->run(machine.kernel->arguments);
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  thread.done = true;
  thread_exits(thread);
  if (block.exited == block.threads.size()) {
    if (block.mapped_epoch == block.cluster->epoch)
      fail("the block of " + describe(thread) +
           " exits with no cluster.sync after another block mapped its shared memory");
    block.finished = true;
    if (block.cluster->blocks.size() > 1) poison(block);  // others may read no value of this block's any more
  }
  reschedule();
  abort();
}

Config& config() {
  return machine.config;
}
void configure(const std::string& schedule, unsigned seed, bool check) {
  machine.config.schedule = schedule;
  machine.config.seed = seed;
  machine.config.check = check;
}
bool checked_build() {
  return kernels_are_checked;
}
const char* last_error() {
  return machine.error.c_str();
}
const Totals& totals() {
  return machine.totals;
}

namespace detail {
cudaError_t launch(const Kernel& kernel) {
  const Config& config = machine.config;
  machine.kernel = &kernel;
  machine.failed = false;
  machine.error.clear();
  machine.totals.launches++;
  const size_t threads = threads_per_block(), warps = (threads + 31) / 32;
  const unsigned cluster = std::max(kernel.cluster, 1u);
  machine.blocks = size_t{kernel.grid.x} * kernel.grid.y * kernel.grid.z;
  if (config.schedule != "fwd" && config.schedule != "rev" && config.schedule != "rand" && config.schedule != "warp")
    return refuse(cudaErrorInvalidValue, "no such schedule");
  if (threads == 0 || threads > 1024 || kernel.block.z > 64 || machine.blocks == 0 || kernel.grid.y > 65535 ||
      kernel.grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "invalid dimensions of the grid or the block");
  if (kernel.shared > std::min(config.shared_limit, static_offset))
    return refuse(cudaErrorInvalidValue, "too much dynamic shared memory");
  if (cluster > config.max_cluster || kernel.grid.x % cluster)
    return refuse(cudaErrorInvalidClusterSize, "invalid cluster size");
  if (kernel.cooperative && machine.blocks > size_t{config.num_sms} * (2048 / (warps * 32)))
    return refuse(cudaErrorCooperativeLaunchTooLarge, "the blocks of a cooperative launch cannot all be resident");
  const size_t resident =
      kernel.cooperative ? machine.blocks : std::max(config.resident_blocks / cluster, 1u) * size_t{cluster};
  if (!reserve_pool(resident)) return refuse(cudaErrorMemoryAllocation, "no memory for shared memory");
  start_over(kernel, resident);
  run_blocks(cluster);
  remove_clusters(true);
  return machine.failed ? cudaErrorLaunchFailure : cudaSuccess;
}
}  // namespace detail
}  // namespace cuda_on_cpu
