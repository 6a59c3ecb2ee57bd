// Every formula of batch normalisation, once. V is a scalar or a vector of lanes; P is V, or a scalar that is
// the same for all lanes. BNEXT_ISA is the namespace of the including unit: what each compiles for its instruction set
// must not be merged by the linker.
#pragma once

#include <cmath>
#include <cstdint>

namespace bnext::inline BNEXT_ISA::math {

// Mean and m2 = sum((x - mean)^2) of some values. The mean is kept in two parts, so that differences of means do not
// suffer from a large common one.
struct Moments {
  double origin, offset, m2;
  double mean() const { return origin + offset; }
};

// sum[0] += x - shift, sum[1] += (x - shift)^2.
template <class V, class P>
inline void add_shifted(V* sum, V x, P shift) {
  const V d = x - shift;
  sum[0] += d;
  sum[1] += d * d;
}

// From sum(x - shift) and sum((x - shift)^2), for a shift that is the mean of a share of the values: by Cauchy-Schwarz
// the second sum is then at most (1 + 1 / share) * m2, so little cancels.
inline Moments unshift(double shift, double sum, double squares, double count) {
  const double m2 = squares - sum * sum / count;
  return {shift, sum / count, m2 < 0 ? 0 : m2};
}

// Chan, Golub & LeVeque (1979): takes n_b values with moments b into a, the moments of n_a values.
// Infinite means add up as they would in a sum: their difference would make a NaN of an infinity.
inline void chan_combine(Moments& a, double n_a, const Moments& b, double n_b) {
  if (n_a == 0) {
    a = b;
    return;
  }
  const double share = n_b / (n_a + n_b);
  const double delta = (b.origin - a.origin) + (b.offset - a.offset);
  a.offset = std::isfinite(delta) ? a.offset + delta * share : a.mean() + b.mean();
  a.m2 = a.m2 + b.m2 + delta * delta * (share * n_a);
}

// The variance that normalises divides by n; the one kept in running_var by n - 1 (torch.nn.BatchNorm2d).
inline double biased_var(double m2, double n) {
  return m2 / n;
}
inline double unbiased_var(double m2, double n) {
  return m2 / (n - 1);
}

inline double invstd(double var, double eps) {
  return 1 / std::sqrt(var + eps);
}

// Weight of the newest batch in the running statistics; momentum=None asks for the cumulative average.
inline double average_factor(bool cumulative, double momentum, std::int64_t num_batches_tracked) {
  return cumulative ? 1 / static_cast<double>(num_batches_tracked) : momentum;
}

inline double update_running(double running, double batch, double factor) {
  return (1 - factor) * running + factor * batch;
}

// y = (x - mean) * (weight * invstd) + bias. Never x * scale + shift: the folded shift loses a large mean.
template <class V, class P>
inline V normalize(V x, P mean, P scale, P bias) {
  return (x - mean) * scale + bias;
}

// sum[0] += dy, sum[1] += dy * (x - mean): what every gradient of a channel is made of.
template <class V, class P>
inline void add_products(V* sum, V dy, V x, P mean) {
  sum[0] += dy;
  sum[1] += dy * (x - mean);
}

// Gradient through the batch's own statistics (Ioffe & Szegedy 2015, section 3), with
//   scale = weight * invstd, grad_mean = mean(dy), projection = mean(dy * (x - mean)) * invstd^2.
inline double projection(double sum_dy_xmu, double invstd, double count) {
  return sum_dy_xmu / count * invstd * invstd;
}
template <class V, class P>
inline V grad_input_train(V dy, V x, P mean, P scale, P grad_mean, P projection) {
  return (dy - grad_mean - (x - mean) * projection) * scale;
}

inline double grad_weight(double sum_dy_xmu, double invstd) {
  return sum_dy_xmu * invstd;
}

// Gradient when mean and invstd are constants.
template <class V, class P>
inline V grad_input_eval(V dy, P scale) {
  return dy * scale;
}

// What follows the normalisation, chosen at compile time.
struct Identity {
  template <class V>
  static V forward(V y) {
    return y;
  }
};

}  // namespace bnext::inline BNEXT_ISA::math
