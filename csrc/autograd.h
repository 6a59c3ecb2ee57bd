// One call of batch norm on the ops, without Python between autograd and them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace bnext {

// bnext/function.py's BatchNormFunction.apply, by a node in C++. Runs without the GIL.
at::Tensor batch_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                      const std::optional<at::Tensor>& running_var,
                      const std::optional<at::Tensor>& num_batches_tracked, bool training,
                      std::optional<double> momentum, double eps, const std::optional<at::Tensor>& skipped_batches);

}  // namespace bnext
