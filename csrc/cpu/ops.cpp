// CPU backend: the registration of the ops for CPU tensors.
#include <torch/library.h>

#include "../host.h"
#include "kernels.h"

namespace bnext::cpu {
namespace {

struct Backend {
  static void forward(const ForwardParams& p, const at::Tensor&) {
    if (p.training && p.num_batches_tracked) {
      ++*p.num_batches_tracked;
      TORCH_CHECK_VALUE(!p.cumulative || *p.num_batches_tracked != 0,
                        "expected num_batches_tracked not to be 0 after this batch: momentum=None divides by it");
    }
    cpu::forward(p);
  }
  static void backward(const BackwardParams& p, const at::Tensor&) { cpu::backward(p); }
};

}  // namespace

TORCH_LIBRARY_IMPL(bnext, CPU, m) {
  host::register_backend<Backend>(m);
}

}  // namespace bnext::cpu
