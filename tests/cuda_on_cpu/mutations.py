"""What the checks of the CUDA kernels must notice: faults, in the format of tests/mutations.py."""

from mutations import parse

_TABLE = """
barrier-in-warps: a warp reads the others' partial results before they are there
csrc/cuda/reduce.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-   if (lane == 0) memory[warp] = part;
-   __syncthreads();
+   if (lane == 0) memory[warp] = part;

barrier-in-rows: rows combine what the others have not written yet
csrc/cuda/reduce.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-     __syncthreads();
-     if (row.lane() < left - half) {
+     if (row.lane() < left - half) {

barrier-after-rows: the next round overwrites what is still being read
csrc/cuda/reduce.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-     __syncthreads();
-     left = half;
+     left = half;

barrier-before-apply: a block applies factors that its leader has not written yet
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-     if (row.lane() == 0) op.finish(tile.first() + row.place(), row.place(), sum, group.rank() == 0);
-     __syncthreads();
+     if (row.lane() == 0) op.finish(tile.first() + row.place(), row.place(), sum, group.rank() == 0);

barrier-between-tasks: the next task's factors overwrite those still in use
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-     if (op.applies()) op.apply(tile);
-     __syncthreads();
+     if (op.applies()) op.apply(tile);

grid-barrier: blocks combine partial results that other blocks have not written yet
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-     if (w.apply) cooperative_groups::this_grid().sync();

counter-read-while-written: every leader reads the counter, while block 0 increments it
csrc/cuda/forward.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
- p.cumulative ? *p.num_batches_tracked : 0;
+ p.num_batches_tracked ? *p.num_batches_tracked : 0;

counter-not-waited-for: a cumulative average reads the counter before it is incremented
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-   if (op.waits() && !group.meets_all()) cooperative_groups::this_grid().sync();

counter-by-every-block: every block increments the counter
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-   if (blockIdx.x == 0 && threadIdx.x == 0) op.begin();
-   if (op.waits() &&
+   if (threadIdx.x == 0) op.begin();
+   if (op.waits() &&

written-by-every-split: each split updates the running statistics
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
- row.place(), sum, split == 0);
+ row.place(), sum, true);

one-slot-too-many: a thread takes a row beyond its share
csrc/cuda/tile.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
- static_cast<int>((count + lanes_ - 1) / lanes_) : 0;
+ static_cast<int>((count + lanes_) / lanes_) : 0;

one-task-too-many: a task beyond the last
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
- task < w.slabs * w.splits; task
+ task <= w.slabs * w.splits; task

tail-missing: what is left of a plane after its whole packs is not written
csrc/cuda/tile.cuh cuda_on_cpu/kernel_checks::test_results
-     if (w.packs && slot.size() == kPack) return store<kPack>(tensor + slot.at, pack, w.past_cache);
- #pragma unroll
-     for (int j = 0; j < kPack; ++j)
-       if (holds<Tile>(slot, j)) tensor[slot.at + j] = pack.element[j];
+     if (w.packs && slot.size() == kPack) return store<kPack>(tensor + slot.at, pack, w.past_cache);

tail-beyond-the-tensor: the last pack is read whole
csrc/cuda/tile.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
- w.packs && slot.at + kPack <= w.elements
+ w.packs

neighbours-counted: a pack that reaches into the next plane counts wholly
csrc/cuda/tile.cuh cuda_on_cpu/kernel_checks::test_results
-   return Tile::kWhole ? slot.end != 0 : j >= slot.begin && j < slot.end;
+   return Tile::kWhole ? slot.end != 0 : j >= slot.begin;

alignment-ignored: 16 bytes are read at any address
csrc/cuda/tile.cuh cuda_on_cpu/kernel_checks::test_tensors_that_start_anywhere
- w.packs && slot.at + kPack <= w.elements
+ slot.at + kPack <= w.elements

division-rounds-down: rows of some slots are mistaken for others
csrc/cuda/tile.cuh cuda_on_cpu/kernel_checks::test_results
- ((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor
+ (uint64_t{1} << (31 + shift)) / divisor

offset-dropped: what rounding takes from a large mean is lost
csrc/math.h cuda_on_cpu/kernel_checks::test_large_means
-   a.offset = (a.origin - (mean - moved)) + (a.offset - moved);
+   a.offset = 0 * moved;

resident-reads-again: a resident slab is read from global memory again
csrc/cuda/forward.cuh cuda_on_cpu/traffic_checks::test_traffic
- const int kept = kResident ? min(w.held, tile.size()) : 0;
+ const int kept = 0;

kept-apart: the place of x in shared memory runs into that of dy
csrc/cuda/backward.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
- w.cache_bytes / static_cast<int>(w.inputs * sizeof(Pack<T, kPack>))
+ w.cache_bytes / static_cast<int>(2 * w.inputs * sizeof(Pack<T, kPack>))

written-by-every-block: each block of a group updates the running statistics
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
- row.place(), sum, group.rank() == 0);
+ row.place(), sum, true);

cluster-not-waited-for: a block reads what the others of its cluster have not written yet
csrc/cuda/group.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
-       gpu::cluster_sync();
-     }
-     ++exchanges_;
+     }
+     ++exchanges_;

cluster-exchange-in-one-place: what the others still read is overwritten for the next slab
csrc/cuda/group.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
- sums + exchanges_ % 2 * w_.channels : sums;
+ sums : sums;

cluster-left-early: a block is gone while others read its shared memory
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
-   group.end();

group-not-waited-for: a block reads what the others of its group have not written yet
csrc/cuda/group.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
-       wait();
-     } else {
+     } else {

group-counted-short: the last block of a group is not waited for
csrc/cuda/group.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
- exchanges_ * static_cast<unsigned>(w_.splits)
+ exchanges_ * static_cast<unsigned>(w_.splits) - 1

groups-counter-of-nothing: the counter that a group meets at has no value at first
csrc/cuda/group.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
-     if (meets_all() && rank_ == 0 && threadIdx.x == 0) *arrived() = 0;

group-without-fence: what a block wrote may come after it was counted
csrc/cuda/gpu.h cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
-   __threadfence();
-   atomicAdd(arrived, 1u);
+   atomicAdd(arrived, 1u);

group-reads-early: what others wrote may be read before they were counted
csrc/cuda/gpu.h cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
-   while (atomicAdd(arrived, 0u) < all) __nanosleep(20);
-   __threadfence();
+   while (atomicAdd(arrived, 0u) < all) __nanosleep(20);

planes-not-waited-for: warps sum columns that other threads have not written yet
csrc/cuda/reduce.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
-   __syncthreads();
-   const int lane = static_cast<int>(threadIdx.x) % 32, warps
+   const int lane = static_cast<int>(threadIdx.x) % 32, warps

planes-summed-short: the last columns of a channel are left out
csrc/cuda/reduce.cuh cuda_on_cpu/kernel_checks::test_results
- i < tile.plane(); i += 32
+ i < tile.plane() / 32 * 32; i += 32

planes-mistaken: a column is normalised as the channel before it
csrc/cuda/tile.cuh cuda_on_cpu/kernel_checks::test_results
- kPlanes ? (column() + j) / plane()
+ kPlanes ? column() / plane()

sums-not-waited-for: a channel is finished before its sums are there
csrc/cuda/reduce.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-       for (int j = 0; j < Tile::kColumns; ++j) sums[tile.place(j)] = part[j];
-     }
-   }
-   __syncthreads();
+       for (int j = 0; j < Tile::kColumns; ++j) sums[tile.place(j)] = part[j];
+     }
+   }

kept-beyond-its-room: a thread keeps what it has no room for
csrc/cuda/forward.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits_of_shared_slabs
- const bool keeps = kResident && k < w.held;
+ const bool keeps = kResident;

kept-in-part-read-whole: what a block keeps in part is read again as a whole
csrc/cuda/forward.cuh cuda_on_cpu/traffic_checks::test_traffic_of_what_is_kept_in_part
- const int kept = kResident ? min(w.held, tile.size()) : 0;
+ const int kept = w.strategy != Strategy::retained ? min(w.held, tile.size()) : 0;

mask-of-neighbours-lost: of a byte's bits only the first thread's are written
csrc/cuda/tile.cuh cuda_on_cpu/fused_checks::test_results_of_resident_slabs
- << (lanes * kPack);
+ << 8;

mask-overwritten: bits of others in a word are written over
csrc/cuda/tile.cuh cuda_on_cpu/fused_checks::test_every_order_gives_the_same_bits
-     atomicOr(word, (bits & all) << shift);
+     *word = (bits & all) << shift;

mask-in-half-bytes: a byte of the mask is of two planes
csrc/cuda/plan.h cuda_on_cpu/fused_checks::test_every_order_gives_the_same_bits
- std::max<std::int64_t>(full, 8) : full;
+ full : full;

mask-split-in-a-byte: a split ends within a byte of the mask
csrc/cuda/plan.h cuda_on_cpu/fused_checks::test_a_byte_of_the_mask_is_not_split
- return round_up(ceil_div(length(), splits), grain);
+ return ceil_div(length(), splits);

mask-read-again: what of a kept gradient passes is asked once more
csrc/cuda/backward.cuh cuda_on_cpu/fused_checks::test_traffic
-     if (kAny && p.mask) packs.passes
+     if (kMasks) packs.passes

gate-open: what ReLU did not let pass has a gradient
csrc/cuda/backward.cuh cuda_on_cpu/fused_checks::test_results_of_resident_slabs
-             gate(packs[u], c + i, factor);
-             const A dz
+             const A dz

no-room-for-bias: the factors run beyond their memory
csrc/cuda/plan.h cuda_on_cpu/fused_checks::test_every_order_gives_the_same_bits
- after == After::any ? 5 : 4;
+ after == After::any ? 4 : 4;

residual-gradient-of-dy: grad_residual is the gradient of the output
csrc/cuda/backward.cuh cuda_on_cpu/fused_checks::test_results_of_resident_slabs
- dz[j] = gradient(packs, j);
+ dz[j] = widen(packs.dy.element[j]);
"""

MUTATIONS = [parse(block) for block in _TABLE.strip().split("\n\n")]
