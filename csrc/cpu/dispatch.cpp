// CPU backend: threads, scratch, and the registration of the ops for CPU tensors.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "../host.h"
#include "kernels.h"

namespace bnext::cpu {
namespace {

// Elements below which another thread costs more than it brings; torch's own grain.
constexpr int64_t kGrain = 32768;

// Calls f(begin, end) for parts of [0, size) on torch's threads.
template <class F>
void parallel(int64_t size, int64_t elements_each, F f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_each));
  at::parallel_for(0, size, grain, f);
}

// Channel by channel where channels can feed the threads: what reduce has read, apply finds in cache. Otherwise
// phase by phase over the whole tensor. Both give the same bits.
template <class Params>
void run(const Params& p, bool reduces, bool applies, Kernels::Range<Params> reduce, Kernels::Range<Params> finish,
         Kernels::Range<Params> apply) {
  const Tiling tiling(p);
  std::vector<double> partials(reduces ? 2 * tiling.chunks * p.C : 0), factors(4 * p.C);
  const Scratch scratch{partials.data(), factors.data()};
  if (p.layout == Layout::planar && p.C >= 4 * at::get_num_threads()) {
    parallel(p.C, p.count(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t unit = c * tiling.chunks;
        if (reduces) reduce(p, tiling, scratch, unit, unit + tiling.chunks);
        finish(p, tiling, scratch, c, c + 1);
        if (applies) apply(p, tiling, scratch, unit, unit + tiling.chunks);
      }
    });
    return;
  }
  const int64_t units = tiling.units(), unit_size = p.C * p.count() / units;
  if (reduces)
    parallel(units, unit_size, [&](int64_t begin, int64_t end) { reduce(p, tiling, scratch, begin, end); });
  parallel(p.C, tiling.chunks, [&](int64_t begin, int64_t end) { finish(p, tiling, scratch, begin, end); });
  if (applies) parallel(units, unit_size, [&](int64_t begin, int64_t end) { apply(p, tiling, scratch, begin, end); });
}

struct Backend {
  static void forward(const ForwardParams& p) {
    if (p.training && p.num_batches_tracked) ++*p.num_batches_tracked;
    const Kernels& k = scalar::kernels(p.dtype);
    run(p, p.training, true, k.forward_reduce, k.forward_finish, k.forward_apply);
  }
  static void backward(const BackwardParams& p) {
    const Kernels& k = scalar::kernels(p.dtype);
    run(p, p.reduces(), p.grad_input != nullptr, k.backward_reduce, k.backward_finish, k.backward_apply);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(bnext, CPU, m) { host::register_backend<Backend>(m); }

}  // namespace bnext::cpu
