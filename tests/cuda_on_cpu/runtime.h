// What the files of the runtime share. None of them is compiled with -fsanitize=thread.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <random>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {
struct Block;
struct Cluster;
struct Warp;

// ---- order of accesses (order.cpp; used in a checked build only) --------------------------------------------------

// What is known of a block's accesses: all up to a barrier, and more of some warps, lane by lane. A lane's clock ticks
// at __syncwarp and __threadfence, a block's epoch at __syncthreads and at what implies it.
using Clocks = std::array<uint32_t, 32>;
struct Known {
  uint32_t before_epoch = 0;
  std::map<unsigned, Clocks> warps;
};
using Knowledge = std::map<uint32_t, Known>;  // by block

// Ordering between blocks that are not at a common barrier: fence, atomic, atomic, fence.
struct Messages {
  Knowledge observed;  // by atomics; counts only after a fence
  Knowledge acquired;
  bool empty() const { return observed.empty() && acquired.empty(); }
};

enum class Kind : uint8_t { read, write, atomic };

struct Access {
  uint32_t block, epoch, cluster_epoch, grid_epoch, clock;
  uint16_t thread;
  bool present;
  Kind kind;
  void* program_counter;
  bool operator==(const Access&) const = default;
};
enum class Readers : uint8_t { one, lanes, block, cluster, grid };

// Shadow of one byte: the last write, and the reads since that are not ordered among themselves. All zero: untouched.
struct Cell {
  Access write, read;
  uint32_t reading_lanes;
  Readers readers;
  bool initialised;
  bool operator==(const Cell&) const = default;
};

// ---- threads and those they wait with -----------------------------------------------------------------------------

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned number = 0, lane = 0;  // number: in the block
  uint3 index{};
  bool done = false;
  const char* waits_at = nullptr;
  Site site{};
  uint64_t result = 0;  // of the barrier or warp operation it waited at
  Messages messages;
  Knowledge released;  // what its last fence covers
};

struct Barrier {
  std::vector<Thread*> waiting;
  Site site{};
  int sum = 0;  // of predicates
};

struct WarpMeeting {
  WarpOperation operation;
  unsigned mask, arrived;
  int width;
  Site site;
  uint64_t values[32];
  int arguments[32];
};

struct Warp {
  unsigned number = 0;
  Thread* const* threads = nullptr;  // its first lane's place in the block's
  unsigned exited = 0, absent = 0;   // absent: lanes beyond the block's last thread; they count as exited
  std::vector<WarpMeeting> meetings;
  uint64_t order_round = 0, order_key = 0;  // of schedule warp
  std::array<Clocks, 32> clocks;            // clocks[a][b]: what lane a knows of lane b's
};

struct Block {
  unsigned number = 0, rank = 0, slot = 0;  // rank: in the cluster
  size_t exited = 0;
  uint3 index{};
  Cluster* cluster = nullptr;
  char* shared = nullptr;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  bool finished = false;
  uint32_t epoch = 1;
  uint32_t mapped_epoch = 0;  // the cluster's epoch in which another block last used this one's shared memory
  bool has_messages = false;
  Messages messages;  // what all its threads have from earlier epochs
  std::vector<Cell> dynamic_cells, static_cells;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
  size_t exited = 0;
  uint32_t epoch = 1;
};

// ---- the launch under way -----------------------------------------------------------------------------------------

constexpr size_t slot_size = 512 * 1024, static_offset = 256 * 1024, static_limit = 48 * 1024;
constexpr size_t static_span = 2 * static_limit;  // with the gaps between variables
constexpr size_t stack_size = 64 * 1024;

struct StaticVariable {
  const void* key;
  size_t offset, size;
};

struct Range {
  uintptr_t begin, end;
  RangeStats stats;
  std::vector<char> initialised;  // by byte; empty: all of it
  std::vector<Cell> cells;        // empty: untouched in this launch
};

struct Machine {
  Config config;
  Totals totals{};
  std::string error;
  bool failed = false;
  const detail::Kernel* kernel = nullptr;
  Thread* current = nullptr;
  void* host_stack_pointer = nullptr;
  std::vector<Thread*> round, next;  // those that run in turn; those that will
  size_t position = 0;               // in round
  std::mt19937_64 random;
  uint64_t rounds = 0;
  std::vector<std::unique_ptr<Cluster>> clusters;
  char* pool = nullptr;
  std::vector<Block*> slots;  // whose each slot of the pool is
  std::vector<unsigned> free_slots;
  std::vector<StaticVariable> static_variables;
  size_t static_used = 0, static_bytes = 0;  // with and without gaps
  size_t blocks = 0, live_blocks = 0;        // of the grid; not finished
  Barrier grid_barrier;
  uint32_t grid_epoch = 1;
  std::vector<Range> ranges;
  std::map<uintptr_t, Knowledge> atomics;  // what each location hands on
};
extern Machine machine;
extern bool kernels_are_checked;

// ---- fibers.cpp ---------------------------------------------------------------------------------------------------

void prepare_fiber(Thread&);  // so that resuming it calls run_thread()
void resume_from_host(Thread&);
void reschedule();  // leaves the running thread for the next ready one, or for the host
char* new_stack();
[[noreturn]] void fail(const std::string& message);  // ends the launch; its fibers are abandoned

// ---- shared_memory.cpp --------------------------------------------------------------------------------------------

bool reserve_pool(size_t blocks);
void poison(Block&);

// ---- launch.cpp, sync.cpp -----------------------------------------------------------------------------------------

void run_thread();
void thread_exits(Thread&);  // to those who wait for it
std::string describe(const Thread&);
std::string describe(const Site&);

// ---- check.cpp, order.cpp -----------------------------------------------------------------------------------------

void forget_accesses();  // those of the last launch
std::string source_line(void* program_counter);
// The access that this one races with, or null; and keeps this one.
const Access* record(Cell&, const Access& now, const Thread&);
Access access_of(const Thread&, Kind, void* program_counter);
void merge(Messages& into, const Messages& from);
void order_block(Block&);  // all that its threads did before what they do next
void order_cluster(Cluster&);
void order_lanes(Warp&, unsigned lanes);
void order_fence(Thread&);
void order_atomic(Thread&, void* location);
}  // namespace cuda_on_cpu
