// Every formula of batch normalisation, once. V is a scalar or a vector of lanes; P is V, or a scalar that is
// the same for all lanes; A is the type that statistics have. BNEXT_ISA is the namespace of the including unit: what
// each compiles for its instruction set must not be merged by the linker.
#pragma once

#include <cmath>
#include <cstdint>

#include "params.h"

namespace bnext::inline BNEXT_ISA::math {

// a * b + c: on a GPU rounded once, so that forward and backward agree whatever the compiler does around it; on the CPU
// rounded twice, as every instruction set can, but where vec.h says otherwise.
template <class V>
struct MultiplyAdd {
  template <class P, class Q>
  BNEXT_DEVICE static V of(V a, P b, Q c) {
    if constexpr (BNEXT_FUSED) {
      return std::fma(a, b, c);
    } else {
      return a * b + c;
    }
  }
};
template <class V, class P, class Q>
BNEXT_DEVICE inline V multiply_add(V a, P b, Q c) {
  return MultiplyAdd<V>::of(a, b, c);
}

// Mean and m2 = sum((x - mean)^2) of some values. The mean is kept in two parts, so that differences of means do not
// suffer from a large common one.
template <class A>
struct Moments {
  A origin, offset, m2;
  BNEXT_DEVICE A mean() const { return origin + offset; }
};

// What sums over a channel are made of: the first factor, and the product of both.
template <class V>
struct Factors {
  V first, second;
};
template <class V>
BNEXT_DEVICE inline void add(V* sum, const Factors<V>& f) {
  sum[0] += f.first;
  sum[1] = multiply_add(f.first, f.second, sum[1]);
}

// x - shift and its square.
template <class V, class P>
BNEXT_DEVICE inline Factors<V> shifted(V x, P shift) {
  const V d = x - shift;
  return {d, d};
}

// Welford (1962), for k values at once: takes values with sums sum(x - origin) and sum((x - origin)^2) about a's own
// origin into a, the moments of n values; inverse = 1 / (n + k). If the origin is the mean of a share of all n + k
// values, the second sum is by Cauchy-Schwarz at most (1 + 1 / share) * m2, so little cancels. N is A or its element.
template <class A, class N>
BNEXT_DEVICE inline void welford_push(Moments<A>& a, N n, const A* sum, N inverse) {
  const A total = sum[0] + n * a.offset, offset = total * inverse;
  const A m2 = a.m2 + (n * a.offset * a.offset + (sum[1] - total * offset));
  a.offset = offset;
  a.m2 = m2 < 0 ? A{} : m2;
}

// Moves the origin to the mean; what rounding takes from the sum of the two parts stays in the offset.
template <class A>
BNEXT_DEVICE inline void recenter(Moments<A>& a) {
  const A mean = a.mean(), moved = mean - a.origin;
  a.offset = (a.origin - (mean - moved)) + (a.offset - moved);
  a.origin = mean;
}

// Chan, Golub & LeVeque (1979): takes n_b values with moments b into a, the moments of n_a values. N is A or its
// element. Infinite means add up as they would in a sum: their difference would make a NaN of an infinity.
template <class A, class N>
BNEXT_DEVICE inline void chan_combine(Moments<A>& a, N n_a, const Moments<A>& b, N n_b) {
  if (n_b == 0) return;
  if (n_a == 0) {
    a = b;
    return;
  }
  const N share = n_b / (n_a + n_b);
  const A delta = (b.origin - a.origin) + (b.offset - a.offset);
  a.offset = delta - delta == 0 ? a.offset + delta * share : a.mean() + b.mean();
  a.m2 = a.m2 + b.m2 + delta * delta * (share * n_a);
}

// The variance that normalises divides by n; the one kept in running_var by n - 1 (torch.nn.BatchNorm2d).
template <class A>
BNEXT_DEVICE inline A biased_var(A m2, A n) {
  return m2 / n;
}
template <class A>
BNEXT_DEVICE inline A unbiased_var(A m2, A n) {
  return m2 / (n - 1);
}

template <class A>
BNEXT_DEVICE inline A invstd(A var, A eps) {
  return 1 / std::sqrt(var + eps);
}

// Weight of the newest batch in the running statistics; momentum=None asks for the cumulative average.
BNEXT_DEVICE inline double average_factor(bool cumulative, double momentum, std::int64_t num_batches_tracked) {
  return cumulative ? 1 / static_cast<double>(num_batches_tracked) : momentum;
}

template <class A>
BNEXT_DEVICE inline A update_running(A running, A batch, A factor) {
  return (1 - factor) * running + factor * batch;
}

// y = (x - mean) * (weight * invstd) + bias. Never x * scale + shift: the folded shift loses a large mean.
template <class V, class P>
BNEXT_DEVICE inline V normalize(V x, P mean, P scale, P bias) {
  return multiply_add(x - mean, scale, bias);
}

// dy and dy * (x - mean): what every gradient of a channel is made of.
template <class V, class P>
BNEXT_DEVICE inline Factors<V> products(V dy, V x, P mean) {
  return {dy, x - mean};
}

// Gradient through the batch's own statistics (Ioffe & Szegedy 2015, section 3), with
//   scale = weight * invstd, grad_mean = mean(dy), projection = mean(dy * (x - mean)) * invstd^2.
BNEXT_DEVICE inline double projection(double sum_dy_xmu, double invstd, double count) {
  return sum_dy_xmu / count * invstd * invstd;
}
template <class V, class P>
BNEXT_DEVICE inline V grad_input_train(V dy, V x, P mean, P scale, P grad_mean, P projection) {
  return multiply_add(mean - x, projection, dy - grad_mean) * scale;
}

BNEXT_DEVICE inline double grad_weight(double sum_dy_xmu, double invstd) {
  return sum_dy_xmu * invstd;
}

// Gradient when mean and invstd are constants.
template <class V, class P>
BNEXT_DEVICE inline V grad_input_eval(V dy, P scale) {
  return dy * scale;
}

// What follows the normalisation and the residual: forward, y of their sum z, and backward, the gradient of z; as
// torch's at 0, -0 and NaN. Of those with two slopes, passes(z) is the bit that backward needs, and gate takes it.
struct Identity {
  template <class V>
  BNEXT_DEVICE static V forward(V z) {
    return z;
  }
};
struct Relu {
  template <class V>
  BNEXT_DEVICE static V forward(V z) {
    return z < 0 ? V{} : z;
  }
  template <class V>
  BNEXT_DEVICE static auto passes(V z) {
    return !(z <= 0);
  }
  template <class V, class Passes>
  BNEXT_DEVICE static V gate(V dy, Passes passes) {
    return passes ? dy : V{};
  }
  template <class V>
  BNEXT_DEVICE static V backward(V dy, V z) {
    return gate(dy, passes(z));
  }
};

// e^x; cpu/exp.h has it for vectors.
template <class V>
struct Exp {
  BNEXT_DEVICE static V of(V x) { return std::exp(x); }
};
// 1 / x; on a GPU to two units in the last place, in float32: what else a division is ready for takes registers.
template <class V>
BNEXT_DEVICE inline V reciprocal(V x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 4) return __fdividef(1.0f, x);
#endif
  return 1 / x;
}
template <class V>
BNEXT_DEVICE inline V sigmoid(V z) {
  return reciprocal(1 + Exp<V>::of(-z));
}
template <class V>
BNEXT_DEVICE inline V clamp_to_6(V z) {
  return z < 0 ? V{} : z > 6 ? V{} + 6 : z;
}

// Any, chosen at run time; A is the type that elements are normalised in.
template <class A>
struct Activation {
  Act act;
  A slope;

  template <class V>
  BNEXT_DEVICE V forward(V z) const {
    switch (act) {
      case Act::relu:
        return Relu::forward(z);
      case Act::relu6:
        return clamp_to_6(z);
      case Act::leaky_relu:
        return z > 0 ? z : z * slope;
      case Act::silu:
        return z * sigmoid(z);
      case Act::hardswish:
        return z * (clamp_to_6(z + 3) * A(1.0 / 6));
      default:
        return z;
    }
  }
  template <class V>
  BNEXT_DEVICE auto passes(V z) const {
    return act == Act::relu ? Relu::passes(z) : act == Act::relu6 ? !((z <= 0) | (z >= 6)) : z > 0;
  }
  template <class V, class Passes>
  BNEXT_DEVICE V gate(V dy, Passes passes) const {
    return passes ? dy : act == Act::leaky_relu ? dy * slope : V{};
  }
  template <class V>
  BNEXT_DEVICE V backward(V dy, V z) const {
    switch (act) {
      case Act::relu:
      case Act::relu6:
      case Act::leaky_relu:
        return gate(dy, passes(z));
      case Act::silu: {
        const V s = sigmoid(z);
        return dy * s * (1 + z * (1 - s));
      }
      case Act::hardswish:
        return z <= -3 ? V{} : z < 3 ? dy * (z * A(1.0 / 3) + A(0.5)) : dy;
      default:
        return dy;
    }
  }
};

}  // namespace bnext::inline BNEXT_ISA::math
