// Host side of the ops, once for all backends: checks, memory layout, allocation, parameter structs.
// A backend is a type with static forward(const ForwardParams&, const Tensor& input) and backward, of BackwardParams;
// the input tells the device, and how to allocate on it.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"
#include "params.h"

namespace bnext::host {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using check::has;

// Of a tensor that has passed check::input.
inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kFloat:
      return DType::float32;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      return DType::float16;
  }
}

// dtype of the saved mean and invstd.
inline at::TensorOptions stats_options(const Tensor& input) {
  return input.options().dtype(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Of the output, as torch chooses it where sizes of 1 leave a choice. grad_input: input.suggest_memory_format().
inline at::MemoryFormat output_format(const Tensor& input) {
  const auto is = [&](at::MemoryFormat format) { return input.is_contiguous(format); };
  if (is(at::MemoryFormat::Contiguous)) return at::MemoryFormat::Contiguous;
  if (input.dim() == 4 && is(at::MemoryFormat::ChannelsLast)) return at::MemoryFormat::ChannelsLast;
  if (input.dim() == 5 && is(at::MemoryFormat::ChannelsLast3d)) return at::MemoryFormat::ChannelsLast3d;
  return input.suggest_memory_format();
}

// `input` must be dense in `format`. Without spatial size the layouts coincide, and count as channels_last.
inline void set_problem(Problem& p, const Tensor& input, at::MemoryFormat format, DType param_dtype) {
  p.N = input.size(0);
  p.C = input.size(1);
  p.S = input.numel() / (p.N * p.C);
  const bool planar = format == at::MemoryFormat::Contiguous && p.S != 1;
  p.layout = planar || p.C == 1 ? Layout::planar : Layout::channels_last;
  p.dtype = dtype_of(input);
  p.param_dtype = param_dtype;
}

// A [C] argument as kernels take it; null when absent.
class Channels {
 public:
  explicit Channels(const OptTensor& t) {
    if (has(t)) tensor_ = t->contiguous();
  }
  void* data() const { return tensor_.defined() ? tensor_.data_ptr() : nullptr; }
  // A kernel has written to data(): brings that into the caller's tensor if contiguous() made a copy.
  void write_back(const OptTensor& t) const {
    if (tensor_.defined() && !tensor_.is_same(*t)) t->copy_(tensor_);
  }

 private:
  Tensor tensor_;
};

inline void* data(const Tensor& t) {
  return t.defined() ? t.data_ptr() : nullptr;
}

// Points the kernel at the counter. One that is not int64 (Module.type() casts it too) is counted here.
inline void set_counter(ForwardParams& p, const OptTensor& counter, std::optional<double> momentum) {
  p.cumulative = has(counter) && !momentum;
  p.momentum = momentum.value_or(0.0);
  if (!has(counter)) return;
  if (counter->scalar_type() == at::kLong) {
    counter->unsafeGetTensorImpl()->bump_version();
    p.num_batches_tracked = counter->data_ptr<int64_t>();
    return;
  }
  counter->add_(1);
  if (p.cumulative) p.momentum = 1 / counter->item<double>();
  p.cumulative = false;
}

inline ThreeTensors first_three(FourTensors&& all) {
  auto& [first, second, third, fourth] = all;
  return {std::move(first), std::move(second), std::move(third)};
}

// What follows the normalisation. keep_mask: a backward will need the mask, where there is one.
struct After {
  OptTensor residual;
  Act act = Act::identity;
  double slope = 0;
  bool keep_mask = false;
};

// output, mean, invstd and the mask.
template <class Backend>
FourTensors forward(const Tensor& input, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
                    const OptTensor& running_var, const OptTensor& counter, std::optional<double> momentum, double eps,
                    bool training, const OptTensor& skipped, const After& after) {
  Tensor mask;
  if (after.keep_mask && has(after.residual) && has_two_slopes(after.act)) {
    // Memory for whole words, by which GPUs put bits into it.
    mask = at::empty({(input.numel() + 31) / 32 * 4}, input.options().dtype(at::kByte));
    mask.resize_({(input.numel() + 7) / 8});
  }
  if (input.numel() == 0) {
    if (training && has(counter)) counter->add_(1);
    const auto zeros = [&] { return at::zeros({check::channel_count(input)}, stats_options(input)); };
    return {at::empty_like(input), zeros(), zeros(), mask};
  }
  const at::MemoryFormat format = output_format(input);
  const Tensor x = input.contiguous(format);
  const Tensor residual = has(after.residual) ? after.residual->contiguous(format) : Tensor();
  Tensor output = at::empty_like(x, format);
  const auto statistic = [&] { return at::empty({input.size(1)}, stats_options(input)); };
  Tensor mean = statistic(), invstd = statistic();
  const Channels weight_(weight), bias_(bias), running_mean_(running_mean), running_var_(running_var);

  ForwardParams p{};
  const OptTensor& any = has(weight) ? weight : has(bias) ? bias : running_mean;
  set_problem(p, x, format, dtype_of(has(any) ? *any : input));
  p.input = x.data_ptr();
  p.output = output.data_ptr();
  p.weight = weight_.data();
  p.bias = bias_.data();
  p.running_mean = running_mean_.data();
  p.running_var = running_var_.data();
  p.mean = mean.data_ptr();
  p.invstd = invstd.data_ptr();
  p.eps = eps;
  p.training = training;
  p.residual = data(residual);
  p.act = after.act;
  p.slope = after.slope;
  p.mask = static_cast<std::uint8_t*>(data(mask));
  if (training) set_counter(p, counter, momentum);
  if (has(skipped)) p.skipped_batches = skipped->data_ptr<int64_t>();
  Backend::forward(p, x);
  if (training) {
    running_mean_.write_back(running_mean);
    running_var_.write_back(running_var);
  }
  return {output, mean, invstd, mask};
}

template <class Backend>
ThreeTensors batch_norm_train(const Tensor& input, const OptTensor& weight, const OptTensor& bias,
                              const OptTensor& running_mean, const OptTensor& running_var,
                              const OptTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                              const OptTensor& skipped_batches) {
  check::train(input, weight, bias, running_mean, running_var, num_batches_tracked, eps, skipped_batches);
  return first_three(forward<Backend>(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                                      eps, true, skipped_batches, {}));
}

template <class Backend>
ThreeTensors batch_norm_eval(const Tensor& input, const OptTensor& weight, const OptTensor& bias,
                             const Tensor& running_mean, const Tensor& running_var, double eps) {
  check::eval(input, weight, bias, running_mean, running_var, eps);
  return first_three(forward<Backend>(input, weight, bias, running_mean, running_var, {}, {}, eps, false, {}, {}));
}

inline After after(const Tensor& input, const OptTensor& residual, std::string_view act, double slope, bool keep_mask) {
  check::like_input("residual", residual, input, output_format(input));
  return {residual, check::activation(act), slope, keep_mask};
}

template <class Backend>
FourTensors batch_norm_act_train(const Tensor& input, const OptTensor& weight, const OptTensor& bias,
                                 const OptTensor& running_mean, const OptTensor& running_var,
                                 const OptTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                                 const OptTensor& residual, std::string_view act, double slope, bool keep_mask,
                                 const OptTensor& skipped_batches) {
  check::train(input, weight, bias, running_mean, running_var, num_batches_tracked, eps, skipped_batches);
  return forward<Backend>(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, true,
                          skipped_batches, after(input, residual, act, slope, keep_mask));
}

template <class Backend>
FourTensors batch_norm_act_eval(const Tensor& input, const OptTensor& weight, const OptTensor& bias,
                                const Tensor& running_mean, const Tensor& running_var, double eps,
                                const OptTensor& residual, std::string_view act, double slope, bool keep_mask) {
  check::eval(input, weight, bias, running_mean, running_var, eps);
  return forward<Backend>(input, weight, bias, running_mean, running_var, {}, {}, eps, false, {},
                          after(input, residual, act, slope, keep_mask));
}

// What the backward knows of what follows the normalisation.
struct AfterForward {
  OptTensor bias, residual, mask;
  Act act = Act::identity;
  double slope = 0;
};

// Gradients of input, weight, bias and residual.
template <class Backend>
FourTensors backward(const Tensor& grad_output, const Tensor& input, const OptTensor& weight, const Tensor& mean,
                     const Tensor& invstd, bool training, std::array<bool, 4> output_mask, const AfterForward& after) {
  check::backward(grad_output, input, weight, mean, invstd, stats_options(input).dtype().toScalarType());
  const at::MemoryFormat format = input.suggest_memory_format();
  const Tensor& param = has(weight) ? *weight : mean;
  Tensor grad_input, grad_weight, grad_bias, grad_residual;
  if (output_mask[0]) grad_input = input.numel() ? at::empty_like(input, format) : at::empty_like(input);
  if (output_mask[3]) grad_residual = input.numel() ? at::empty_like(input, format) : at::empty_like(input);
  if (output_mask[1] && has(weight)) grad_weight = at::empty_like(*weight, at::MemoryFormat::Contiguous);
  if (output_mask[2]) grad_bias = at::empty({check::channel_count(input)}, param.options());
  if (input.numel() == 0) {
    for (Tensor* grad : {&grad_weight, &grad_bias})
      if (grad->defined()) grad->zero_();
    return {grad_input, grad_weight, grad_bias, grad_residual};
  }

  const Tensor x = input.contiguous(format), dy = grad_output.contiguous(format);
  const Tensor residual = has(after.residual) ? after.residual->contiguous(format) : Tensor();
  const Channels weight_(weight), bias_(after.bias), mean_(mean), invstd_(invstd);
  BackwardParams p{};
  set_problem(p, x, format, dtype_of(param));
  p.grad_output = dy.data_ptr();
  p.input = x.data_ptr();
  p.weight = weight_.data();
  p.bias = bias_.data();
  p.mean = mean_.data();
  p.invstd = invstd_.data();
  p.act = after.act;
  p.slope = after.slope;
  p.residual = data(residual);
  p.mask = static_cast<const std::uint8_t*>(has(after.mask) ? after.mask->data_ptr() : nullptr);
  p.grad_input = data(grad_input);
  p.grad_residual = data(grad_residual);
  p.grad_weight = data(grad_weight);
  p.grad_bias = data(grad_bias);
  p.training = training;
  Backend::backward(p, x);
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

template <class Backend>
ThreeTensors batch_norm_backward(const Tensor& grad_output, const Tensor& input, const OptTensor& weight,
                                 const Tensor& mean, const Tensor& invstd, bool training,
                                 std::array<bool, 3> output_mask) {
  const auto& [of_input, of_weight, of_bias] = output_mask;
  return first_three(
      backward<Backend>(grad_output, input, weight, mean, invstd, training, {of_input, of_weight, of_bias, false}, {}));
}

template <class Backend>
FourTensors batch_norm_act_backward(const Tensor& grad_output, const Tensor& input, const OptTensor& weight,
                                    const OptTensor& bias, const Tensor& mean, const Tensor& invstd,
                                    const OptTensor& residual, const OptTensor& mask, bool training,
                                    std::string_view act, double slope, std::array<bool, 4> output_mask) {
  check::input(input);
  check::like_input("residual", residual, input, output_format(input));
  const Act activation = check::activation(act);
  check::mask(mask, input, activation);
  TORCH_CHECK_VALUE(!(output_mask[3] && activation == Act::identity),
                    "expected output_mask[3] to be False for identity, after which grad_residual is grad_output");
  check::channels("bias", bias, input, check::param_dtype(input, {&weight, &bias}));
  return backward<Backend>(grad_output, input, weight, mean, invstd, training, output_mask,
                           {bias, residual, mask, activation, slope});
}

// The ops of csrc/ops.cpp on one backend.
template <class Backend>
void register_backend(torch::Library& m) {
  m.impl("batch_norm_train", &batch_norm_train<Backend>);
  m.impl("batch_norm_eval", &batch_norm_eval<Backend>);
  m.impl("batch_norm_backward", &batch_norm_backward<Backend>);
  m.impl("batch_norm_act_train", &batch_norm_act_train<Backend>);
  m.impl("batch_norm_act_eval", &batch_norm_act_eval<Backend>);
  m.impl("batch_norm_act_backward", &batch_norm_act_backward<Backend>);
}

}  // namespace bnext::host
