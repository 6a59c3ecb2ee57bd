#include "autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <tuple>
#include <vector>

#include "checks.h"

namespace bnext {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;
using host::check::has;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What is not differentiated.
struct Rest {
  const OptTensor &running_mean, &running_var, &num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
  const OptTensor& skipped_batches;
};

// output, mean and invstd from the op that rest.training asks for. The ops have no autograd of their own, and torch's
// stand-in for it costs time.
ThreeTensors forward(const Tensor& input, const OptTensor& weight, const OptTensor& bias, const Rest& rest) {
  const at::AutoDispatchBelowAutograd below;
  if (rest.training) {
    using Train = ThreeTensors(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                               const OptTensor&, std::optional<double>, double, const OptTensor&);
    static const auto train = op<Train>("bnext::batch_norm_train");
    return train.call(input, weight, bias, rest.running_mean, rest.running_var, rest.num_batches_tracked, rest.momentum,
                      rest.eps, rest.skipped_batches);
  }
  using Eval = ThreeTensors(const Tensor&, const OptTensor&, const OptTensor&, const Tensor&, const Tensor&, double);
  static const auto eval = op<Eval>("bnext::batch_norm_eval");
  return eval.call(input, weight, bias, rest.running_mean.value_or(Tensor()), rest.running_var.value_or(Tensor()),
                   rest.eps);
}

// The gradients that mask asks for, by the op.
ThreeTensors backward(const Tensor& grad_output, const variable_list& saved, bool training, Mask mask) {
  const at::AutoDispatchBelowAutograd below;
  using Backward =
      ThreeTensors(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const Tensor&, bool, Mask);
  static const auto backward = op<Backward>("bnext::batch_norm_backward");
  return backward.call(grad_output, saved[0], saved[1], saved[2], saved[3], training, mask);
}

// The same by bnext/function.py, where the gradients themselves are differentiated, batched or traced.
ThreeTensors backward_in_python(const Tensor& grad_output, const variable_list& saved, bool training, double eps,
                                Mask mask) {
  const pybind11::gil_scoped_acquire gil;
  const auto optional = [](const Tensor& t) { return t.defined() ? OptTensor(t) : std::nullopt; };
  const auto found = pybind11::module_::import("bnext.function")
                         .attr("backward")(grad_output, saved[0], optional(saved[1]), saved[2], saved[3], training, eps,
                                           pybind11::make_tuple(mask[0], mask[1], mask[2]))
                         .cast<std::array<OptTensor, 3>>();
  const auto tensor = [&](size_t i) { return found[i].value_or(Tensor()); };
  return {tensor(0), tensor(1), tensor(2)};
}

// Whether something is to look through a backward: bnext/fallbacks.py's backward_needs_formula, and create_graph=True.
bool looked_through(std::initializer_list<const Tensor*> tensors) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet modes({DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::Tracer});
  constexpr c10::DispatchKeySet wrappers(
      {DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper, DispatchKey::Batched});
  if (at::GradMode::is_enabled() || c10::impl::tls_local_dispatch_key_set().included_.has_any(modes)) return true;
  for (const Tensor* t : tensors)
    if (t->defined() && (t->key_set().has_any(wrappers) || t->_fw_grad(0).defined())) return true;
  return false;
}

}  // namespace

// The profiler and anomaly mode show its name.
struct BatchNorm : torch::autograd::Function<BatchNorm> {
  using Call = std::tuple<bool, double, bool>;  // training, eps, whether there is a bias
  static constexpr bool is_traceable = true;    // by compiled autograd: everything is in ctx

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptTensor& weight, const OptTensor& bias,
                        const Rest& rest) {
    auto [output, mean, invstd] = bnext::forward(input, weight, bias, rest);
    ctx->save_for_backward({input, weight.value_or(Tensor()), mean, invstd});
    ctx->saved_data["call"] = Call{rest.training, rest.eps, has(bias)};
    ctx->set_materialize_grads(false);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(4);
    const variable_list saved = ctx->get_saved_variables();
    const auto [training, eps, has_bias] = ctx->saved_data["call"].to<Call>();
    Mask mask{};
    size_t edge = 0;  // an argument that was not given has none
    for (const auto& [i, given] : {std::pair{0, true}, {1, saved[1].defined()}, {2, has_bias}})
      mask[i] = given && ctx->needs_input_grad(edge++);
    auto [input, weight, bias] = looked_through({&grads[0], &saved[0], &saved[1]})
                                     ? backward_in_python(grads[0], saved, training, eps, mask)
                                     : bnext::backward(grads[0], saved, training, mask);
    return {input, weight, bias, Tensor()};
  }
};

Tensor batch_norm(const Tensor& input, const OptTensor& weight, const OptTensor& bias, const OptTensor& running_mean,
                  const OptTensor& running_var, const OptTensor& num_batches_tracked, bool training,
                  std::optional<double> momentum, double eps, const OptTensor& skipped_batches) {
  const Rest rest{running_mean, running_var, num_batches_tracked, training, momentum, eps, skipped_batches};
  const auto wants_gradient = [](const OptTensor& t) { return has(t) && t->requires_grad(); };
  if (!at::GradMode::is_enabled() || !(input.requires_grad() || wants_gradient(weight) || wants_gradient(bias)))
    return std::get<0>(forward(input, weight, bias, rest));
  // The op's gradient is [C], whatever the shape of what it belongs to.
  const OptTensor flat = has(bias) && bias->dim() != 1 ? bias->reshape({-1}) : bias;
  return BatchNorm::apply(input, weight, flat, rest);
}

}  // namespace bnext
