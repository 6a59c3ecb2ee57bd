// The CPU loops, compiled once for each instruction set: the unit that includes this defines BNEXT_ISA (the
// namespace) and BNEXT_VECTOR_BYTES.
//
// Statistics are shifted sums within a block, combined by Chan's formula across blocks, in double beyond runs
// of 16 values. Every sum has one order, given by the shape and the register width alone. Bytes from main
// memory, with E = N * C * S * itemsize: reduce reads E (forward) or 2E (backward); apply reads the same
// again, from cache where the part is small enough, and writes E.
#include <cmath>
#include <vector>

#include "../math.h"
#include "kernels.h"
#include "reduce.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using std::int64_t;

constexpr int kGroup = 64;  // channels whose sums are kept at once (planar)

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

// Where factor j of channel c lies in Scratch::factors: a vector of each factor in turn, which an elementwise
// pass over rows reads as one stream.
template <class C, int factor_count>
int64_t factor_at(int64_t j, int64_t c) {
  return (c / lanes<C> * factor_count + j) * lanes<C> + c % lanes<C>;
}

constexpr int kForwardFactors = 3;   // mean, scale, bias
constexpr int kBackwardFactors = 4;  // mean, scale, grad_mean, projection

// f(offset, size, c) for the runs of contiguous elements of channels [begin, end) in a block, in order of
// memory.
template <class F>
void for_runs(const Problem& p, const Tiling::Block& block, int64_t begin, int64_t end, F f) {
  for (int64_t n = block.plane_begin; n < block.plane_end; ++n)
    for (int64_t c = begin; c < end; ++c) f((n * p.C + c) * p.S + block.begin, block.size(), c);
}

// f(first channel, last channel, chunk) for the groups of the channels in each of the chunks.
template <class F>
void for_groups(Range channels, Range chunks, F f) {
  for (int64_t k = chunks.begin; k < chunks.end; ++k)
    for (int64_t c = channels.begin; c < channels.end; c += kGroup)
      f(c, std::min(c + kGroup, channels.end), k);
}

// ---- forward: mean and m2
// ------------------------------------------------------------------------------------

// Mean and m2 of one channel of a block in double, two passes: for values that short sums cannot hold (an
// infinity, a NaN, a square beyond float32).
template <class T>
void wide_stats(const ForwardParams& p, const Tiling::Block& block, int64_t c, double& mean, double& m2) {
  const T* x = static_cast<const T*>(p.input);
  const int64_t run = p.layout == Layout::planar ? p.C * p.S : p.C;
  const auto each = [&](auto f) {
    for (int64_t n = block.plane_begin; n < block.plane_end; ++n)
      for (int64_t s = block.begin; s < block.end; ++s)
        f(static_cast<double>(x[n * run + (p.layout == Layout::planar ? c * p.S + s : c)]));
  };
  double sum = 0, squares = 0;
  each([&](double v) { sum += v; });
  mean = sum / static_cast<double>(block.count());
  each([&](double v) { squares += (v - mean) * (v - mean); });
  m2 = squares;
}

// Takes a block's shifted sums into the channel's mean and m2 of the `count` values before it.
template <class T>
void add_block(const ForwardParams& p, const Tiling::Block& block, int64_t c, double shift, double sum,
               double squares, double count, double& mean, double& m2) {
  const double n = static_cast<double>(block.count());
  double block_mean, block_m2;
  if (std::isfinite(squares)) {
    math::unshift(shift, sum, squares, n, block_mean, block_m2);
  } else {
    wide_stats<T>(p, block, c, block_mean, block_m2);
  }
  math::chan_combine(mean, m2, count, block_mean, block_m2, n);
}

// The part of a block that its shift is taken from: an eighth, at least one element of a plane.
Tiling::Block sample(Tiling::Block block) {
  if (block.plane_end - block.plane_begin > 1) {
    block.plane_end = block.plane_begin + (block.plane_end - block.plane_begin + 7) / 8;
  } else {
    block.end = block.begin + (block.size() + 7) / 8;
  }
  return block;
}

// partials[k, 0, c] = mean, partials[k, 1, c] = m2 of chunk k.
template <class T>
void forward_reduce_planar(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch,
                           Range channels, Range chunks) {
  const T* x = static_cast<const T*>(p.input);
  for_groups(channels, chunks, [&](int64_t begin, int64_t end, int64_t k) {
    double mean[kGroup] = {}, m2[kGroup] = {}, count = 0;
    Compute<T> shift[kGroup];
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b), head = sample(block);
      RunSums<T, 1> heads[kGroup];
      for_runs(p, head, begin, end, [&](int64_t at, int64_t size, int64_t c) {
        heads[c - begin].add(size, [](auto* s, auto v) { s[0] += v; }, x + at);
      });
      for (int64_t c = begin; c < end; ++c)
        shift[c - begin] =
            static_cast<Compute<T>>(heads[c - begin].total(0) / static_cast<double>(head.count()));
      RunSums<T, 2> sums[kGroup];
      for_runs(p, block, begin, end, [&](int64_t at, int64_t size, int64_t c) {
        const auto moments = [shift = shift[c - begin]](auto* s, auto v) {
          const auto d = v - shift;
          s[0] += d;
          s[1] += d * d;
        };
        prefetch_run(x + at + p.C * p.S, size);
        sums[c - begin].add(size, moments, x + at);
      });
      for (int64_t c = begin; c < end; ++c) {
        const int64_t i = c - begin;
        add_block<T>(p, block, c, shift[i], sums[i].total(0), sums[i].total(1), count, mean[i], m2[i]);
      }
      count += static_cast<double>(block.count());
    }
    std::copy_n(mean, end - begin, scratch.partials + 2 * k * p.C + begin);
    std::copy_n(m2, end - begin, scratch.partials + (2 * k + 1) * p.C + begin);
  });
}

template <class T>
void forward_reduce_channels_last(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range,
                                  Range chunks) {
  const int64_t C = p.C;
  std::vector<double> sums(2 * C);
  std::vector<Compute<T>> shift(C);
  RowSums<T, 1> heads(C);
  RowSums<T, 2> both(C);
  for (int64_t k = chunks.begin; k < chunks.end; ++k) {
    double* mean = scratch.partials + 2 * k * C;
    double* m2 = mean + C;
    std::fill(mean, mean + 2 * C, 0.0);
    double count = 0;
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b), head = sample(block);
      const T* x = static_cast<const T*>(p.input) + block.plane_begin * C;
      std::fill(sums.begin(), sums.end(), 0.0);
      heads.add(sums.data(), head.count(), [](auto* s, auto, auto v) { s[0] += v; }, shift.data(), x);
      for (int64_t c = 0; c < C; ++c)
        shift[c] = static_cast<Compute<T>>(sums[c] / static_cast<double>(head.count()));
      std::fill(sums.begin(), sums.end(), 0.0);
      const auto moments = [](auto* s, auto shift, auto v) {
        const auto d = v - shift;
        s[0] += d;
        s[1] += d * d;
      };
      both.add(sums.data(), block.count(), moments, shift.data(), x);
      for (int64_t c = 0; c < C; ++c)
        add_block<T>(p, block, c, shift[c], sums[c], sums[C + c], count, mean[c], m2[c]);
      count += static_cast<double>(block.count());
    }
  }
}

template <class T>
void forward_reduce(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                    Range chunks) {
  (p.layout == Layout::planar ? forward_reduce_planar<T>
                              : forward_reduce_channels_last<T>)(p, tiling, scratch, channels, chunks);
}

template <class T>
void forward_finish(const ForwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels) {
  using C = Compute<T>;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
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
        const double factor = math::average_factor(p.cumulative, p.momentum,
                                                   p.num_batches_tracked ? *p.num_batches_tracked : 0);
        const auto update = [&](void* running, double batch) {
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
    const auto factor = [&](int64_t j) -> C& {
      return static_cast<C*>(scratch.factors)[factor_at<C, kForwardFactors>(j, c)];
    };
    factor(0) = saved_mean;
    factor(1) = p.weight ? static_cast<C>(read(p.weight, p.param_dtype, c)) * saved_invstd : saved_invstd;
    factor(2) = p.bias ? static_cast<C>(read(p.bias, p.param_dtype, c)) : C(0);
  }
}

// ---- backward: sum(dy) and sum(dy * (x - mean))
// --------------------------------------------------------------

// partials[k, 0, c] and partials[k, 1, c] = the two sums over chunk k.
template <class T>
void backward_reduce(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels,
                     Range chunks) {
  const Compute<T>* mean = static_cast<const Compute<T>*>(p.mean);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  const T* input = static_cast<const T*>(p.input);
  const auto products = [](auto* s, auto mean, auto dy, auto x) {
    s[0] += dy;
    s[1] += dy * (x - mean);
  };
  if (p.layout == Layout::planar) {
    for_groups(channels, chunks, [&](int64_t begin, int64_t end, int64_t k) {
      RunSums<T, 2> sums[kGroup];
      for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
        for_runs(p, tiling.block(b), begin, end, [&](int64_t at, int64_t size, int64_t c) {
          prefetch_run(grad_output + at + p.C * p.S, size);
          prefetch_run(input + at + p.C * p.S, size);
          const auto f = [=](auto* s, auto dy, auto x) { products(s, mean[c], dy, x); };
          sums[c - begin].add(size, f, grad_output + at, input + at);
        });
      }
      for (int64_t c = begin; c < end; ++c)
        for (int t = 0; t < 2; ++t) scratch.partials[(2 * k + t) * p.C + c] = sums[c - begin].total(t);
    });
    return;
  }
  RowSums<T, 2> rows(p.C);
  for (int64_t k = chunks.begin; k < chunks.end; ++k) {
    double* sums = scratch.partials + 2 * k * p.C;
    std::fill(sums, sums + 2 * p.C, 0.0);
    for (int64_t b = tiling.chunk_begin(k); b < tiling.chunk_begin(k + 1); ++b) {
      const Tiling::Block block = tiling.block(b);
      const int64_t at = block.plane_begin * p.C;
      rows.add(sums, block.count(), products, mean, grad_output + at, input + at);
    }
  }
}

template <class T>
void backward_finish(const BackwardParams& p, const Tiling& tiling, const Scratch& scratch, Range channels) {
  using C = Compute<T>;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const double invstd = static_cast<const C*>(p.invstd)[c],
                 weight = p.weight ? read(p.weight, p.param_dtype, c) : 1;
    const auto factor = [&](int64_t j) -> C& {
      return static_cast<C*>(scratch.factors)[factor_at<C, kBackwardFactors>(j, c)];
    };
    factor(0) = static_cast<const C*>(p.mean)[c];
    factor(1) = static_cast<C>(weight * invstd);
    if (!p.reduces()) continue;
    double sum_dy = 0, sum_dy_xmu = 0;
    for (int64_t k = 0; k < tiling.chunks; ++k) {
      const double* partial = scratch.partials + 2 * k * p.C + c;
      sum_dy += partial[0];
      sum_dy_xmu += partial[p.C];
    }
    if (p.grad_bias) write(p.grad_bias, p.param_dtype, c, sum_dy);
    if (p.grad_weight) write(p.grad_weight, p.param_dtype, c, math::grad_weight(sum_dy_xmu, invstd));
    const double count = static_cast<double>(p.count());
    factor(2) = static_cast<C>(sum_dy / count);
    factor(3) = static_cast<C>(math::projection(sum_dy_xmu, invstd, count));
  }
}

// ---- elementwise
// ---------------------------------------------------------------------------------------------

// out[i] = f(factors of i's channel, in[i]...) for a range of each channel's values, in order of memory.
template <class T, int factor_count, class F, class... In>
void map(const Problem& p, const Scratch& scratch, Range channels, Range values, F f, T* out,
         const In*... in) {
  using C = Compute<T>;
  constexpr int kLanes = lanes<C>;
  const C* factors = static_cast<const C*>(scratch.factors);
  const auto run = [&](int64_t i, int64_t end, int64_t c) {
    C factor[factor_count];
    unrolled<factor_count>([&](auto j) { factor[j] = factors[factor_at<C, factor_count>(j, c)]; });
    for (; i + kLanes <= end; i += kLanes) store<C>(out + i, f(factor, load<C>(in + i)...));
    for (; i < end; ++i) out[i] = static_cast<T>(f(factor, static_cast<C>(in[i])...));
  };
  if (p.layout == Layout::planar) {
    for (int64_t value = values.begin; value < values.end;) {
      const int64_t n = value / p.S, s = value % p.S, size = std::min(p.S - s, values.end - value);
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const int64_t i = (n * p.C + c) * p.S + s;
        run(i, i + size, c);
      }
      value += size;
    }
    return;
  }
  constexpr int64_t kAhead = 4096 / sizeof(C);
  const auto rows = [&](auto row_count, int64_t row) {
    int64_t c = 0;
    for (; c + kLanes <= p.C; c += kLanes) {
      Vec<C> factor[factor_count];
      unrolled<factor_count>([&](auto j) { factor[j] = load<C>(factors + c * factor_count + j * kLanes); });
      Vec<C> result[row_count];
      unrolled<row_count>([&](auto r) {
        const int64_t i = (row + r) * p.C + c, ahead = row * p.C + row_count * c + r * kLanes + kAhead;
        if (row_count > 1) {
          (prefetch(in + ahead), ...);
          prefetch_for_write(out + ahead);
        }
        result[r] = f(factor, load<C>(in + i)...);
      });
      unrolled<row_count>([&](auto r) { store<C>(out + (row + r) * p.C + c, result[r]); });
    }
    for (; c < p.C; ++c)
      for (int64_t i = row * p.C + c; i < (row + row_count) * p.C; i += p.C) run(i, i + 1, c);
  };
  int64_t row = values.begin;
  if (p.C * sizeof(C) <= 1024 || p.C * sizeof(C) >= 8192)
    for (; row + 4 <= values.end; row += 4) rows(std::integral_constant<int, 4>{}, row);
  for (; row < values.end; ++row) rows(std::integral_constant<int, 1>{}, row);
}

template <class T, class Epilogue>
void forward_apply(const ForwardParams& p, const Scratch& scratch, Range channels, Range values) {
  map<T, kForwardFactors>(
      p, scratch, channels, values,
      [](const auto* k, auto x) { return Epilogue::forward(math::normalize(x, k[0], k[1], k[2])); },
      static_cast<T*>(p.output), static_cast<const T*>(p.input));
}

template <class T>
void backward_apply(const BackwardParams& p, const Scratch& scratch, Range channels, Range values) {
  T* grad_input = static_cast<T*>(p.grad_input);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  if (p.training) {
    map<T, kBackwardFactors>(
        p, scratch, channels, values,
        [](const auto* k, auto dy, auto x) { return math::grad_input_train(dy, x, k[0], k[1], k[2], k[3]); },
        grad_input, grad_output, static_cast<const T*>(p.input));
  } else {
    map<T, kBackwardFactors>(
        p, scratch, channels, values, [](const auto* k, auto dy) { return math::grad_input_eval(dy, k[1]); },
        grad_input, grad_output);
  }
}

template <class T>
constexpr Kernels table = {
    {forward_reduce<T>, forward_finish<T>, forward_apply<T, math::Identity>},
    {backward_reduce<T>, backward_finish<T>, backward_apply<T>},
};

}  // namespace

const Kernels& kernels(DType dtype) {
  return dtype == DType::float64 ? table<double> : table<float>;
}

}  // namespace bnext::cpu::BNEXT_ISA
