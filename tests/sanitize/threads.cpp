// Every step of the CPU kernels by one thread, by several, and by several for two callers at once: the same bits, and,
// as this is built with ThreadSanitizer, no two threads at one address without an order.
#include <ATen/Parallel.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>

#include "cpu/kernels.h"
#include "half.h"

namespace {

using namespace bnext;
using std::int64_t;
using Bytes = std::vector<unsigned char>;  // compared by memcmp, not element by element
using Results = std::vector<Bytes>;
using Job = std::function<Results()>;

Bytes numbers(DType dtype, int64_t size, double from, double to) {
  static std::uint64_t state = 1;
  Bytes bytes(size * itemsize(dtype));
  for (int64_t i = 0; i < size; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    write(bytes.data(), dtype, i, from + (to - from) * static_cast<double>(state >> 40) / (1 << 24));
  }
  return bytes;
}

// A problem and what is read for it.
struct Inputs : Problem {
  explicit Inputs(const Problem& p) : Problem(p) {}

  DType stats_dtype = dtype == DType::float64 ? DType::float64 : DType::float32;
  Bytes input = numbers(dtype, N * C * S, -1, 3), grad_output = numbers(dtype, N * C * S, -1, 1);
  Bytes weight = numbers(param_dtype, C, 0.5, 2), bias = numbers(param_dtype, C, -1, 1);
  Bytes running_mean = numbers(param_dtype, C, 0, 1), running_var = numbers(param_dtype, C, 1, 2);
  Bytes mean = numbers(stats_dtype, C, 0, 1), invstd = numbers(stats_dtype, C, 0.5, 1);
};

Results forward(const Inputs& in, bool training) {
  Results results{Bytes(in.input.size()), Bytes(in.mean.size()), Bytes(in.mean.size()), in.running_mean,
                  in.running_var};
  int64_t counter = 3;
  ForwardParams p{};
  static_cast<Problem&>(p) = in;
  p.input = in.input.data();
  p.output = results[0].data();
  p.weight = in.weight.data();
  p.bias = in.bias.data();
  p.mean = results[1].data();
  p.invstd = results[2].data();
  p.running_mean = results[3].data();
  p.running_var = results[4].data();
  p.num_batches_tracked = &counter;
  p.eps = 1e-5;
  p.momentum = 0.1;
  p.training = training;
  cpu::forward(p);
  return results;
}

Results backward(const Inputs& in, bool training, bool grad_input, bool grad_params) {
  Results results{Bytes(in.input.size()), Bytes(in.weight.size()), Bytes(in.weight.size())};
  BackwardParams p{};
  static_cast<Problem&>(p) = in;
  p.grad_output = in.grad_output.data();
  p.input = in.input.data();
  p.weight = in.weight.data();
  p.mean = in.mean.data();
  p.invstd = in.invstd.data();
  if (grad_input) p.grad_input = results[0].data();
  if (grad_params) {
    p.grad_weight = results[1].data();
    p.grad_bias = results[2].data();
  }
  p.training = training;
  cpu::backward(p);
  return results;
}

std::vector<Job> jobs(const Inputs& in) {
  return {
      [&] { return forward(in, true); },
      [&] { return forward(in, false); },
      [&] { return backward(in, true, true, true); },
      [&] { return backward(in, true, false, true); },
      [&] { return backward(in, false, true, true); },
      [&] { return backward(in, false, true, false); },
  };
}

// Whether several threads give the bits of one.
bool check(const Inputs& in) {
  const std::vector<Job> all = jobs(in);
  const auto run = [&] {
    std::vector<Results> results;
    for (const Job& job : all) results.push_back(job());
    return results;
  };
  at::threads = 1;
  const std::vector<Results> expected = run();
  for (const int threads : {3, 4}) {
    at::threads = threads;
    if (run() != expected) return false;
  }
  at::threads = 2;
  std::vector<Results> theirs;
  std::thread caller([&] { theirs = run(); });
  const std::vector<Results> ours = run();
  caller.join();
  return ours == expected && theirs == expected;
}

// Each is shared out in another way: groups of channels, chunks, planes cut into pieces, one channel, rows, and rows
// longer than a tile.
constexpr struct {
  int64_t N, C, S;
} kShapes[] = {{8, 64, 196}, {65, 5, 700}, {2, 3, 16640}, {1, 1, 90300}, {20011, 5, 1}, {30, 2048, 4}};

constexpr struct {
  DType input, params;
} kTypes[] = {{DType::float64, DType::float64},
              {DType::float32, DType::float32},
              {DType::bfloat16, DType::float32},
              {DType::float16, DType::float16}};

bool check_all() {
  bool good = true;
  for (const auto& [N, C, S] : kShapes)
    for (const Layout layout : {Layout::planar, Layout::channels_last}) {
      if ((C == 1 && layout == Layout::channels_last) || (S == 1 && layout == Layout::planar)) continue;
      for (const auto& [input, params] : kTypes) {
        if (check(Inputs({N, C, S, layout, input, params}))) continue;
        std::printf("%ld x %ld x %ld, layout %d, dtype %d: the bits depend on the threads\n", N, C, S,
                    static_cast<int>(layout), static_cast<int>(input));
        good = false;
      }
    }
  return good;
}

}  // namespace

int main() {
  try {
    std::printf("%s\n", cpu::isa());
    return check_all() ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
