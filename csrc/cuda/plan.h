// How a problem is laid out on a GPU: a pure function of the problem and the device, so that every choice can be seen
// and tested without one. Host only, and no CUDA header.
//
// A slab is what is normalised together: one channel (planar), or the channels of `width` packs side by side
// (channels_last). A pack is 16 bytes of a tensor, or one element where rows do not divide into packs. A slab is cut
// into `splits`, each a task of one block; the blocks of a launch are all resident and take task after task.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../params.h"

namespace bnext::cuda {

struct Device {
  std::int64_t multiprocessors;
  std::int64_t shared_per_block;           // bytes of shared memory that a block may ask for
  std::int64_t shared_per_multiprocessor;  // bytes
  std::int64_t threads_per_multiprocessor;
  std::int64_t l2;   // bytes
  bool cooperative;  // whether a launch may be cooperative
};

enum class Strategy : std::int32_t {
  streaming,  // statistics of everything, a grid barrier, then the tensors are read again
  resident,   // a slab fits the shared memory of one block and is read once
};

// What is asked of the device.
struct Request : Problem {
  bool backward;
  bool training;
  bool reduces;     // sums over the channels are needed
  bool applies;     // a tensor [N, C, S] is written
  bool cumulative;  // num_batches_tracked is read after it has been incremented
  bool aligned;     // all tensors [N, C, S] start at a multiple of 16 bytes
};

inline constexpr std::int64_t kPackBytes = 16;

inline bool is_aligned(std::initializer_list<const void*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [](const void* t) { return reinterpret_cast<std::uintptr_t>(t) % kPackBytes == 0; });
}
inline Request request(const ForwardParams& p) {
  return {p, false, p.training, p.training, true, p.cumulative, is_aligned({p.input, p.output})};
}
inline Request request(const BackwardParams& p) {
  const bool aligned = is_aligned({p.grad_output, p.input, p.grad_input});
  return {p, true, p.training, p.reduces(), p.grad_input != nullptr, false, aligned};
}

struct Plan {
  Strategy strategy;
  bool whole;          // a row is a whole number of packs, and every pack is 16 bytes wide and aligned
  bool packs;          // accesses of 16 bytes where a pack lies inside a row (planar; whole implies it)
  std::int64_t width;  // packs side by side in a slab (channels_last)
  std::int64_t slabs, splits;
  std::int64_t threads, blocks;
  std::int64_t cluster;  // blocks in a cluster
  bool cooperative;      // the launch has a grid barrier
  int launches;
  std::int64_t shared;         // bytes of shared memory of a block
  std::int64_t scratch;        // bytes of global memory for partial results
  std::int64_t read, written;  // bytes of the tensors [N, C, S] that go through global memory
};

inline constexpr std::int64_t kMaxThreads = 512;
inline constexpr std::int64_t kSystemShared = 1024;              // bytes that the system takes for each block
inline constexpr std::int64_t kMaxTask = std::int64_t{1} << 30;  // slots of a task: they are counted in 32 bits

// What decides how many registers a kernel needs.
struct Kind {
  Strategy strategy;
  bool backward, planar, whole;
  std::int64_t element;  // bytes
};
// Threads that are sure to be resident on a multiprocessor, by the registers that the kernels' __launch_bounds__ leave
// each: 64, or 128.
constexpr std::int64_t promised_threads(const Kind& k) {
  return k.strategy == Strategy::streaming && !k.backward && k.planar && k.whole && k.element < 8 ? 1024 : 512;
}
// Slots that a thread loads before it uses them.
constexpr int unroll(const Kind& k) {
  return k.backward && k.element == 2 && !(k.planar && k.whole) ? 2 : 4;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Sizes that the kernels and their plan share.
struct Sizes {
  std::int64_t pack;     // elements of a pack
  std::int64_t columns;  // channels of a pack, each with sums of its own
  std::int64_t partial;  // bytes of one channel's partial result
  std::int64_t factor;   // bytes of what applying needs of one channel
  Sizes(const Request& r, bool whole) {
    const bool planar = r.layout == Layout::planar;
    pack = whole || planar ? kPackBytes / itemsize(r.dtype) : 1;
    columns = planar ? 1 : pack;
    const std::int64_t real = r.dtype == DType::float64 ? 8 : 4;
    partial = r.backward ? 16 : 4 * real;
    factor = 4 * real;
  }
};

// Slots of a row of a slab: packs, of which the first and last may lie partly outside the row (planar, not whole).
inline std::int64_t row_slots(const Request& r, const Sizes& sizes, bool whole, std::int64_t width) {
  if (r.layout == Layout::channels_last) return width;
  return whole ? r.S / sizes.pack : (r.S + 2 * sizes.pack - 2) / sizes.pack;
}
inline std::int64_t slab_rows(const Request& r) {
  return r.layout == Layout::planar ? r.N : r.N * r.S;
}

// Shared memory that a block needs besides a resident slab: partial results being combined, and factors.
inline std::int64_t working_bytes(const Request& r, const Sizes& sizes, std::int64_t width, std::int64_t threads) {
  const std::int64_t combined = r.layout == Layout::planar ? threads / 32 : threads / 2 * sizes.columns;
  return combined * sizes.partial + width * sizes.columns * sizes.factor;
}

class Planner {
 public:
  Planner(const Request& request, const Device& device)
      : r(request), d(device), whole_(is_whole(request)), sizes_(request, whole_) {}

  Plan plan() const {
    const Plan streaming = this->streaming();
    if (!(r.training && r.reduces && r.applies)) return streaming;
    const Plan resident = this->resident();
    const bool fits = resident.width > 0 && (!r.cumulative || d.cooperative);
    return fits && cost(resident) < cost(streaming) ? resident : streaming;
  }

  Plan streaming() const {
    Plan p = common(Strategy::streaming);
    p.threads = 256;
    p.slabs = ceil_div(slab_packs(), max_width());
    p.width = r.layout == Layout::planar ? 1 : ceil_div(slab_packs(), p.slabs);
    p.shared = working_bytes(r, sizes_, p.width, p.threads);
    p.splits = splits(p);
    p.blocks = std::min(p.slabs * p.splits, capacity(p));
    p.cooperative = r.reduces && d.cooperative;
    p.launches = r.reduces && !d.cooperative ? 2 : 1;
    p.scratch = r.reduces ? p.splits * r.C * sizes_.partial : 0;
    return p;
  }

  // Two blocks on a multiprocessor where both fit, so that one loads while the other stores. width is 0 where none
  // fits.
  Plan resident() const {
    Plan p = common(Strategy::resident);
    p.splits = p.launches = 1;
    p.cooperative = r.cumulative;
    for (p.width = std::min(max_width(), slab_packs()); p.width > 0; p.width /= 2) {
      const std::int64_t pack_bytes = sizes_.pack * itemsize(r.dtype), tensors = r.backward ? 2 : 1;
      const std::int64_t slots = slab_rows(r) * row_slots(r, sizes_, whole_, p.width);
      const bool sectors = r.layout == Layout::planar || p.width == slab_packs() || p.width * pack_bytes >= 32;
      if (slots >= kMaxTask || !sectors) continue;
      for (p.threads = kMaxThreads / 2; p.threads <= kMaxThreads; p.threads *= 2) {
        const std::int64_t blocks = kMaxThreads / p.threads, cache = slots * tensors * pack_bytes;
        p.shared = ceil_div(cache, kPackBytes) * kPackBytes + working_bytes(r, sizes_, p.width, p.threads);
        if (p.shared > d.shared_per_block || blocks * (p.shared + kSystemShared) > d.shared_per_multiprocessor)
          continue;
        p.slabs = ceil_div(slab_packs(), p.width);
        p.blocks = std::min(p.slabs, capacity(p));
        return p;
      }
    }
    return p;
  }

 private:
  static bool is_whole(const Request& r) {
    const std::int64_t row = r.layout == Layout::planar ? r.S : r.C;
    return r.aligned && row % (kPackBytes / itemsize(r.dtype)) == 0;
  }

  // What all plans have in common.
  Plan common(Strategy strategy) const {
    Plan p{};
    p.strategy = strategy;
    p.whole = whole_;
    p.packs = r.aligned;
    p.cluster = 1;
    const std::int64_t tensor = r.N * r.C * r.S * itemsize(r.dtype);
    const std::int64_t inputs = !r.backward || (!r.reduces && !r.training) ? 1 : 2;
    const bool again = strategy == Strategy::streaming && r.reduces && r.training && r.applies;
    p.read = inputs * tensor * (again ? 2 : 1);
    p.written = r.applies ? tensor : 0;
    return p;
  }

  Kind kind(Strategy strategy) const {
    return {strategy, r.backward, r.layout == Layout::planar, whole_, itemsize(r.dtype)};
  }
  // Packs side by side that have channels of their own.
  std::int64_t slab_packs() const { return r.layout == Layout::planar ? r.C : r.C / sizes_.pack; }
  // At most 512 contiguous bytes of a row.
  std::int64_t max_width() const {
    return r.layout == Layout::planar ? 1 : std::min<std::int64_t>(128, 512 / (sizes_.pack * itemsize(r.dtype)));
  }

  // Blocks that are resident at once.
  std::int64_t capacity(const Plan& p) const {
    const std::int64_t by_threads =
        std::min(promised_threads(kind(p.strategy)), d.threads_per_multiprocessor) / p.threads;
    const std::int64_t by_shared = d.shared_per_multiprocessor / (p.shared + kSystemShared);
    return d.multiprocessors * std::max<std::int64_t>(1, std::min(by_threads, by_shared));
  }

  // The fewest splits that keep the device about as busy as any number does: tasks are a whole number of waves, or
  // nearly.
  std::int64_t splits(const Plan& p) const {
    const std::int64_t slots = slab_rows(r) * row_slots(r, sizes_, whole_, p.width), blocks = capacity(p);
    const std::int64_t at_once = r.layout == Layout::planar ? p.threads : p.threads / p.width * p.width;
    const std::int64_t least = ceil_div(slots, kMaxTask),
                       most = std::max(least, slots / (at_once * unroll(kind(p.strategy))));
    const auto time = [&](std::int64_t s) {
      return static_cast<double>(ceil_div(p.slabs * s, blocks)) / static_cast<double>(s);
    };
    std::int64_t best = least;
    for (std::int64_t waves = 1; waves <= 8; ++waves) {
      const std::int64_t s = std::clamp(waves * blocks / p.slabs, least, most);
      if (time(s) < 0.95 * time(best)) best = s;
    }
    return best;
  }

  // Passes over memory, by the share of the multiprocessors that is busy. What the second-level cache holds is read
  // again for less than half the price: an estimate. A grid barrier counts nothing yet.
  double cost(const Plan& p) const {
    const std::int64_t tensor = r.N * r.C * r.S * itemsize(r.dtype), tensors = r.backward ? 2 : 1;
    const double again = p.strategy == Strategy::streaming ? (tensor * tensors <= d.l2 / 2 ? 0.4 : 1.0) : 0.0;
    const std::int64_t tasks = p.slabs * p.splits;
    const double busy =
        static_cast<double>(tasks) / static_cast<double>(d.multiprocessors * ceil_div(tasks, d.multiprocessors));
    return (static_cast<double>(tensors) * (1 + again) + 1) / busy;
  }

  const Request r;
  const Device d;
  const bool whole_;
  const Sizes sizes_;
};

inline Plan make_plan(const Request& request, const Device& device) {
  return Planner(request, device).plan();
}

}  // namespace bnext::cuda
