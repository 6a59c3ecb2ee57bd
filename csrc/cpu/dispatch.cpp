// Threads and scratch of the CPU kernels. Of torch only at::parallel_for and at::get_num_threads, so that
// tests/sanitize can have threads of its own in their place.
#include <ATen/Parallel.h>

#include <memory>
#include <vector>

#include "kernels.h"

namespace bnext::cpu {
namespace {

using std::int64_t;

// Elements below which another thread costs more than it brings; torch's own grain.
constexpr int64_t kGrain = 32768;

// Elements that are taken in order where all are taken from the last to the first.
constexpr int64_t kBackwards = 131072;

// Calls f(begin, end) for parts of [0, size) on torch's threads.
template <class F>
void parallel(int64_t size, int64_t elements_each, F f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_each));
  at::parallel_for(0, size, grain, f);
}

// Reduces everything; chunk by chunk where channels lie side by side, else by runs of channels of a chunk.
template <class Params>
void reduce_all(const Params& p, const Tiling& tiling, const Scratch& scratch, const Steps<Params>& steps) {
  if (p.layout == Layout::channels_last) {
    parallel(tiling.chunks, p.C * p.count() / tiling.chunks,
             [&](int64_t begin, int64_t end) { steps.reduce(p, tiling, scratch, {0, p.C}, {begin, end}); });
    return;
  }
  parallel(tiling.chunks * p.C, p.count() / tiling.chunks, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t k = begin / p.C, c = begin % p.C, size = std::min(p.C - c, end - begin);
      steps.reduce(p, tiling, scratch, {c, c + size}, {k, k + 1});
      begin += size;
    }
  });
}

// Writes everything: by rows, those that were reduced last first, since the caches may still have them; or by planes in
// order of memory, cut into pieces where planes are few.
template <class Params>
void apply_all(const Params& p, const Scratch& scratch, const Steps<Params>& steps) {
  if (p.layout == Layout::channels_last) {
    const int64_t rows = Row(p.C).repeats;  // taken together
    const int64_t some = std::max<int64_t>(1, kBackwards / (rows * p.C));
    parallel((p.count() + rows - 1) / rows, rows * p.C, [&](int64_t begin, int64_t end) {
      for (int64_t first; end > begin; end = first) {
        first = std::max(begin, end - some);
        steps.apply(p, scratch, {0, p.C}, {rows * first, std::min(rows * end, p.count())});
      }
    });
    return;
  }
  const int64_t pieces = std::min<int64_t>(p.S, 1 + 4 * at::get_num_threads() / (p.N * p.C));
  parallel(p.N * pieces * p.C, p.S / pieces, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t piece = begin / p.C, c = begin % p.C, size = std::min(p.C - c, end - begin);
      const int64_t plane = piece / pieces * p.S, i = piece % pieces;
      steps.apply(p, scratch, {c, c + size}, {plane + p.S * i / pieces, plane + p.S * (i + 1) / pieces});
      begin += size;
    }
  });
}

// Group of channels by group, or step by step: see group_channels.
template <class Params>
void run(const Params& p, bool reduces, bool applies, int tensors, const Steps<Params>& steps) {
  const Tiling tiling(p);
  std::vector<double> partials(reduces ? 3 * tiling.chunks * p.C : 0), factors(5 * (Row(p.C).width() + 32));
  const int64_t group = group_channels(p, reduces, applies, tensors, at::get_num_threads());
  const std::unique_ptr<bool[]> normal(new bool[p.C]);
  const Scratch scratch{partials.data(), factors.data(), normal.get(),
                        streams(p, group, passes_of(tensors, reduces, applies))};
  if (group) {
    parallel(p.C, p.count(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c += group) {
        const Range channels{c, std::min(c + group, end)};
        steps.reduce(p, tiling, scratch, channels, {0, tiling.chunks});
        steps.finish(p, tiling, scratch, channels);
        steps.apply(p, scratch, channels, {0, p.count()});
      }
    });
    return;
  }
  if (reduces) reduce_all(p, tiling, scratch, steps);
  parallel(p.C, tiling.chunks, [&](int64_t begin, int64_t end) { steps.finish(p, tiling, scratch, {begin, end}); });
  if (applies) apply_all(p, scratch, steps);
}

}  // namespace

void forward(const ForwardParams& p) {
  run(p, p.training, true, 1, kernels(p.dtype).forward);
}

void backward(const BackwardParams& p) {
  run(p, p.reduces(), p.applies(), p.residual ? 3 : 2, kernels(p.dtype).backward);
}

}  // namespace bnext::cpu
