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
-     if (tile.lane() < left - half) {
+     if (tile.lane() < left - half) {

barrier-after-rows: the next round overwrites what is still being read
csrc/cuda/reduce.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-     __syncthreads();
-     left = half;
+     left = half;

barrier-before-apply: a block applies factors that its leader has not written yet
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-     if (tile.lane() == 0) op.finish(tile, part, true);
-     __syncthreads();
+     if (tile.lane() == 0) op.finish(tile, part, true);

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
-   if (op.waits()) cooperative_groups::this_grid().sync();

counter-by-every-block: every block increments the counter
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
-   if (blockIdx.x == 0 && threadIdx.x == 0) op.begin();
-   if (op.waits())
+   if (threadIdx.x == 0) op.begin();
+   if (op.waits())

written-by-every-split: each split updates the running statistics
csrc/cuda/driver.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
- op.finish(tile, part, split == 0);
+ op.finish(tile, part, true);

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
-     if (w.packs && slot.size() == kPack) return store<kPack>(tensor + slot.at, pack);
- #pragma unroll
-     for (int j = 0; j < kPack; ++j)
-       if (holds<Tile>(slot, j)) tensor[slot.at + j] = pack.element[j];
+     if (w.packs && slot.size() == kPack) return store<kPack>(tensor + slot.at, pack);

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
csrc/cuda/forward.cuh cuda_on_cpu/kernel_checks::test_traffic
-         if constexpr (kResident) {
+         if constexpr (false) {

kept-apart: the place of x in shared memory runs into that of dy
csrc/cuda/backward.cuh cuda_on_cpu/kernel_checks::test_every_order_gives_the_same_bits
- w.cache_bytes / static_cast<int>(2 * sizeof(Pack<T, kPack>));
+ w.cache_bytes / static_cast<int>(4 * sizeof(Pack<T, kPack>));
"""

MUTATIONS = [parse(block) for block in _TABLE.strip().split("\n\n")]
