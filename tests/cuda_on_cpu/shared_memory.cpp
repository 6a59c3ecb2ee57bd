// Shared memory: one slot of a pool per resident block, dynamic memory first and static variables at an offset.
#include <sys/mman.h>

#include "runtime.h"

namespace cuda_on_cpu {
bool reserve_pool(size_t blocks) {
  if (machine.slots.size() >= blocks) return true;
  if (machine.pool) munmap(machine.pool, machine.slots.size() * slot_size);
  machine.slots.clear();
  void* memory =
      mmap(nullptr, blocks * slot_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  machine.pool = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  if (machine.pool) machine.slots.resize(blocks);
  return machine.pool != nullptr;
}

void poison(Block& block) {
  memset(block.shared, machine.config.poison, machine.kernel->shared);
  memset(block.shared + static_offset, machine.config.poison, machine.static_used);
}

namespace detail {
void* dynamic_shared() {
  return machine.current->block->shared;
}

void* static_shared(const void* key, size_t size, size_t alignment) {
  constexpr size_t gap = 32;  // so that stepping over an end is seen
  char* const shared = machine.current->block->shared + static_offset;
  for (const StaticVariable& variable : machine.static_variables)
    if (variable.key == key) return shared + variable.offset;
  const size_t boundary = std::max(alignment, gap), offset = (machine.static_used + boundary - 1) / boundary * boundary;
  machine.static_bytes += size;
  if (machine.static_bytes > static_limit || offset + size > static_span)
    fail("more than 48 KiB of static shared memory");
  if (machine.static_bytes + machine.kernel->shared > machine.config.shared_limit)
    fail("static and dynamic shared memory together are over the limit");
  machine.static_variables.push_back({key, offset, size});
  machine.static_used = offset + size + gap;
  for (const auto& cluster : machine.clusters)
    for (const auto& block : cluster->blocks) {
      memset(block->shared + static_offset + offset, machine.config.poison, size);
      if (kernels_are_checked) block->static_cells.resize(machine.static_used);
    }
  return shared + offset;
}

void* map_to_rank(const void* pointer, unsigned rank) {
  Block& block = *machine.current->block;
  const auto offset = static_cast<size_t>(static_cast<const char*>(pointer) - block.shared);
  if (offset >= slot_size) fail("map_shared_rank: the pointer is not to this block's shared memory");
  if (rank >= block.cluster->blocks.size()) fail("map_shared_rank: no block has rank " + std::to_string(rank));
  Block& other = *block.cluster->blocks[rank];
  if (other.finished) fail("map_shared_rank: the block of rank " + std::to_string(rank) + " has exited");
  if (&other != &block) other.mapped_epoch = block.cluster->epoch;
  return other.shared + offset;
}
}  // namespace detail
}  // namespace cuda_on_cpu
