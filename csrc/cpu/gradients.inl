// Ways from the gradient of the output, dy, to that of z, the activation's argument, for backward.inl. Each has
//   of(k, dy, x), k being mean, scale and bias, of which the first kShared are needed, or
//   of(k, dy, x, added) with kAdded, for a residual or its mask;
//   kResidual: whether grad_residual may be wanted; kInput, without it: whether x is looked at.
#pragma once

#include "common.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

// mean, scale and bias of channel c, as the forward had them.
template <class A>
struct OfForward {
  A factors[3];
};
template <class A>
OfForward<A> of_forward(const BackwardParams& p, int64_t c) {
  return {{static_cast<const A*>(p.mean)[c], scale_of(p, c, static_cast<const A*>(p.invstd)[c]), bias_of<A>(p, c)}};
}

// Without activation.
struct Plain {
  static constexpr int kShared = 1;
  static constexpr bool kAdded = false, kResidual = false, kInput = false;
  explicit Plain(const BackwardParams&) {}
  template <class K, class V>
  V of(const K*, V dy, V) const {
    return dy;
  }
};
// z = normalize(x), with the bits that it had in the forward.
struct ReluOfInput {
  static constexpr int kShared = 3;
  static constexpr bool kAdded = false, kResidual = false, kInput = true;
  explicit ReluOfInput(const BackwardParams&) {}
  template <class K, class V>
  V of(const K* k, V dy, V x) const {
    return math::Relu::backward(dy, math::normalize(x, k[0], k[1], k[2]));
  }
};
// Of dy that is Gated already.
struct ReluOfMask : Plain {
  static constexpr bool kResidual = true;
  using Plain::Plain;
};
// Any activation: by the mask, or else z = normalize(x), + residual where there is one. Called, not inlined: it is
// long.
template <class C>
struct AnyActivation {
  static constexpr int kShared = 3;
  static constexpr bool kAdded = true, kResidual = true;
  math::Activation<C> activation;
  bool masked, adds;
  explicit AnyActivation(const BackwardParams& p)
      : activation{p.act, static_cast<C>(p.slope)}, masked(p.mask), adds(p.residual) {}
  template <class K, class V>
  [[gnu::noinline]] V of(const K* k, V dy, V x, const Added<V>& added) const {
    if (masked) return activation.gate(dy, added.passes);
    V z = math::normalize(x, k[0], k[1], k[2]);
    if (adds) z = z + added.value;
    return activation.backward(dy, z);
  }
};

// f(the way that p needs), and f(grad_output, input, and what else it takes).
template <class T, class F>
void with_gradient(const BackwardParams& p, F f) {
  if (p.act == Act::identity) return f(Plain(p));
  if constexpr (kSpecialized<T>)
    if (p.act == Act::relu && !p.residual) return p.mask ? f(ReluOfMask(p)) : f(ReluOfInput(p));
  f(AnyActivation<Compute<T>>(p));
}
template <class T, class Gradient, class F>
void with_tensors(const BackwardParams& p, int64_t begin, F f) {
  const T *dy = static_cast<const T*>(p.grad_output) + begin, *x = static_cast<const T*>(p.input) + begin;
  if constexpr (Gradient::kAdded) {
    f(dy, x, Residual<T>{static_cast<const T*>(p.residual), p.mask} + begin);
  } else if constexpr (std::is_same_v<Gradient, ReluOfMask>) {
    f(Gated<T>{dy, p.mask, begin}, x);
  } else {
    f(dy, x);
  }
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
