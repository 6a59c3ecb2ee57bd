// Which elements the threads of csrc/cuda/tile.cuh take, where there are more than 32 bits can count: too many to run a
// kernel on, so the first and the last slots of tasks are looked at. Prints what is wrong; the exit code says whether.
#include <cstdio>
#include <cstdlib>
#include <random>

// clang-format off: tile.cuh first, which says what functions for the device are
#include "tile.cuh"
#include "planner.h"
// clang-format on

namespace bnext::cuda {
namespace {

struct Ends {  // of one task: elements of its first and last slot, and how many slots its threads have
  int64_t first, last, slots;
};

template <class Tile>
__global__ void find_ends(const Work w, int64_t slab, int64_t split, Ends* ends) {
  const Tile tile(w, slab, split);
  if (tile.size() == 0) return;
  const Slot first = tile.slot(0), last = tile.slot(tile.size() - 1);
  ends[threadIdx.x] = {first.at + first.begin, last.at + last.end, tile.size()};
}

int faults = 0;
void expect(bool condition, const char* what, const Request& r, int64_t slab, int64_t split) {
  if (condition) return;
  ++faults;
  std::printf("%s: N %ld C %ld S %ld, slab %ld, split %ld\n", what, r.N, r.C, r.S, slab, split);
}

// The task's elements start and end where they should, in a tensor cut by hand.
template <class Tile>
void check(const Request& r, const Plan& plan) {
  const Work w(r, plan, nullptr);
  const View v(r);
  for (const int64_t slab : {int64_t{0}, plan.slabs - 1}) {
    int64_t slots = 0;
    for (const int64_t split : {int64_t{0}, plan.splits / 2, plan.splits - 1}) {
      Ends ends[kMaxThreads] = {};
      gpu::Launch l;
      l.block = dim3(static_cast<unsigned>(plan.threads));
      cuda_on_cpu::clear_globals();
      cuda_on_cpu::register_global(ends, sizeof ends, "ends");
      if (gpu::launch(find_ends<Tile>, l, w, slab, split, ends) != cudaSuccess) std::abort();
      int64_t first = w.elements, last = 0, count = 0;
      for (const Ends& e : ends) {
        if (e.slots == 0) continue;
        first = std::min(first, e.first);
        last = std::max(last, e.last);
        count += e.slots;
      }
      slots += count;
      const int64_t begin = split * w.chunk, end = std::min(begin + w.chunk, w.chunks_end);
      if (v.planar) {
        const int64_t per_row = w.row_slots.divisor, from = begin / per_row, to = (end - 1) / per_row;
        const int64_t from_plane = (from * r.C + slab) * r.S, to_plane = (to * r.C + slab) * r.S;
        expect(count == end - begin, "slots", r, slab, split);
        expect(first >= from_plane && first < from_plane + r.S, "first", r, slab, split);
        expect(last > to_plane && last <= to_plane + r.S, "last", r, slab, split);
        if (split == 0) expect(first == slab * r.S, "start of the slab", r, slab, split);
        if (split == plan.splits - 1) expect(last == ((r.N - 1) * r.C + slab + 1) * r.S, "end", r, slab, split);
      } else {
        const int64_t from = slab * plan.width * Tile::kPack;
        const int64_t width = std::min(plan.width * Tile::kPack, v.row - from);
        expect(count == (end - begin) * (width / Tile::kPack), "slots", r, slab, split);
        expect(first == begin * v.row + from, "first", r, slab, split);
        expect(last == (end - 1) * v.row + from + width, "last", r, slab, split);
      }
    }
    expect(slots > 0, "nothing", r, slab, 0);
  }
}

void check_divisor() {
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000000; ++i) {
    const int64_t divisor = 1 + static_cast<int64_t>(random() >> (34 + random() % 30)) % (kMaxTask - 1);
    int64_t number = static_cast<int64_t>(random() >> (33 + random() % 31));
    if (i % 2) number = std::max<int64_t>(0, number / divisor * divisor - static_cast<int64_t>(random() % 2));
    if (Divisor(divisor).quotient(number) == number / divisor) continue;
    std::printf("%ld / %ld\n", number, divisor);
    ++faults;
    return;
  }
}

void check_all() {
  const Device device{132, 227 * 1024, 228 * 1024, 2048, 60 << 20, 4800000000000, {132, 132, 128, 128}, true};
  struct {
    int64_t N, C, S;
  } const problems[] = {
      {1, 1, int64_t{1} << 33},
      {1, 1, (int64_t{1} << 33) + 5},
      {1, 3, (int64_t{1} << 32) + 8},
      {2, 3, (int64_t{1} << 31) + 7},
      {70000, 64, 3136},
      {70000, 65, 3137},
      {int64_t{1} << 32, 3, 1},
      {(int64_t{1} << 31) + 3, 8, 1},
      {256, 1 << 20, 49},
      {4, 6, 35},
      {300, 24, 1},
      {3, 1000, 16},
  };
  for (const auto& [N, C, S] : problems) {
    for (const bool channels_last : {false, true}) {
      for (const bool aligned : {false, true}) {
        const Layout layout = channels_last ? Layout::channels_last : Layout::planar;
        const Request r{{N, C, S, layout, DType::bfloat16, DType::float32}, false, true, true, true, false, aligned};
        for (const Strategy strategy : kStrategies) {
          const std::optional<Plan> plan = Planner(r, device).plan(strategy);
          if (!plan) continue;
          if (plan->planes) {
            check<Rows<BFloat16, true, true>>(r, *plan);
          } else if (channels_last) {
            plan->whole ? check<Rows<BFloat16, true, false>>(r, *plan) : check<Rows<BFloat16, false, false>>(r, *plan);
          } else {
            plan->whole ? check<Planar<BFloat16, true>>(r, *plan) : check<Planar<BFloat16, false>>(r, *plan);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace bnext::cuda

int main() {
  bnext::cuda::check_divisor();
  bnext::cuda::check_all();
  std::printf("%d faults\n", bnext::cuda::faults);
  return bnext::cuda::faults != 0;
}
