// The ops' schemas, once; each backend registers its implementation for its dispatch key, bnext/ops.py the
// fakes.
#include <torch/library.h>

TORCH_LIBRARY(bnext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  // input [N, C, *]; everything else [C], but num_batches_tracked, a scalar. Normalises by the batch's
  // statistics; updates the running buffers and the counter where given; momentum=None: by 1 /
  // num_batches_tracked. Given skipped_batches, channels with statistics that are not finite keep their running ones,
  // and are counted there. Returns output, and the mean and invstd [C] used, for the backward.
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "Tensor(d!)? skipped_batches=None) -> (Tensor output, Tensor mean, Tensor invstd)",
      tags);
  // Normalises by the running statistics; returns the same three.
  m.def(
      "batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps) -> (Tensor output, Tensor mean, Tensor invstd)",
      tags);
  // Gradients of input, weight and bias; those that output_mask leaves out are undefined and not computed.
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, "
      "bool training, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      tags);
  // The same three with act(y + residual) in place of y. act: identity, relu, relu6, leaky_relu (slope below 0), silu
  // or hardswish; residual like input. Where there is a residual, keep_mask asks for what the backward needs of relu,
  // relu6 and leaky_relu: uint8 [(numel + 7) / 8], bit j of byte i is whether the gradient passes element 8 i + j in
  // memory. The backward is given that mask, the residual of another activation, or no residual.
  m.def(
      "batch_norm_act_train(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, Tensor? residual, "
      "str act, float slope, bool keep_mask, Tensor(d!)? skipped_batches=None) "
      "-> (Tensor output, Tensor mean, Tensor invstd, Tensor mask)",
      tags);
  m.def(
      "batch_norm_act_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, Tensor? residual, str act, float slope, bool keep_mask) "
      "-> (Tensor output, Tensor mean, Tensor invstd, Tensor mask)",
      tags);
  m.def(
      "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, Tensor? residual, Tensor? mask, bool training, str act, float slope, bool[4] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      tags);
}
