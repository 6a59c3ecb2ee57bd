// Between ops.cpp, which has the tensors, dispatch.cpp, which owns the threads, and the instruction-set units, which
// own the loops.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace bnext::cpu {

// How a problem is cut into blocks: a function of its shape alone, so that no bit of a result depends on the
// threads. A plane is what one channel has contiguous: S elements of an image (planar), or one
// (channels_last, where the planes of all channels lie side by side in a row). A block is part of a plane or
// several planes: what short sums run over before they are combined. A chunk is a run of blocks: what is
// reduced to one partial result per channel.
struct Tiling {
  std::int64_t planes, plane;  // number of planes per channel, elements in each
  std::int64_t block_size, planes_per_block, blocks_per_plane, blocks, chunks;

  explicit Tiling(const Problem& p);

  struct Block {
    std::int64_t plane_begin, plane_end, begin, end;  // planes, and elements within each
    std::int64_t size() const { return end - begin; }
    std::int64_t count() const { return (plane_end - plane_begin) * size(); }
  };
  Block block(std::int64_t b) const;
  std::int64_t chunk_begin(std::int64_t chunk) const { return blocks * chunk / chunks; }
  // Values per channel in a chunk.
  std::int64_t chunk_count(std::int64_t chunk) const;
};

// Rows of C channels as the channels_last kernels see them: where C is small, several make one row of `width` columns,
// so that vectors are full; column i belongs to channel i % C.
struct Row {
  std::int64_t C, repeats;

  explicit Row(std::int64_t C);
  std::int64_t width() const { return repeats * C; }
};

// Channels that are reduced and then applied as a group, so that apply reads from cache what reduce has read; 0: each
// step over the whole tensor. Both give the same bits. tensors: how many reduce reads.
std::int64_t group_channels(const Problem& p, bool reduces, bool applies, int tensors, int threads);

constexpr std::int64_t kLine = 64;  // bytes of a cache line

// Bytes: BNEXT_CPU_LLC, or what Linux says. Throws std::invalid_argument if the variable is not a positive number.
std::int64_t last_level_cache();

// Whether so many passes over tensors [N, C, S] exceed half of the last cache, which others use too. If so, what is
// summed is asked for ahead, which costs more than it brings where the caches have it.
bool exceeds_caches(const Problem& p, int passes);
// Of a call that reads so many tensors, in each of its steps, and writes one.
constexpr int passes_of(int tensors, bool reduces, bool applies) {
  return tensors * (reduces + applies) + 1;
}
constexpr int kForwardPasses = passes_of(1, true, true), kBackwardPasses = passes_of(2, true, true);  // of training

// Whether the output of a call with so many passes is better written past the caches: they exceed them, and rows are
// whole cache lines, or what the planes of a group have contiguous is so long that the lines at its ends do not count.
bool streams(const Problem& p, std::int64_t group, int passes);

struct Range {
  std::int64_t begin, end;
};

// Scratch of one call.
struct Scratch {
  double* partials;  // [chunks, at most 3, C]: what a reduction found in each chunk
  void* factors;     // [5, Row(C).width()] of the compute type: what the elementwise pass needs of each column
  bool* normal;      // [C]: the elementwise pass makes no denormals of this channel, whatever its values are
  bool streaming;    // the elementwise pass writes past the caches
};

// One set for an instruction set and dtype. reduce reads the tensors once and writes partials; finish
// combines them in order of chunks and writes everything of size [C]; apply reads them again and writes the
// tensor [N, C, S], for some of each channel's N * S values. channels_last: reduce and apply take all
// channels together.
template <class Params>
struct Steps {
  void (*reduce)(const Params&, const Tiling&, const Scratch&, Range channels, Range chunks);
  void (*finish)(const Params&, const Tiling&, const Scratch&, Range channels);
  void (*apply)(const Params&, const Scratch&, Range channels, Range values);
};
struct Kernels {
  Steps<ForwardParams> forward;
  Steps<BackwardParams> backward;
};

// The instruction-set units; each compiles kernels.inl in a namespace of its own, so that the linker never
// merges two of them.
namespace scalar {
const Kernels& kernels(DType dtype);
}
namespace avx2 {
const Kernels& kernels(DType dtype);
}
namespace avx512 {
const Kernels& kernels(DType dtype);
}
namespace avx512bf16 {
const Kernels& kernels(DType dtype);  // bfloat16 alone
}

// The unit that runs, "scalar", "avx2", "avx512" or "avx512bf16" (which is avx512 with bfloat16's own instructions):
// the best that the machine has, or the one that BNEXT_CPU_ISA names. Chosen at the first call. Throws
// std::invalid_argument for a name that is none, or that this machine cannot run.
const char* isa();
const Kernels& kernels(DType dtype);

// A whole batch norm, and its backward, by that unit on torch's threads. The counter has moved already.
void forward(const ForwardParams& p);
void backward(const BackwardParams& p);

}  // namespace bnext::cpu
