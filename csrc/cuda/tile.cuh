// Which elements a thread of a block works on. A tile is the task of one block: a part of a slab (plan.h), whose packs,
// here slots, are dealt out to the threads in order of memory:
//   size(), slot(k), cached(k)   this thread's slots, and where shared memory keeps them
//   lane(), lanes()              which of the threads that share this thread's columns it is, and how many they are;
//                                lane() == lanes() has none
//   place(j)                     where in the slab the channel of column j, [0, kColumns), of its packs is
//   first(), channels()          the slab's first channel, and how many it has
#pragma once

#include "pack.cuh"
#include "plan.h"

namespace bnext::cuda {

// Division of numbers below 2^31 by a number below 2^30; by a larger one, of what is less than twice that number.
struct Divisor {
  int64_t divisor;
  uint32_t magic = 0, shift = 0;  // quotient = number * magic / 2^(31 + shift)

  explicit Divisor(int64_t divisor) : divisor(divisor) {
    if (divisor >= kMaxTask) return;
    while ((int64_t{1} << shift) < divisor) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ int64_t quotient(int64_t number) const {
    return magic ? __umulhi(2 * static_cast<uint32_t>(number), magic) >> shift : number >= divisor;
  }
};

// What kernels need to know of a plan.
struct Work {
  int64_t C, S, elements;     // channels, elements of a plane, elements of a tensor
  int64_t row;                // not planar: elements from one row to the next
  int64_t chunk, chunks_end;  // slots (planar) or rows of a task, and of a slab
  Divisor row_slots;          // planar: slots of a row
  int64_t slabs;
  int splits, width, channels;  // blocks, packs, channels of a slab
  int held;                     // slots that a thread keeps in shared memory
  int inputs;                   // tensors of which it keeps them
  Strategy strategy;
  bool packs, past_cache;
  bool reduce, apply;                      // the phases of this launch
  int cache_bytes, work_bytes, sum_bytes;  // of shared memory; factors follow
  void* scratch;                           // [splits, C] partial results, then a counter for each group of blocks

  Work(const Request& r, const Plan& plan, void* scratch) : Work(r, View(r), plan, scratch) {}

 private:
  Work(const Request& r, const View& v, const Plan& plan, void* scratch)
      : C(r.C),
        S(r.S),
        elements(r.N * r.C * r.S),
        row(v.row),
        chunk(v.chunk(plan.splits)),
        chunks_end(v.length()),
        row_slots(std::max<int64_t>(1, v.row_slots)),
        slabs(plan.slabs),
        splits(static_cast<int>(plan.splits)),
        width(static_cast<int>(plan.width)),
        channels(static_cast<int>(v.channels(plan.width))),
        held(static_cast<int>(plan.held)),
        inputs(r.inputs()),
        strategy(plan.strategy),
        packs(plan.packs),
        past_cache(plan.past_cache),
        reduce(r.reduces),
        apply(true),
        scratch(scratch) {
    const Workspace space(r, v, plan.width, plan.threads, plan.cluster > 1);
    cache_bytes = static_cast<int>(plan.shared - space.total());
    work_bytes = static_cast<int>(space.work);
    sum_bytes = static_cast<int>(space.sums);
  }
};

// One pack: elements [begin, end) of it, the first of the pack being element `at` of the tensor.
struct Slot {
  int64_t at;
  int begin, end;
  __device__ __forceinline__ int size() const { return end > begin ? end - begin : 0; }
};

// One channel [N, S] of [N, C, S]: rows are planes. Unless planes are whole numbers of aligned packs, the first and the
// last pack of a plane reach into its neighbours.
template <class T_, bool kWhole_>
class Planar {
 public:
  using T = T_;
  static constexpr bool kWhole = kWhole_, kWholePacks = kWhole_, kPlanar = true, kPlanes = false;
  static constexpr int kPack = kPackBytes / sizeof(T), kColumns = 1;  // elements of a pack; channels of it

  __device__ Planar(const Work& w, int64_t slab, int64_t split) : w_(w), channel_(slab) {
    const int64_t begin = split * w.chunk, end = min(begin + w.chunk, w.chunks_end);
    row_ = begin / w.row_slots.divisor;
    slot_ = begin - row_ * w.row_slots.divisor + threadIdx.x;
    const int64_t count = end - begin - threadIdx.x;
    size_ = count > 0 ? static_cast<int>((count + blockDim.x - 1) / blockDim.x) : 0;
  }

  __device__ __forceinline__ int size() const { return size_; }  // slots of this thread
  __device__ __forceinline__ Slot slot(int k) const {
    const int64_t i = slot_ + static_cast<int64_t>(k) * blockDim.x, row = w_.row_slots.quotient(i);
    const int64_t column = (i - row * w_.row_slots.divisor) * kPack;
    const int64_t plane = ((row_ + row) * w_.C + channel_) * w_.S;
    if constexpr (kWhole) return {plane + column, 0, kPack};
    const int before = static_cast<int>(plane % kPack);
    const int64_t left = before + w_.S - column;
    return {plane - before + column, column == 0 ? before : 0, static_cast<int>(left < kPack ? left : kPack)};
  }
  __device__ __forceinline__ int cached(int k) const { return static_cast<int>(threadIdx.x + k * blockDim.x); }
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int lanes() const { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ int place(int) const { return 0; }
  __device__ __forceinline__ int64_t first() const { return channel_; }
  __device__ __forceinline__ int channels() const { return 1; }

 private:
  const Work& w_;
  int64_t channel_, row_, slot_;
  int size_;
};

// `width` packs side by side of a matrix: [N * S, C] (channels_last), whose columns are channels, or [N, C * S]
// (planes), where S columns are one. width threads take a row, others the next ones. A pack is one element where rows
// are not whole numbers of aligned packs.
template <class T_, bool kWhole_, bool kPlanes_>
class Rows {
 public:
  using T = T_;
  static constexpr bool kWhole = true, kWholePacks = kWhole_, kPlanar = false, kPlanes = kPlanes_;
  static constexpr int kPack = kWhole_ ? kPackBytes / sizeof(T) : 1, kColumns = kPack;

  __device__ Rows(const Work& w, int64_t slab, int64_t split) : w_(w), first_(slab * w.channels) {
    const int thread = static_cast<int>(threadIdx.x);
    lanes_ = static_cast<int>(blockDim.x) / w.width;
    lane_ = thread / w.width;
    x_ = thread - lane_ * w.width;
    at_ = (slab * w.width + x_) * kPack;
    if (at_ >= w.row) lane_ = lanes_;
    row_ = split * w.chunk + lane_;
    const int64_t count = min((split + 1) * w.chunk, w.chunks_end) - row_;
    size_ = lane_ < lanes_ && count > 0 ? static_cast<int>((count + lanes_ - 1) / lanes_) : 0;
  }

  __device__ __forceinline__ int size() const { return size_; }
  __device__ __forceinline__ Slot slot(int k) const {
    return {(row_ + static_cast<int64_t>(k) * lanes_) * w_.row + at_, 0, kPack};
  }
  __device__ __forceinline__ int cached(int k) const { return (lane_ + k * lanes_) * w_.width + x_; }
  __device__ __forceinline__ int lane() const { return lane_; }
  __device__ __forceinline__ int lanes() const { return lanes_; }
  __device__ __forceinline__ int place(int j) const { return kPlanes ? (column() + j) / plane() : column() + j; }
  __device__ __forceinline__ int64_t first() const { return first_; }
  __device__ __forceinline__ int channels() const {
    return static_cast<int>(min(static_cast<int64_t>(w_.channels), w_.C - first_));
  }
  __device__ __forceinline__ int column() const { return x_ * kColumns; }  // the first of this thread, in the slab
  __device__ __forceinline__ int width() const { return w_.width; }
  __device__ __forceinline__ int plane() const { return static_cast<int>(w_.S); }

 private:
  const Work& w_;
  int64_t first_, at_, row_;
  int x_, lane_, lanes_, size_;
};

// Whether element j of the slot's pack belongs to it.
template <class Tile>
__device__ __forceinline__ bool holds(const Slot& slot, int j) {
  return Tile::kWhole ? slot.end != 0 : j >= slot.begin && j < slot.end;
}

// The slot's elements; those outside [begin, end) are anything. An empty slot reads nothing. once: as in pack.cuh.
template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ Pack<T, Tile::kPack> load(const Work& w, const T* tensor, const Slot& slot,
                                                     bool once = false) {
  constexpr int kPack = Tile::kPack;
  Pack<T, kPack> pack = {};
  if (slot.size() == 0) return pack;
  if constexpr (Tile::kWhole) {
    return load<kPack>(tensor + slot.at, once);
  } else {
    if (w.packs && slot.at + kPack <= w.elements) return load<kPack>(tensor + slot.at, false);
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      if (holds<Tile>(slot, j)) pack.element[j] = tensor[slot.at + j];
    return pack;
  }
}

template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void store(const Work& w, T* tensor, const Slot& slot, const Pack<T, Tile::kPack>& pack) {
  constexpr int kPack = Tile::kPack;
  if (slot.size() == 0) return;
  if constexpr (Tile::kWhole) {
    store<kPack>(tensor + slot.at, pack, w.past_cache);
  } else {
    if (w.packs && slot.size() == kPack) return store<kPack>(tensor + slot.at, pack, w.past_cache);
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      if (holds<Tile>(slot, j)) tensor[slot.at + j] = pack.element[j];
  }
}

// The slot's bits of a mask (params.h), that of element j being bit j.
__device__ __forceinline__ unsigned load_bits(const uint8_t* mask, const Slot& slot) {
  return slot.size() ? mask[slot.at / 8] >> (slot.at % 8) : 0;
}

// Of whole packs neighbours in a warp have those of a byte; of others anybody may.
template <class Tile>
__device__ __forceinline__ void store_bits(uint8_t* mask, const Slot& slot, unsigned bits) {
  constexpr int kPack = Tile::kPack;
  if (slot.size() == 0) return;
  if constexpr (Tile::kWholePacks) {
    constexpr unsigned kSharing = kPack < 8 ? 8 / kPack : 1;
    const unsigned first = threadIdx.x % 32 / kSharing * kSharing, sharing = ((1u << kSharing) - 1) << first;
#pragma unroll
    for (unsigned lanes = 1; lanes < kSharing; lanes *= 2)
      bits |= __shfl_down_sync(sharing, bits, lanes, kSharing) << (lanes * kPack);
    if (slot.at % 8 == 0) mask[slot.at / 8] = static_cast<uint8_t>(bits);
  } else {
    const unsigned shift = slot.at % 32, all = (1u << slot.end) - (1u << slot.begin);
    unsigned* const word = reinterpret_cast<unsigned*>(mask) + slot.at / 32;
    atomicAnd(word, ~(all << shift));
    atomicOr(word, (bits & all) << shift);
  }
}

}  // namespace bnext::cuda
