// Good kernels must pass under every schedule; each planted bug must be caught under one of them.
#include <cstdio>
#include <functional>
#include <memory>

#include "gpu.h"

namespace cg = cooperative_groups;
using bnext::gpu::Launch;
using bnext::gpu::launch;

namespace {
// ---- kernels that are right with bug 0 ------------------------------------------------------------------------------

enum Bug { none, first, second };

template <Bug bug>
__global__ void transpose(const float* x, float* y) {
  GPU_SHARED(tile, float[32][33]);
  tile[threadIdx.y][threadIdx.x] = x[threadIdx.y * 32 + threadIdx.x];
  if (bug == none) __syncthreads();
  y[threadIdx.y * 32 + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}

template <Bug bug>
__global__ void rotate_repeatedly(float* y) {
  GPU_SHARED(shared, float[64]);
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    shared[threadIdx.x] = float(threadIdx.x + round);
    __syncthreads();
    sum += shared[(threadIdx.x + 33) % 64];
    if (bug == none) __syncthreads();  // before the next round overwrites
  }
  y[threadIdx.x] = sum;
}

template <Bug bug>
__global__ void swap_in_warp(float* y) {
  GPU_SHARED(shared, float[32]);
  shared[threadIdx.x] = float(threadIdx.x);
  if (bug == none) __syncwarp();
  if (bug == second) (void)__shfl_xor_sync(0xffffffffu, 1, 1);  // orders no memory
  y[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// Lanes at different clocks: one fences, half of them meet more often.
__global__ void halves_of_a_warp(float* y) {
  GPU_SHARED(shared, float[32]);
  const unsigned lane = threadIdx.x;
  if (lane == 0) __threadfence();
  shared[lane] = float(lane);
  if (lane < 16)
    for (int i = 0; i < 3; ++i) __syncwarp(0x0000ffffu);
  __syncwarp();
  if (lane == 0) __threadfence();
  const float sum = shared[(lane + 1) % 32] + shared[(lane + 16) % 32];
  __syncwarp();
  shared[lane] = sum;
  __syncwarp();
  y[lane] = shared[lane ^ 31];
}

__global__ void warp_operations(unsigned* ballots, int* values, double* doubles) {
  const unsigned thread = threadIdx.x;
  ballots[thread] = __ballot_sync(0xffffffffu, thread & 1);
  int sum = __shfl_sync(0xffffffffu, int(thread * 3), 5);
  const int up = __shfl_up_sync(0xffffffffu, int(thread), 1);
  const int segment = __shfl_xor_sync(0xffffffffu, int(thread), 3, 8);
  if (thread < 16) sum += __shfl_xor_sync(0x0000ffffu, int(thread), 1);
  if (__any_sync(0xffffffffu, thread == 7) && !__all_sync(0xffffffffu, thread != 7))
    values[thread] = sum * 10000 + up * 100 + segment;
  doubles[thread] = __shfl_down_sync(0xffffffffu, double(thread) + 1e-12, 2);
}

__global__ void block_reductions(int* out) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int any = __syncthreads_or(threadIdx.x == 99), all = __syncthreads_and(threadIdx.x != 99);
  if (cg::this_thread_block().thread_rank() == 5) *out = count * 100 + any * 10 + all;
}

__global__ void integer_atomics(unsigned* u, unsigned long long* sum) {
  atomicAdd(sum, 1ull << 32);
  atomicInc(&u[0], 9u);
  atomicMax(&u[1], threadIdx.x);
  atomicMin(&u[2], threadIdx.x);
  if (atomicCAS(&u[3], 0u, threadIdx.x + 1) == 0) atomicExch(&u[4], threadIdx.x);
}

__global__ void bit_functions(unsigned* out) {
  out[0] = __umulhi(0x80000000u, 6u);
  out[1] = unsigned(__popc(0xf0f0u) + __clz(1) + __ffs(8));
  out[2] = __float_as_uint(__uint_as_float(0x3f800001u));
  out[3] = unsigned(max(3, 4) + min(1, 2));
}

template <Bug bug>
__global__ void across_grid(float* a, float* b) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  a[i] = float(i);
  if (bug == none) cg::this_grid().sync();
  b[i] = a[(i + 37) % n];
}

template <Bug bug>
__global__ void sum_over_cluster(float* y) {
  GPU_SHARED(shared, float);
  auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) shared = float(cluster.block_rank() + 1);
  if (bug != first) cluster.sync();
  float sum = 0;
  if (threadIdx.x == 0)
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) sum += *cluster.map_shared_rank(&shared, rank);
  if (bug != second) cluster.sync();  // no block may exit while others read its memory
  if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

// All blocks of a cluster read one value, which its owner then overwrites.
__global__ void broadcast_over_cluster(float* y) {
  GPU_SHARED(shared, float);
  auto cluster = cg::this_cluster();
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) shared = float(round);
    cluster.sync();
    sum += *cluster.map_shared_rank(&shared, 0);
    cluster.sync();
  }
  if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

// The last block to take a ticket sums what all have written.
enum class Ticket { right, reader_acquires, no_release, fence_before_write, no_barrier, no_acquire };

template <Ticket ticket>
__global__ void sum_by_last_block(const float* x, float* partial, unsigned* counter, float* out, int n) {
  GPU_SHARED(sums, float[32]);
  GPU_SHARED(last, bool);
  float sum = 0;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) sum += x[i];
  for (unsigned delta = 16; delta; delta >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, delta);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  const unsigned writer = ticket == Ticket::no_barrier ? 1 : 0;
  if (threadIdx.x == 0 && ticket == Ticket::fence_before_write) __threadfence();
  if (threadIdx.x == writer) {
    float total = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) total += sums[i];
    partial[blockIdx.x] = total;
  }
  if (threadIdx.x == 0) {
    if (ticket != Ticket::no_release && ticket != Ticket::fence_before_write) __threadfence();
    last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    if (ticket != Ticket::no_acquire && ticket != Ticket::reader_acquires) __threadfence();
  }
  __syncthreads();
  if (ticket == Ticket::reader_acquires) __threadfence();
  if (last && threadIdx.x == 32) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];
    *out = total;
  }
}

// Atomics alone make threads run one after another, but order nothing of what they do.
__device__ void await_turn(unsigned* turn, unsigned mine) {
  while (atomicAdd(turn, 0u) != mine) __nanosleep(100);
}

// Everyone reads, then the last reader (bug second: the first) writes: right after the narrowest barrier that spans
// all.
template <Bug bug>
__global__ void read_in_turns(float* x, unsigned* turn, float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  await_turn(turn, i);
  y[i] = x[0];
  atomicAdd(turn, 1u);
  if (bug == none) {
    if (cg::this_grid().is_valid())
      cg::this_grid().sync();
    else if (gridDim.x > 1)
      cg::this_cluster().sync();
    else if (blockDim.x > 32)
      __syncthreads();
    else
      __syncwarp();
  }
  if (bug == second && i == 0) await_turn(turn, n);
  if (i == (bug == second ? 0 : n - 1)) x[0] = -1.f;
}

__global__ void write_after_atomic(unsigned* counter, unsigned* turn) {
  await_turn(turn, blockIdx.x);
  if (blockIdx.x == 0)
    atomicAdd(counter, 1u);
  else
    *counter = 5;
  atomicAdd(turn, 1u);
}

__global__ void copy_plainly(const uint4* x, uint4* y, int n) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) y[i] = x[i];
}

// The forms that vector loads and stores take, with work on the components between them.
__global__ void scale_vectors(const float4* x, float4* y, const float* factor) {
  const unsigned i = threadIdx.x * 4;
  float4 a = __ldg(&x[i]), b = x[i + 1];
  float c[4], d[4];
  memcpy(c, &x[i + 2], 16);
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(&x[i + 3]));
  memcpy(d, &bits, 16);
  const float f = __ldg(factor);
  const float4 scaled{a.x * f, a.y * f, a.z * f, a.w * f};
  y[i] = scaled;
  b.x *= f, b.y *= f, b.z *= f, b.w *= f;
  y[i + 1] = b;
  for (float& value : c) value *= f;
  memcpy(&y[i + 2], c, 16);
  __stcs(&y[i + 3], float4{d[0] * f, d[1] * f, d[2] * f, d[3] * f});
}

__global__ void scale_scalars(const float* x, float* y, const unsigned short* halves, double* wide) {
  for (unsigned k = 0; k < 4; ++k) y[threadIdx.x * 4 + k] = x[threadIdx.x * 4 + k] * 2;
  wide[threadIdx.x] = halves[threadIdx.x];
}

__global__ void copy_unaligned(const float* x, float* y) {
  memcpy(y + 1, x + 1, 16);
}

// ---- kernels that are wrong -----------------------------------------------------------------------------------------

__global__ void write_one_each(float* y) {
  y[blockIdx.x * blockDim.x + threadIdx.x] = 1.f;
}

__global__ void read_whole_vectors(const float4* x, float* y, int n) {
  const int i = int(threadIdx.x);
  if (i * 4 >= n) return;
  const float4 value = x[i];
  y[i] = value.x + value.w;
}

__global__ void read_misaligned(const float* x, float* y) {
  const float4 value = *reinterpret_cast<const float4*>(x + 1);
  *y = value.x + value.y + value.z + value.w;
}

__global__ void step_over_shared(float* y) {
  GPU_SHARED(shared, float[32]);
  GPU_SHARED(next, float[32]);
  next[threadIdx.x] = 0.f;
  shared[threadIdx.x + 1] = 1.f;
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}

__global__ void use_dynamic_shared(float* y) {
  GPU_DYN_SHARED(float, shared);
  shared[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}

__global__ void read_unwritten_shared(float* y) {
  GPU_SHARED(shared, float[64]);
  if (threadIdx.x < 32) shared[threadIdx.x] = 0.f;
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}

__global__ void accumulate(float* y) {
  y[threadIdx.x] += 1.f;
}

__global__ void exit_before_barrier(float* y) {
  if (threadIdx.x >= 48) return;
  __syncthreads();
  y[threadIdx.x] = 1.f;
}

__global__ void two_barriers(float* y) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 1.f;
}

__global__ void shuffle_half(float* y) {
  float value = 1.f;
  if (threadIdx.x < 16) value = __shfl_xor_sync(0xffffffffu, value, 1);
  y[threadIdx.x] = value;
}

__global__ void cross_masks(float* y) {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    __syncwarp(0xffff0001u);
  y[threadIdx.x] = 1.f;
}

__global__ void write_twice(float* y) {
  y[threadIdx.x / 2] = float(threadIdx.x);
}

__global__ void add_plainly(unsigned* counter) {
  *counter = *counter + 1;
}

// ---- the test of the test -------------------------------------------------------------------------------------------

template <class T>
class Buffer {  // of exactly its size, 16-byte aligned, registered
 public:
  Buffer(size_t count, const char* name, bool initialised = true)
      : values_(static_cast<T*>(operator new(count * sizeof(T), std::align_val_t{16}))) {
    for (size_t i = 0; i < count; ++i) values_.get()[i] = initialised ? T(i % 7) : T(-1);
    cuda_on_cpu::register_global(values_.get(), count * sizeof(T), name, initialised);
  }
  operator T*() const { return values_.get(); }
  template <class U>
  U* as() const {
    return reinterpret_cast<U*>(values_.get());
  }

 private:
  struct Free {
    void operator()(T* values) const { operator delete(values, std::align_val_t{16}); }
  };
  std::unique_ptr<T, Free> values_;
};

// "" or what went wrong.
using Outcome = std::string;

Outcome outcome(cudaError_t error, const std::function<bool()>& right = [] { return true; }) {
  if (error != cudaSuccess) return cuda_on_cpu::last_error();
  return right() ? "" : "wrong result";
}

template <class T, class Expected>
Outcome outcome(cudaError_t error, const Buffer<T>& values, size_t count, Expected expected) {
  return outcome(error, [&] {
    for (size_t i = 0; i < count; ++i)
      if (!(values[i] == expected(i))) return false;
    return true;
  });
}

Launch shape(unsigned grid, dim3 block, size_t shared = 0, unsigned cluster = 1, bool cooperative = false) {
  return {.grid = dim3(grid), .block = block, .shared = shared, .cluster = cluster, .cooperative = cooperative};
}

class Selftest {
 public:
  void good(const char* name, const std::function<Outcome()>& run) {
    const Result result = under_all_schedules(run);
    report(result.failures == 0, name, result);
  }
  // The bug's report contains `expected`.
  void bug(const char* name, const char* expected, const std::function<Outcome()>& run) {
    const Result result = under_all_schedules(run);
    report(result.failures > 0 && result.last.find(expected) != Outcome::npos, name, result);
  }
  // Nothing that a fast build could notice.
  void checked_bug(const char* name, const char* expected, const std::function<Outcome()>& run) {
    if (cuda_on_cpu::checked_build()) bug(name, expected, run);
  }
  int finish() const {
    printf("%d passed, %d failed\n", passed_, failed_);
    return failed_ != 0;
  }

 private:
  struct Result {
    int failures = 0, schedules = 0;
    Outcome last;
  };
  static Result under_all_schedules(const std::function<Outcome()>& run) {
    Result result;
    for (const char* schedule : {"fwd", "rev", "rand", "rand", "warp"}) {
      cuda_on_cpu::configure(schedule, static_cast<unsigned>(result.schedules++), true);
      const Outcome outcome = run();
      cuda_on_cpu::clear_globals();
      if (outcome.empty()) continue;
      result.failures++;
      result.last = outcome;
    }
    return result;
  }
  void report(bool ok, const char* name, const Result& result) {
    (ok ? passed_ : failed_)++;
    printf("%-6s %-27s %d/%d schedules  %s\n", ok ? "ok" : "FAILED", name, result.failures, result.schedules,
           result.last.c_str());
  }
  int passed_ = 0, failed_ = 0;
};

template <Bug bug>
Outcome run_transpose() {
  const Buffer<float> x(1024, "x"), y(1024, "y", false);
  const auto error = launch(transpose<bug>, shape(1, dim3(32, 32)), x, y);
  return outcome(error, y, 1024, [&](size_t i) { return x[i % 32 * 32 + i / 32]; });
}

template <Bug bug>
Outcome run_rotate() {
  const Buffer<float> y(64, "y", false);
  const auto error = launch(rotate_repeatedly<bug>, shape(1, 64), y);
  return outcome(error, y, 64, [](size_t i) { return float((i + 33) % 64 * 4 + 6); });
}

template <Bug bug>
Outcome run_swap() {
  const Buffer<float> y(32, "y", false);
  return outcome(launch(swap_in_warp<bug>, shape(1, 32), y), y, 32, [](size_t i) { return float(i ^ 1); });
}

Outcome run_halves() {
  const Buffer<float> y(32, "y", false);
  const auto sum = [](size_t i) { return float((i + 1) % 32 + (i + 16) % 32); };
  return outcome(launch(halves_of_a_warp, shape(1, 32), y), y, 32, [&](size_t i) { return sum(i ^ 31); });
}

Outcome run_warp_operations() {
  const Buffer<unsigned> ballots(32, "ballots", false);
  const Buffer<int> values(32, "values", false);
  const Buffer<double> doubles(32, "doubles", false);
  return outcome(launch(warp_operations, shape(1, 32), ballots, values, doubles), [&] {
    for (int t = 0; t < 32; ++t) {
      const int expected = (15 + (t < 16 ? t ^ 1 : 0)) * 10000 + (t ? t - 1 : 0) * 100 + (t ^ 3);
      if (ballots[t] != 0xaaaaaaaau || values[t] != expected || doubles[t] != (t < 30 ? t + 2 : t) + 1e-12)
        return false;
    }
    return true;
  });
}

Outcome run_block_reductions() {
  const Buffer<int> out(1, "out", false);
  return outcome(launch(block_reductions, shape(1, 100), out), out, 1, [](size_t) { return 3410; });
}

Outcome run_atomics() {
  const Buffer<unsigned> u(5, "u");
  const Buffer<unsigned long long> sum(1, "sum");
  for (size_t i = 0; i < 5; ++i) u[i] = i == 2 ? 1000 : 0;
  return outcome(launch(integer_atomics, shape(3, 96), u, sum),
                 [&] { return sum[0] == 288ull << 32 && u[0] == 8 && u[1] == 95 && u[2] == 0 && u[3] == u[4] + 1; });
}

Outcome run_bit_functions() {
  const Buffer<unsigned> out(4, "out", false);
  const unsigned expected[] = {3, 8 + 31 + 4, 0x3f800001u, 5};
  return outcome(launch(bit_functions, shape(1, 1), out), out, 4, [&](size_t i) { return expected[i]; });
}

template <Bug bug>
Outcome run_across_grid(unsigned blocks, bool cooperative) {
  const size_t n = blocks * size_t{64};
  const Buffer<float> a(n, "a", false), b(n, "b", false);
  const auto error = launch(across_grid<bug>, shape(blocks, 64, 0, 1, cooperative), a, b);
  const Outcome result = outcome(error, b, n, [n](size_t i) { return float((i + 37) % n); });
  return error == cudaErrorCooperativeLaunchTooLarge ? "too large: " + result : result;
}

template <Bug bug>
Outcome run_cluster(unsigned cluster = 4) {
  const Buffer<float> y(8, "y", false);
  const auto error = launch(sum_over_cluster<bug>, shape(8, 64, 0, cluster), y);
  return outcome(error, y, 8, [](size_t) { return 10.f; });
}

Outcome run_cluster_broadcast() {
  const Buffer<float> y(8, "y", false);
  return outcome(launch(broadcast_over_cluster, shape(8, 64, 0, 4), y), y, 8, [](size_t) { return 3.f; });
}

template <Ticket ticket>
Outcome run_ticket() {
  constexpr int n = 5000;
  const Buffer<float> x(n, "x"), partial(7, "partial", false), out(1, "out", false);
  const Buffer<unsigned> counter(1, "counter");
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += x[i];
  const auto error = launch(sum_by_last_block<ticket>, shape(7, 128), x, partial, counter, out, n);
  return outcome(error, [&] { return out[0] == sum && counter[0] == 0; });
}

// Whether the range named so was read and written with this one width only, and how often.
bool counted(const char* name, size_t width, uint64_t reads, uint64_t writes) {
  if (!cuda_on_cpu::checked_build()) return true;
  for (const auto& range : cuda_on_cpu::stats()) {
    if (range.name != name) continue;
    bool exact = range.read_bytes == reads << width && range.written_bytes == writes << width && range.atomics == 0;
    for (size_t i = 0; i < 5; ++i)
      exact = exact && range.reads[i] == (i == width ? reads : 0) && range.writes[i] == (i == width ? writes : 0);
    return exact;
  }
  return false;
}

Outcome run_copy() {
  constexpr int n = 1000;
  const Buffer<uint32_t> x(n * 4, "x"), y(n * 4, "y", false);
  const auto error = launch(copy_plainly, shape(3, 96), x.as<uint4>(), y.as<uint4>(), n);
  const Outcome result = outcome(error, y, n * 4, [&](size_t i) { return x[i]; });
  return result.empty() && !(counted("x", 4, n, 0) && counted("y", 4, 0, n)) ? "wrong counts" : result;
}

Outcome run_vectors() {
  const Buffer<float> x(512, "x"), y(512, "y", false), factor(1, "factor");
  factor[0] = 3;
  const auto error = launch(scale_vectors, shape(1, 32), x.as<float4>(), y.as<float4>(), factor);
  const Outcome result = outcome(error, y, 512, [&](size_t i) { return x[i] * 3; });
  const bool exact = counted("x", 4, 128, 0) && counted("y", 4, 0, 128) && counted("factor", 2, 32, 0);
  return result.empty() && !exact ? "wrong counts" : result;
}

Outcome run_scalars() {
  const Buffer<float> x(128, "x"), y(128, "y", false);
  const Buffer<unsigned short> halves(32, "halves");
  const Buffer<double> wide(32, "wide", false);
  const auto error = launch(scale_scalars, shape(1, 32), x, y, halves, wide);
  const Outcome result = outcome(error, y, 128, [&](size_t i) { return x[i] * 2; });
  const bool exact =
      counted("x", 2, 128, 0) && counted("y", 2, 0, 128) && counted("halves", 1, 32, 0) && counted("wide", 3, 0, 32);
  return result.empty() && !exact ? "wrong counts" : result;
}

Outcome run_unaligned() {
  const Buffer<float> x(8, "x"), y(8, "y");
  const Outcome result = outcome(launch(copy_unaligned, shape(1, 1), x, y));
  return result.empty() && !(counted("x", 0, 16, 0) && counted("y", 0, 0, 16)) ? "wrong counts" : result;
}

template <Bug bug>
Outcome run_turns(const Launch& shape) {
  const size_t n = size_t{shape.grid.x} * shape.block.x;
  const Buffer<float> x(1, "x"), y(n, "y", false);
  const Buffer<unsigned> turn(1, "turn");
  return outcome(launch(read_in_turns<bug>, shape, x, turn, y), y, n, [](size_t) { return 0.f; });
}

Outcome run_unchecked() {
  const Buffer<float> y(16, "y");
  cuda_on_cpu::config().check = false;
  return outcome(launch(write_twice, shape(1, 32), y));
}

// A kernel with nothing but an output.
Outcome run_output(void (*kernel)(float*), size_t count, const Launch& shape, bool initialised = true) {
  const Buffer<float> y(count, "y", initialised);
  return outcome(launch(kernel, shape, y));
}

Outcome run_accumulate_after_write() {
  const Buffer<float> y(64, "y", false);
  const auto error = launch(write_one_each, shape(1, 64), y);
  if (error != cudaSuccess) return outcome(error);
  return outcome(launch(accumulate, shape(1, 64), y), y, 64, [](size_t) { return 2.f; });
}

void test_good_kernels(Selftest& test) {
  test.good("transpose", run_transpose<none>);
  test.good("rotate", run_rotate<none>);
  test.good("swap in warp", run_swap<none>);
  test.good("halves of a warp", run_halves);
  test.good("warp operations", run_warp_operations);
  test.good("block reductions", run_block_reductions);
  test.good("integer atomics", run_atomics);
  test.good("bit functions", run_bit_functions);
  test.good("grid.sync", [] { return run_across_grid<none>(4, true); });
  test.good("cluster", [] { return run_cluster<none>(); });
  test.good("cluster broadcast", run_cluster_broadcast);
  test.good("ticket", run_ticket<Ticket::right>);
  test.good("ticket: reader acquires", run_ticket<Ticket::reader_acquires>);
  test.good("write, then accumulate", run_accumulate_after_write);
  test.good("counts of a copy", run_copy);
  test.good("counts of vectors", run_vectors);
  test.good("counts of scalars", run_scalars);
  test.good("counts of an unaligned copy", run_unaligned);
  test.good("read by a warp", [] { return run_turns<none>(shape(1, 32)); });
  test.good("read by a block", [] { return run_turns<none>(shape(1, 64)); });
  test.good("read by a cluster", [] { return run_turns<none>(shape(2, 64, 0, 2)); });
  test.good("read by the grid", [] { return run_turns<none>(shape(3, 64, 0, 1, true)); });
  test.good("check switched off", run_unchecked);
}

void test_planted_bugs(Selftest& test) {
  test.bug("no barrier to read", "", run_transpose<first>);
  test.bug("no barrier to overwrite", "", run_rotate<first>);
  test.bug("no __syncwarp", "", run_swap<first>);
  test.checked_bug("shuffle as barrier", "race on shared", run_swap<second>);
  test.bug("no grid.sync", "", [] { return run_across_grid<first>(4, true); });
  test.bug("no cluster.sync", "", [] { return run_cluster<first>(); });
  test.bug("early exit", "ex", [] { return run_cluster<second>(); });
  test.checked_bug("ticket: no release", "race on global memory partial", run_ticket<Ticket::no_release>);
  test.checked_bug("ticket: early fence", "race on global memory partial", run_ticket<Ticket::fence_before_write>);
  test.checked_bug("ticket: no barrier", "race on global memory partial", run_ticket<Ticket::no_barrier>);
  test.checked_bug("ticket: no acquire", "race on global memory partial", run_ticket<Ticket::no_acquire>);
  test.checked_bug("two writers", "race on global memory y", [] { return run_output(write_twice, 16, shape(1, 32)); });
  const char* overwritten = "is not ordered after the read";
  test.checked_bug("overwritten in a warp", overwritten, [] { return run_turns<first>(shape(1, 32)); });
  test.checked_bug("first in a warp", overwritten, [] { return run_turns<second>(shape(1, 32)); });
  test.checked_bug("overwritten in a block", overwritten, [] { return run_turns<first>(shape(1, 64)); });
  test.checked_bug("first in a block", overwritten, [] { return run_turns<second>(shape(1, 64)); });
  test.checked_bug("overwritten in a cluster", overwritten, [] { return run_turns<first>(shape(2, 1, 0, 2)); });
  test.checked_bug("first in a cluster", overwritten, [] { return run_turns<second>(shape(2, 1, 0, 2)); });
  test.checked_bug("overwritten in the grid", overwritten, [] { return run_turns<first>(shape(3, 1)); });
  test.checked_bug("first in the grid", overwritten, [] { return run_turns<second>(shape(3, 1)); });
  test.checked_bug("write after atomic", "is not ordered after the atomic", [] {
    const Buffer<unsigned> counter(1, "counter"), turn(1, "turn");
    return outcome(launch(write_after_atomic, shape(2, 1), counter, turn));
  });
  test.checked_bug("plain counter", "race on global memory counter", [] {
    const Buffer<unsigned> counter(1, "counter");
    return outcome(launch(add_plainly, shape(2, 1), counter));
  });
  test.checked_bug("global out of bounds", "out-of-bounds global 4-byte write, 0 bytes past the end of y",
                   [] { return run_output(write_one_each, 64, shape(1, 65)); });
  test.checked_bug("ragged vectors", "out-of-bounds global 16-byte read, across an end of x", [] {
    const Buffer<float> x(30, "x"), y(8, "y", false);
    return outcome(launch(read_whole_vectors, shape(1, 32), x.as<float4>(), y, 30));
  });
  test.checked_bug("misaligned", "misaligned global 16-byte read", [] {
    const Buffer<float> x(8, "x"), y(1, "y", false);
    return outcome(launch(read_misaligned, shape(1, 1), x, y));
  });
  test.checked_bug("shared out of bounds", "out-of-bounds shared",
                   [] { return run_output(step_over_shared, 32, shape(1, 32)); });
  test.checked_bug("too little dynamic", "out-of-bounds shared",
                   [] { return run_output(use_dynamic_shared, 32, shape(1, 32, 100)); });
  test.bug("unwritten shared", cuda_on_cpu::checked_build() ? "uninitialised shared" : "wrong result", [] {
    const Buffer<float> y(64, "y", false);
    return outcome(launch(read_unwritten_shared, shape(1, 64), y), y, 64, [](size_t) { return 0.f; });
  });
  test.checked_bug("unwritten global", "uninitialised global memory y",
                   [] { return run_output(accumulate, 64, shape(1, 64), false); });
  test.bug("exit before barrier", "divergent barrier",
           [] { return run_output(exit_before_barrier, 64, shape(1, 64)); });
  test.bug("two barriers", "divergent barrier", [] { return run_output(two_barriers, 64, shape(1, 64)); });
  test.bug("half a warp shuffles", "warp divergence", [] { return run_output(shuffle_half, 32, shape(1, 32)); });
  test.bug("crossed masks", "deadlock", [] { return run_output(cross_masks, 32, shape(1, 32)); });
  test.bug("cluster 3 of 8", "invalid cluster size", [] { return run_cluster<none>(3); });
  test.bug("cooperative, too large", "too large: ", [] { return run_across_grid<none>(8 * (2048 / 64) + 1, true); });
  test.bug("grid.sync, plain launch", "not cooperative", [] { return run_across_grid<none>(4, false); });
  test.bug("too much dynamic", "too much dynamic shared",
           [] { return run_output(use_dynamic_shared, 32, shape(1, 32, 227 * 1024 + 1)); });
}
}  // namespace

int main() {
  Selftest test;
  test_good_kernels(test);
  test_planted_bugs(test);
  return test.finish();
}
