// Takes the place of csrc/cuda in a build without it: CUDA tensors get a sentence that says so.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "../cuda/plan.h"

namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.operator_name(),
                              ": input is on a CUDA device, and this bnext was built without ",
                              "CUDA kernels: rebuild it where nvcc is on PATH, with a torch built for CUDA");
}

}  // namespace

bnext::cuda::Device bnext::cuda::current_device() {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "this bnext was built without CUDA kernels");
}

TORCH_LIBRARY_IMPL(bnext, CUDA, m) {
  for (const char* op : {"batch_norm_train", "batch_norm_eval", "batch_norm_backward", "batch_norm_act_train",
                         "batch_norm_act_eval", "batch_norm_act_backward"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
}
