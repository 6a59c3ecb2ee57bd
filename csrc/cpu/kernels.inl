// The CPU loops, compiled once for each instruction set: the unit that includes this defines BNEXT_ISA (the
// namespace) and BNEXT_VECTOR_BYTES.
//
// Statistics are two-pass within a block, which the second pass finds in cache, and combined by Chan's formula
// across blocks, all in double. Every sum has one order, given by the shape and the register width.
// Bytes from main memory, with E = N * C * S * itemsize: reduce reads E (forward) or 2E (backward); apply reads the
// same again, from cache where a channel's data is still there, and writes E.
#include <vector>

#include "../math.h"
#include "kernels.h"
#include "vec.h"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using std::int64_t;

// Compute type of the elementwise passes, and of the saved mean and invstd.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

double read(const void* p, DType dtype, int64_t i) {
  return dtype == DType::float64 ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
}
void write(void* p, DType dtype, int64_t i, double value) {
  if (dtype == DType::float64) {
    static_cast<double*>(p)[i] = value;
  } else {
    static_cast<float*>(p)[i] = static_cast<float>(value);
  }
}

// ---- reductions ----------------------------------------------------------------------------------------------

// Sums over runs of consecutive elements: term t is what f adds to sum[t] for each element.
template <int terms>
class RunSums {
 public:
  template <class F, class... T>
  void add(int64_t count, F f, const T*... p) {
    constexpr int kLanes = lanes<double>;
    int64_t i = 0;
    for (; i + kLanes * kUnroll <= count; i += kLanes * kUnroll)
      unrolled<kUnroll>([&](auto u) { f(sums_[u], load<double>(p + i + u * kLanes)...); });
    for (; i + kLanes <= count; i += kLanes) f(sums_[0], load<double>(p + i)...);
    for (; i < count; ++i) f(tail_, static_cast<double>(p[i])...);
  }
  double total(int term) const {
    Vec<double> v = sums_[0][term];
    for (int u = 1; u < kUnroll; ++u) v += sums_[u][term];
    double total = tail_[term];
    for (int lane = 0; lane < lanes<double>; ++lane) total += v[lane];
    return total;
  }

 private:
  static constexpr int kUnroll = 4;
  Vec<double> sums_[kUnroll][terms] = {};
  double tail_[terms] = {};
};

// Sums over rows of C channels, one for each channel: sums[t * C + c] += what f adds to sum[t] for each row's element
// c. f also gets channel[c], a value that all rows share. Eight rows at a time, so that sums are seldom loaded.
template <int terms, class F, class K, class... T>
void add_rows(double* sums, int64_t C, int64_t rows, F f, const K* channel, const T*... p) {
  constexpr int kLanes = lanes<double>, kRows = 8;
  auto pass = [&](auto row_count, int64_t row) {
    int64_t c = 0;
    for (; c + kLanes <= C; c += kLanes) {
      Vec<double> sum[terms];
      unrolled<terms>([&](auto t) { sum[t] = load<double>(sums + t * C + c); });
      const Vec<double> k = load<double>(channel + c);
      unrolled<row_count>([&](auto r) { f(sum, k, load<double>(p + (row + r) * C + c)...); });
      unrolled<terms>([&](auto t) { store<double>(sums + t * C + c, sum[t]); });
    }
    for (; c < C; ++c) {
      double sum[terms];
      unrolled<terms>([&](auto t) { sum[t] = sums[t * C + c]; });
      unrolled<row_count>(
          [&](auto r) { f(sum, static_cast<double>(channel[c]), static_cast<double>(p[(row + r) * C + c])...); });
      unrolled<terms>([&](auto t) { sums[t * C + c] = sum[t]; });
    }
  };
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) pass(std::integral_constant<int, kRows>{}, row);
  for (; row < rows; ++row) pass(std::integral_constant<int, 1>{}, row);
}

// partials[k, 0, c] = mean, partials[k, 1, c] = m2 of the unit's values.
template <class T>
void forward_reduce_planar(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, int64_t begin,
                           int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit / tiling.chunks, k = unit % tiling.chunks;
    double mean = 0, m2 = 0, count = 0;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      const T* x = static_cast<const T*>(p.input) + c * p.S + block.begin;
      auto each_plane = [&](auto&& f) {
        for (int64_t n = block.plane_begin; n < block.plane_end; ++n) f(x + n * p.C * p.S, block.end - block.begin);
      };
      const double n = static_cast<double>(block.count());
      RunSums<1> sum, squares;
      each_plane([&](const T* run, int64_t size) { sum.add(size, [](auto* s, auto v) { s[0] += v; }, run); });
      const double block_mean = sum.total(0) / n;
      each_plane([&](const T* run, int64_t size) {
        squares.add(size, [=](auto* s, auto v) { s[0] += (v - block_mean) * (v - block_mean); }, run);
      });
      math::chan_combine(mean, m2, count, block_mean, squares.total(0), n);
      count += n;
    }
    scratch.partials[(2 * k) * p.C + c] = mean;
    scratch.partials[(2 * k + 1) * p.C + c] = m2;
  }
}

template <class T>
void forward_reduce_channels_last(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch,
                                  int64_t begin, int64_t end) {
  const int64_t C = p.C;
  std::vector<double> block_stats(2 * C);
  double* block_mean = block_stats.data();
  double* block_m2 = block_mean + C;
  for (int64_t k = begin; k < end; ++k) {
    double* mean = scratch.partials + 2 * k * C;
    double* m2 = mean + C;
    std::fill(mean, mean + 2 * C, 0.0);
    double count = 0;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      const int64_t rows = block.count();
      const double n = static_cast<double>(rows);
      const T* x = static_cast<const T*>(p.input) + block.plane_begin * C;
      std::fill(block_mean, block_mean + 2 * C, 0.0);
      add_rows<1>(block_mean, C, rows, [](auto* s, auto, auto v) { s[0] += v; }, block_mean, x);
      for (int64_t c = 0; c < C; ++c) block_mean[c] /= n;
      add_rows<1>(
          block_m2, C, rows, [](auto* s, auto m, auto v) { s[0] += (v - m) * (v - m); }, block_mean, x);
      for (int64_t c = 0; c < C; ++c) math::chan_combine(mean[c], m2[c], count, block_mean[c], block_m2[c], n);
      count += n;
    }
  }
}

template <class T>
void forward_reduce(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, int64_t begin, int64_t end) {
  (p.layout == Layout::planar ? forward_reduce_planar<T> : forward_reduce_channels_last<T>)(p, tiling, scratch, begin,
                                                                                           end);
}

// partials[k, 0, c] = sum(dy), partials[k, 1, c] = sum(dy * (x - mean)) of the unit's values.
template <class T>
void backward_reduce_planar(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, int64_t begin,
                            int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit / tiling.chunks, k = unit % tiling.chunks;
    const double mean = static_cast<const Compute<T>*>(p.mean)[c];
    RunSums<2> sums;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      for (int64_t n = block.plane_begin; n < block.plane_end; ++n) {
        const int64_t at = (n * p.C + c) * p.S + block.begin;
        sums.add(
            block.end - block.begin,
            [=](auto* s, auto dy, auto x) {
              s[0] += dy;
              s[1] += dy * (x - mean);
            },
            static_cast<const T*>(p.grad_output) + at, static_cast<const T*>(p.input) + at);
      }
    }
    scratch.partials[(2 * k) * p.C + c] = sums.total(0);
    scratch.partials[(2 * k + 1) * p.C + c] = sums.total(1);
  }
}

template <class T>
void backward_reduce_channels_last(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch,
                                   int64_t begin, int64_t end) {
  const int64_t C = p.C;
  for (int64_t k = begin; k < end; ++k) {
    double* sums = scratch.partials + 2 * k * C;
    std::fill(sums, sums + 2 * C, 0.0);
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      const int64_t at = block.plane_begin * C;
      add_rows<2>(
          sums, C, block.count(),
          [](auto* s, auto mean, auto dy, auto x) {
            s[0] += dy;
            s[1] += dy * (x - mean);
          },
          static_cast<const Compute<T>*>(p.mean), static_cast<const T*>(p.grad_output) + at,
          static_cast<const T*>(p.input) + at);
    }
  }
}

template <class T>
void backward_reduce(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, int64_t begin,
                     int64_t end) {
  (p.layout == Layout::planar ? backward_reduce_planar<T> : backward_reduce_channels_last<T>)(p, tiling, scratch,
                                                                                             begin, end);
}

// ---- per channel ---------------------------------------------------------------------------------------------

template <class T>
void forward_finish(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for (int64_t c = begin; c < end; ++c) {
    double mean = 0, var = 0;
    if (p.training) {
      double m2 = 0, count = 0;
      for (int64_t k = 0; k < tiling.chunks; ++k) {
        const double n = static_cast<double>(tiling.chunk_count(k));
        const double* partial = scratch.partials + 2 * k * p.C + c;
        math::chan_combine(mean, m2, count, partial[0], partial[p.C], n);
        count += n;
      }
      var = math::biased_var(m2, count);
      if (p.running_mean) {
        const double factor =
            math::average_factor(p.cumulative, p.momentum, p.num_batches_tracked ? *p.num_batches_tracked : 0);
        auto update = [&](void* running, double batch) {
          const double old = read(running, p.param_dtype, c);
          write(running, p.param_dtype, c, math::update_running(old, batch, factor));
        };
        update(p.running_mean, mean);
        update(p.running_var, math::unbiased_var(m2, count));
      }
    } else {
      mean = read(p.running_mean, p.param_dtype, c);
      var = read(p.running_var, p.param_dtype, c);
    }
    const C saved_mean = static_cast<C>(mean), saved_invstd = static_cast<C>(math::invstd(var, p.eps));
    static_cast<C*>(p.mean)[c] = saved_mean;
    static_cast<C*>(p.invstd)[c] = saved_invstd;
    C* factors = static_cast<C*>(scratch.factors) + c;
    factors[0] = saved_mean;
    factors[p.C] = p.weight ? static_cast<C>(read(p.weight, p.param_dtype, c)) * saved_invstd : saved_invstd;
    factors[2 * p.C] = p.bias ? static_cast<C>(read(p.bias, p.param_dtype, c)) : C(0);
  }
}

template <class T>
void backward_finish(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, int64_t begin,
                     int64_t end) {
  using C = Compute<T>;
  for (int64_t c = begin; c < end; ++c) {
    const double invstd = static_cast<const C*>(p.invstd)[c], weight = p.weight ? read(p.weight, p.param_dtype, c) : 1;
    C* factors = static_cast<C*>(scratch.factors) + c;
    factors[0] = static_cast<const C*>(p.mean)[c];
    factors[p.C] = static_cast<C>(weight * invstd);
    if (!p.reduces()) continue;
    double sum_dy = 0, sum_dy_xmu = 0;
    for (int64_t k = 0; k < tiling.chunks; ++k) {
      const double* partial = scratch.partials + 2 * k * p.C + c;
      sum_dy += partial[0];
      sum_dy_xmu += partial[p.C];
    }
    if (p.grad_bias) write(p.grad_bias, p.param_dtype, c, sum_dy);
    if (p.grad_weight) write(p.grad_weight, p.param_dtype, c, sum_dy_xmu * invstd);
    const double count = static_cast<double>(p.count());
    factors[2 * p.C] = static_cast<C>(sum_dy / count);
    factors[3 * p.C] = static_cast<C>(sum_dy_xmu / count * invstd * invstd);
  }
}

// ---- elementwise ---------------------------------------------------------------------------------------------

// out[i] = f(factors, in[i]...) over each unit, where factors are those of the element's channel.
template <class T, int factor_count, class F, class... In>
void map_units(const Problem& p, const Tiling& tiling, const Scratch& scratch, int64_t begin, int64_t end, F f,
               T* out, const In*... in) {
  using C = Compute<T>;
  constexpr int kLanes = lanes<C>;
  const C* factors = static_cast<const C*>(scratch.factors);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t k = unit % tiling.chunks;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      for (int64_t n = block.plane_begin; n < block.plane_end; ++n) {
        if (p.layout == Layout::planar) {
          const int64_t c = unit / tiling.chunks;
          const int64_t at = (n * p.C + c) * p.S + block.begin, size = block.end - block.begin;
          C factor[factor_count];
          for (int j = 0; j < factor_count; ++j) factor[j] = factors[j * p.C + c];
          int64_t i = 0;
          for (; i + kLanes <= size; i += kLanes) store<C>(out + at + i, f(factor, load<C>(in + at + i)...));
          for (; i < size; ++i) out[at + i] = static_cast<T>(f(factor, static_cast<C>(in[at + i])...));
        } else {
          const int64_t at = n * p.C;
          int64_t c = 0;
          for (; c + kLanes <= p.C; c += kLanes) {
            Vec<C> factor[factor_count];
            unrolled<factor_count>([&](auto j) { factor[j] = load<C>(factors + j * p.C + c); });
            store<C>(out + at + c, f(factor, load<C>(in + at + c)...));
          }
          for (; c < p.C; ++c) {
            C factor[factor_count];
            unrolled<factor_count>([&](auto j) { factor[j] = factors[j * p.C + c]; });
            out[at + c] = static_cast<T>(f(factor, static_cast<C>(in[at + c])...));
          }
        }
      }
    }
  }
}

template <class T, class Epilogue>
void forward_apply(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, int64_t begin, int64_t end) {
  map_units<T, 3>(
      p, tiling, scratch, begin, end,
      [](const auto* k, auto x) { return Epilogue::forward(math::normalize(x, k[0], k[1], k[2])); },
      static_cast<T*>(p.output), static_cast<const T*>(p.input));
}

template <class T>
void backward_apply(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, int64_t begin, int64_t end) {
  T* grad_input = static_cast<T*>(p.grad_input);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  if (p.training) {
    map_units<T, 4>(
        p, tiling, scratch, begin, end,
        [](const auto* k, auto dy, auto x) { return math::grad_input_train(dy, x, k[0], k[1], k[2], k[3]); },
        grad_input, grad_output, static_cast<const T*>(p.input));
  } else {
    map_units<T, 2>(
        p, tiling, scratch, begin, end,
        [](const auto* k, auto dy) { return math::grad_input_eval(dy, k[1]); }, grad_input, grad_output);
  }
}

}  // namespace

template <class T>
constexpr Kernels table = {
    forward_reduce<T>,  forward_finish<T>,  forward_apply<T, math::Identity>,
    backward_reduce<T>, backward_finish<T>, backward_apply<T>,
};

const Kernels& kernels(DType dtype) { return dtype == DType::float64 ? table<double> : table<float>; }

}  // namespace bnext::cpu::BNEXT_ISA
