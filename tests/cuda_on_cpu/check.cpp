// What a checked build sees: the compiler calls __tsan_* at every access of an instrumented source, and these
// functions, in place of libtsan's, look at the memory that it goes to.
#include <dlfcn.h>
#include <link.h>

#include "runtime.h"

namespace cuda_on_cpu {
bool kernels_are_checked;  // set by the constructors of instrumented sources, before ours

namespace {
struct Use {
  uintptr_t address;
  size_t bytes;
  Kind kind;
  void* program_counter;
};

const char* noun(Kind kind) {
  return kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic";
}

std::string by_whom(const Use& use) {
  return " by " + describe(*machine.current) + " at " + source_line(use.program_counter);
}

std::string sized(const Use& use) {
  return std::to_string(use.bytes) + "-byte " + noun(use.kind);
}

void report_race(const Use& use, const Access& earlier, const std::string& memory) {
  fail("race on " + memory + ": the " + noun(use.kind) + by_whom(use) + " is not ordered after the " +
       noun(earlier.kind) + " by block " + std::to_string(earlier.block) + " thread " + std::to_string(earlier.thread) +
       " at " + source_line(earlier.program_counter));
}

// Bytes of one access mostly have the same history, which is then judged once.
void record_all(Cell* cells, const Use& use, const char* space, const std::string& name) {
  const Thread& thread = *machine.current;
  const Access now = access_of(thread, use.kind, use.program_counter);
  Cell previous{};
  for (size_t i = 0; i < use.bytes; ++i) {
    if (i > 0 && cells[i] == previous) {
      cells[i] = cells[i - 1];
      continue;
    }
    previous = cells[i];
    if (const Access* earlier = record(cells[i], now, thread)) report_race(use, *earlier, space + name);
  }
}

void use_shared(size_t pool_offset, const Use& use) {
  Block* const block = machine.slots[pool_offset / slot_size];
  if (!block || block->cluster != machine.current->block->cluster)
    fail("shared memory of a block outside the cluster: " + sized(use) + by_whom(use));
  if (block != machine.current->block) block->mapped_epoch = block->cluster->epoch;
  if (block->finished) fail("distributed shared memory of a block that has exited: " + sized(use) + by_whom(use));
  (use.kind == Kind::read ? machine.totals.shared_read_bytes : machine.totals.shared_written_bytes) += use.bytes;

  const size_t offset = pool_offset % slot_size;
  Cell* cells = nullptr;
  if (offset + use.bytes <= machine.kernel->shared) cells = &block->dynamic_cells[offset];
  for (const StaticVariable& variable : machine.static_variables) {
    const size_t begin = static_offset + variable.offset;
    if (offset >= begin && offset + use.bytes <= begin + variable.size)
      cells = &block->static_cells[offset - static_offset];
  }
  if (!cells) fail("out-of-bounds shared " + sized(use) + by_whom(use));
  if (use.kind != Kind::write)
    for (size_t i = 0; i < use.bytes; ++i)
      if (!cells[i].initialised) fail("uninitialised shared memory: " + sized(use) + by_whom(use));
  record_all(cells, use, "shared memory", "");
}

void count(RangeStats& stats, const Use& use) {
  if (use.kind == Kind::atomic) {
    stats.atomics++;
    return;
  }
  // A copy of another size, or from where its width does not allow one access, counts byte by byte.
  size_t width = 0, number = use.bytes;
  for (size_t i = 0; i < 5; ++i)
    if (use.bytes == size_t{1} << i && use.address % use.bytes == 0) width = i, number = 1;
  (use.kind == Kind::read ? stats.read_bytes : stats.written_bytes) += use.bytes;
  (use.kind == Kind::read ? stats.reads : stats.writes)[width] += number;
}

void use_global(Range& range, const Use& use) {
  const size_t offset = use.address - range.begin;
  count(range.stats, use);
  if (!range.initialised.empty()) {
    if (use.kind == Kind::write)
      std::fill_n(range.initialised.begin() + static_cast<std::ptrdiff_t>(offset), use.bytes, true);
    else
      for (size_t i = offset; i < offset + use.bytes; ++i)
        if (!range.initialised[i])
          fail("uninitialised global memory " + range.stats.name + ": " + sized(use) + " of byte " + std::to_string(i) +
               by_whom(use));
  }
  if (range.cells.empty()) range.cells.resize(range.end - range.begin);
  record_all(&range.cells[offset], use, "global memory ", range.stats.name);
}

using Segment = std::pair<uintptr_t, uintptr_t>;
int add_segments(dl_phdr_info* info, size_t, void* out) {
  const auto self = reinterpret_cast<uintptr_t>(&kernels_are_checked);
  std::vector<Segment> segments;
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    segments.emplace_back(info->dlpi_addr + header.p_vaddr, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    ours = ours || (self >= segments.back().first && self < segments.back().second);
  }
  if (ours) *static_cast<std::vector<Segment>*>(out) = segments;
  return ours;
}

// Constants and threadIdx live in the executable or library, arguments in the host's frame.
bool is_constant(uintptr_t address) {
  static const std::vector<Segment> segments = [] {
    std::vector<Segment> found;
    dl_iterate_phdr(add_segments, &found);
    return found;
  }();
  for (const Segment& segment : segments)
    if (address >= segment.first && address < segment.second) return true;
  return address - reinterpret_cast<uintptr_t>(machine.kernel->arguments) < machine.kernel->arguments_size;
}

std::string nearby(const Use& use) {
  constexpr uintptr_t reach = 4096;
  for (const Range& range : machine.ranges) {
    const std::string& name = range.stats.name;
    if (use.address < range.end && use.address + use.bytes > range.begin) return ", across an end of " + name;
    if (use.address >= range.end && use.address < range.end + reach)
      return ", " + std::to_string(use.address - range.end) + " bytes past the end of " + name;
    if (use.address < range.begin && use.address + reach > range.begin)
      return ", " + std::to_string(range.begin - use.address) + " bytes before " + name;
  }
  return "";
}

void check(const Use& use, bool aligned) {
  const Thread* thread = machine.current;
  if (!thread || !machine.config.check) return;
  if (use.address - reinterpret_cast<uintptr_t>(thread->stack) < stack_size) return;
  const bool misaligned = aligned && use.address % use.bytes != 0;
  const uintptr_t pool_offset = use.address - reinterpret_cast<uintptr_t>(machine.pool);
  if (pool_offset < machine.slots.size() * slot_size) {
    if (misaligned) fail("misaligned shared " + sized(use) + by_whom(use));
    return use_shared(pool_offset, use);
  }
  for (Range& range : machine.ranges)
    if (use.address >= range.begin && use.address + use.bytes <= range.end) {
      if (misaligned) fail("misaligned global " + sized(use) + " in " + range.stats.name + by_whom(use));
      return use_global(range, use);
    }
  if (use.kind == Kind::read && is_constant(use.address)) return;
  fail("out-of-bounds global " + sized(use) + nearby(use) + by_whom(use));
}
}  // namespace

void forget_accesses() {
  machine.atomics.clear();
  for (Range& range : machine.ranges) range.cells.clear();
}

// The kernel's line: of functions inlined there, cuda_on_cpu's own are passed over.
std::string source_line(void* program_counter) {
  Dl_info info;
  if (!dladdr(program_counter, &info) || !info.dli_fname) return "?";
  uintptr_t address = reinterpret_cast<uintptr_t>(program_counter) - 1;
  if (static_cast<const ElfW(Ehdr)*>(info.dli_fbase)->e_type == ET_DYN)
    address -= reinterpret_cast<uintptr_t>(info.dli_fbase);
  char digits[32];
  snprintf(digits, sizeof digits, "0x%zx", static_cast<size_t>(address));
  const std::string command = "addr2line -s -i -e '" + std::string(info.dli_fname) + "' " + digits + " 2>/dev/null";
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return "?";
  std::string found = "?";
  for (char line[512]; fgets(line, sizeof line, pipe);) {
    found = line;
    found = found.substr(0, found.find_first_of(" \n"));
    if (found.rfind("device.h:", 0) && found.rfind("cuda_on_cpu.h:", 0)) break;
  }
  pclose(pipe);
  return found;
}

void register_global(const void* pointer, size_t bytes, const char* name, bool initialised) {
  Range& range = machine.ranges.emplace_back();
  range.begin = reinterpret_cast<uintptr_t>(pointer);
  range.end = range.begin + bytes;
  range.stats.name = name;
  if (!initialised) range.initialised.resize(bytes);
}
void clear_globals() {
  machine.ranges.clear();
}

std::vector<RangeStats> stats() {
  std::vector<RangeStats> all;
  for (const Range& range : machine.ranges) all.push_back(range.stats);
  return all;
}

namespace detail {
void before_atomic(void* pointer, size_t bytes, void* program_counter) {
  if (!kernels_are_checked || !machine.config.check) return;
  check({reinterpret_cast<uintptr_t>(pointer), bytes, Kind::atomic, program_counter}, true);
  order_atomic(*machine.current, pointer);
}
}  // namespace detail
}  // namespace cuda_on_cpu

// What the compiler calls; the return address is the kernel's.
#define CHECK(bytes, kind, aligned) \
  cuda_on_cpu::check({reinterpret_cast<uintptr_t>(pointer), bytes, kind, __builtin_return_address(0)}, aligned)
#define DEFINE_CALLBACKS(bytes)                       \
  void __tsan_read##bytes(void* pointer) {            \
    CHECK(bytes, cuda_on_cpu::Kind::read, true);      \
  }                                                   \
  void __tsan_write##bytes(void* pointer) {           \
    CHECK(bytes, cuda_on_cpu::Kind::write, true);     \
  }                                                   \
  void __tsan_unaligned_read##bytes(void* pointer) {  \
    CHECK(bytes, cuda_on_cpu::Kind::read, false);     \
  }                                                   \
  void __tsan_unaligned_write##bytes(void* pointer) { \
    CHECK(bytes, cuda_on_cpu::Kind::write, false);    \
  }

#pragma GCC visibility push(hidden)
extern "C" {
void __tsan_init() {
  cuda_on_cpu::kernels_are_checked = true;
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
DEFINE_CALLBACKS(1)
DEFINE_CALLBACKS(2)
DEFINE_CALLBACKS(4)
DEFINE_CALLBACKS(8)
DEFINE_CALLBACKS(16)
void __tsan_read_range(void* pointer, size_t bytes) {
  CHECK(bytes, cuda_on_cpu::Kind::read, false);
}
void __tsan_write_range(void* pointer, size_t bytes) {
  CHECK(bytes, cuda_on_cpu::Kind::write, false);
}
}
#pragma GCC visibility pop
