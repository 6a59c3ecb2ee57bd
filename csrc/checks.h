// What torch refuses, refused with the same class of error and at least its information
// (torch.nn.functional.batch_norm and aten's native_batch_norm). Every check comes before the first write.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <iterator>
#include <optional>
#include <string_view>

#include "params.h"

namespace bnext::host::check {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline bool has(const OptTensor& t) {
  return t && t->defined();
}

// Kernels take pointers: a tensor that is required must be one, and have the memory that its sizes say. FSDP and others
// free it by untyped_storage().resize_(0).
inline void memory(const char* name, const OptTensor& t) {
  if (!has(t) || t->numel() == 0) return;
  const size_t needed =
      at::detail::computeStorageNbytes(t->sizes(), t->strides(), t->itemsize(), t->sym_storage_offset().expect_int());
  TORCH_CHECK(t->storage().nbytes() >= needed, "expected ", name, " of shape ", t->sizes(), " to have ", needed,
              " bytes of storage, got ", t->storage().nbytes(), ": its data is not allocated");
}
inline void required(const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), "expected ", name, " to be a Tensor, got None");
}

// C of [N, C, *]; a tensor of one dimension and no elements has no channels.
inline int64_t channel_count(const Tensor& input) {
  return input.dim() > 1 ? input.size(1) : 0;
}

inline void input(const Tensor& input) {
  required("input", input);
  const at::ScalarType dtype = input.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      "\"batch_norm\" not implemented for '", dtype, "': expected input to be float64, float32, bfloat16 or float16");
  TORCH_CHECK(input.dim() >= 2 || input.sizes() == at::IntArrayRef{0},
              "expected input to have at least 2 dimensions (N, C, ...), got shape ", input.sizes());
}

// An argument with one value a channel.
inline void channels(const char* name, const OptTensor& t, const Tensor& input, at::ScalarType dtype) {
  if (!has(t)) return;
  TORCH_CHECK(t->device() == input.device(), "expected ", name, " to be on ", input.device(), " as input, got ",
              t->device());
  TORCH_CHECK(t->numel() == channel_count(input), name, " should contain ", channel_count(input), " elements not ",
              t->numel());
  TORCH_CHECK(t->scalar_type() == dtype, "mixed dtype: expected ", name, " to have scalar type ", dtype,
              " for input of ", input.scalar_type(), ", got ", t->scalar_type());
  memory(name, t);
}

// Parameters and buffers are all of the input's dtype, or, for half input, all of float32.
inline at::ScalarType param_dtype(const Tensor& input, std::initializer_list<const OptTensor*> params) {
  const bool half = input.scalar_type() == at::kBFloat16 || input.scalar_type() == at::kHalf;
  for (const OptTensor* t : params)
    if (half && has(*t) && (*t)->scalar_type() == at::kFloat) return at::kFloat;
  return input.scalar_type();
}

inline void arguments(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
                      const OptTensor& running_var) {
  input(x);
  memory("input", x);
  const at::ScalarType dtype = param_dtype(x, {&weight, &bias, &running_mean, &running_var});
  channels("running_mean", running_mean, x, dtype);
  channels("running_var", running_var, x, dtype);
  channels("weight", weight, x, dtype);
  channels("bias", bias, x, dtype);
  for (const OptTensor* buffer : {&running_mean, &running_var})
    TORCH_CHECK(!has(*buffer) || (*buffer)->dim() == 1,
                "expected running_mean and running_var to have 1 dimension, got ", (*buffer)->dim());
  TORCH_CHECK_INDEX(channel_count(x) > 0 || !(has(weight) || has(bias)),
                    "expected input to have at least one channel, got shape ", x.sizes());
}

inline void train(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
                  const OptTensor& running_var, const OptTensor& counter, double eps, const OptTensor& skipped) {
  required("input", x);
  TORCH_CHECK_INDEX(x.dim() > 0, "expected input to have at least 2 dimensions (N, C, ...), got a scalar");
  int64_t count = x.size(0);
  for (int64_t d = 2; d < x.dim(); ++d) count *= x.size(d);
  TORCH_CHECK_VALUE(count != 1, "Expected more than 1 value per channel when training, got input size torch.Size(",
                    x.sizes(), ")");
  TORCH_CHECK_VALUE(!(eps <= 0), "batch_norm eps must be positive during training, but got ", eps);
  TORCH_CHECK_VALUE(has(running_mean) == has(running_var),
                    "running_mean and running_var must either both be None or neither be None");
  arguments(x, weight, bias, running_mean, running_var);
  for (const OptTensor* buffer : {&running_mean, &running_var})
    TORCH_CHECK(!has(*buffer) || (*buffer)->size(0) < 2 || (*buffer)->stride(0) != 0,
                "expected running_mean and running_var to have memory for each channel, got an expanded one");
  if (has(counter)) {
    TORCH_CHECK(counter->numel() == 1, "expected num_batches_tracked to have one element, got shape ",
                counter->sizes());
    TORCH_CHECK(counter->device() == x.device(), "expected num_batches_tracked to be on ", x.device(),
                " as input, got ", counter->device());
  }
  channels("skipped_batches", skipped, x, at::kLong);
  TORCH_CHECK(!has(skipped) || skipped->is_contiguous(), "expected skipped_batches to be contiguous, got strides ",
              skipped->strides());
}

inline void eval(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& running_mean,
                 const Tensor& running_var, double eps) {
  TORCH_CHECK_VALUE(!(eps < 0), "batch_norm eps must be non-negative, but got ", eps);
  TORCH_CHECK(running_mean.defined(), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(running_var.defined(), "running_var must be defined in evaluation mode");
  arguments(x, weight, bias, running_mean, running_var);
}

// The activation of that name; bnext/activation.py has the same names.
inline Act activation(std::string_view name) {
  constexpr std::string_view kNames[] = {"identity", "relu", "relu6", "leaky_relu", "silu", "hardswish"};
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  TORCH_CHECK_VALUE(found != std::end(kNames), "expected act to be one of ", at::ArrayRef(kNames), ", got ", name);
  return static_cast<Act>(found - kNames);
}

// A tensor with an element for each of input's, which lies in memory as input does.
inline void like_input(const char* name, const OptTensor& t, const Tensor& x, at::MemoryFormat format) {
  if (!has(t)) return;
  memory(name, t);
  TORCH_CHECK(t->sizes() == x.sizes(), "expected ", name, " to have the shape of input, ", x.sizes(), ", got ",
              t->sizes());
  TORCH_CHECK(t->scalar_type() == x.scalar_type() && t->device() == x.device(), "expected ", name, " to be ",
              x.scalar_type(), " on ", x.device(), " as input, got ", t->scalar_type(), " on ", t->device());
  TORCH_CHECK(x.numel() == 0 || t->is_contiguous(format) || t->suggest_memory_format() == format, "expected ", name,
              " to have the memory format of input, ", format, ", got strides ", t->strides());
}

// The mask of a forward on x.
inline void mask(const OptTensor& mask, const Tensor& x, Act act) {
  if (!has(mask)) return;
  TORCH_CHECK_VALUE(has_two_slopes(act), "expected no mask but for relu, relu6 and leaky_relu");
  memory("mask", mask);
  TORCH_CHECK(mask->scalar_type() == at::kByte && mask->device() == x.device() && mask->is_contiguous() &&
                  mask->numel() == (x.numel() + 7) / 8,
              "expected mask to be contiguous, with ", (x.numel() + 7) / 8, " uint8 on ", x.device(), ", got shape ",
              mask->sizes(), " of ", mask->scalar_type(), " on ", mask->device());
}

inline void backward(const Tensor& grad_output, const Tensor& x, const OptTensor& weight, const Tensor& mean,
                     const Tensor& invstd, at::ScalarType stats_dtype) {
  input(x);
  required("grad_output", grad_output);
  required("mean", mean);
  required("invstd", invstd);
  memory("input", x);
  memory("grad_output", grad_output);
  TORCH_CHECK(grad_output.sizes() == x.sizes(), "expected grad_output to have the shape of input, ", x.sizes(),
              ", got ", grad_output.sizes());
  TORCH_CHECK(grad_output.scalar_type() == x.scalar_type() && grad_output.device() == x.device(),
              "expected grad_output to be ", x.scalar_type(), " on ", x.device(), " as input, got ",
              grad_output.scalar_type(), " on ", grad_output.device());
  channels("weight", weight, x, param_dtype(x, {&weight}));
  channels("mean", mean, x, stats_dtype);
  channels("invstd", invstd, x, stats_dtype);
}

}  // namespace bnext::host::check
