// The elementwise pass, for forward.inl and backward.inl.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "common.inl"

namespace bnext::cpu::BNEXT_ISA {

#ifdef BNEXT_BF16
// Whether the instructions that round to T take denormals for zeros.
template <class T>
inline constexpr bool kFlushes = std::is_same_v<T, BFloat16>;

// Where results go that are 0 or no denormals.
struct Normal {
  BFloat16* values;

  Normal operator+(std::int64_t i) const { return {values + i}; }
};
inline std::uintptr_t address(const Normal& p) {
  return address(p.values);
}
inline void store_one(const Normal& p, float value) {
  store_one(p.values, value);
}
template <bool streaming, class V>
inline void store(const Normal& p, V v) {
  store<streaming>(p.values, v);
}
template <bool streaming>
inline void store_parts(const Normal& p, const Vec<float, 16> (&v)[2]) {
  write_vector<streaming>(p.values, narrow_normal_parts(v));
}
#else
template <class T>
inline constexpr bool kFlushes = false;
#endif

namespace {

// out[i] = f(factors, in[i]...) for i in [0, size); out and in are arrays of T or, as the rest below, places of
// tensors.h.
template <int factor_count, class A, class F, class Out, class... In>
void map_one(const A* factors, int64_t size, F f, Out out, In... in) {
  constexpr int64_t kLanes = lanes<A>;
  if (size < kLanes) {
    for (int64_t i = 0; i < size; ++i) store_one(out + i, f(factors, element<A>(in, i)...));
    return;
  }
  const auto write = [&](int64_t i) { store<false>(out + i, f(factors, load<A>(in + i)...)); };
  for (int64_t i = 0; i + kLanes <= size; i += kLanes) write(i);
  write(size - kLanes);  // may overlap the one before
}

// The factors of the elements of a vector.
template <class A, int factor_count>
using VectorFactors = std::array<Vec<A, lanes<A>>, factor_count>;
// Those of one channel.
template <int factor_count, class A>
[[gnu::always_inline]] inline VectorFactors<A, factor_count> to_all(const A* factors) {
  VectorFactors<A, factor_count> all;
  unrolled<factor_count>([&](auto j) { all[j] = factors[j] - Vec<A, lanes<A>>{}; });  // -0 too
  return all;
}
// a's for the first `count`, b's for the others.
template <class V, std::size_t factor_count>
[[gnu::always_inline]] inline std::array<V, factor_count> mixed(std::uint64_t count,
                                                                const std::array<V, factor_count>& a,
                                                                const std::array<V, factor_count>& b) {
  std::array<V, factor_count> some;
  unrolled<factor_count>([&](auto j) { some[j] = first_of(count, a[j], b[j]); });
  return some;
}

// The same for `runs` runs of `size` elements, one behind the other, each with factors of its own, from the first to
// the last or, `down`, from the last to the first. Stores are of whole vectors that lie within a line of the caches,
// runs or no runs; only whole lines are written past the caches, since to mix both ways of writing within one is slow.
// `ahead` elements further on is what will be wanted soon, unless 0.
template <bool streaming, bool down, class T, int factor_count, class A, class F, class Out, class... In>
void map_runs(const A* factors, int64_t runs, int64_t size, int64_t ahead, F f, Out out, In... in) {
  constexpr int kLanes = lanes<A>, kParts = parts<A, T>;
  constexpr int64_t kCount = kParts * kLanes, kInLine = kLine / sizeof(T);
  const auto piecewise = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, next; i < end; i = next) {
      next = std::min(end, (i / size + 1) * size);
      map_one<factor_count>(factors + i / size * factor_count, next - i, f, out + i, in + i...);
    }
  };
  if (size < kCount) return piecewise(0, runs * size);  // more than two runs to a vector
  const int64_t head = std::min<int64_t>(runs * size, -address(out) % kLine / sizeof(T));
  const int64_t done = head + (runs * size - head) / kInLine * kInLine;
  if (done == head) return piecewise(0, runs * size);
  piecewise(0, head);
  const auto write = [&](int64_t i, auto factors_of) __attribute__((always_inline)) {
    if (ahead != 0) (prefetch<kCount>(in + i + ahead), ...);
    decltype(f(std::declval<const Vec<A, kLanes>*>(), load_part<A, 0>(in)...)) result[kParts];
    unrolled<kParts>([&](auto v) __attribute__((always_inline)) {
      const VectorFactors<A, factor_count> of_part = factors_of(v);
      result[v] = f(of_part.data(), load_part<A, v>(in + i)...);
    });
    store_parts<streaming>(out + i, result);
  };
  const int64_t step = down ? -kCount : kCount, next_run = down ? -factor_count : factor_count;
  const int64_t begin = down ? done - 1 : head, before = begin % size;
  const A* run = factors + begin / size * factor_count;
  auto factor = to_all<factor_count>(run);
  int64_t i = down ? done - kCount : head;
  // Elements still to be written: in all, and of the run.
  std::uint64_t total = done - head, left = down ? before + 1 : size - before;
  for (;;) {
    std::uint64_t whole = std::min(left, total) / kCount;
    total -= whole * kCount;
    left -= whole * kCount;
    for (; whole > 0; --whole, i += step) write(i, [&](auto) __attribute__((always_inline)) { return factor; });
    if (total == 0) break;
    // A vector with the last of this run, or nothing of it, and the first of the next.
    run += next_run;
    const auto next = to_all<factor_count>(run);
    write(i, [&](auto v) __attribute__((always_inline)) {
      const std::uint64_t lower = down ? kCount - left : left, count = (lower + kParts - 1 - v) / kParts;
      return down ? mixed(count, next, factor) : mixed(count, factor, next);
    });
    factor = next;
    total -= kCount;
    i += step;
    left += size - kCount;
  }
  piecewise(done, runs * size);
}

// The same for the first `width` columns of `rows` rows that are `apart` elements apart, so that factors are loaded
// once for all: column c is channel c's. All loads come before the stores: rows that are a multiple of 4 KB apart would
// otherwise wait for one another. Where results go past the caches, what is read is asked for ahead.
template <bool streaming, bool down, class T, int factor_count, int rows, class A, class F, class Out, class... In>
void map_rows(const A* factors, int64_t width, int64_t apart, F f, Out out, In... in) {
  constexpr int kLanes = lanes<A>, kParts = parts<A, T>, kCount = kParts * kLanes;
  constexpr int64_t ahead = down ? -kAhead<T> : kAhead<T>;
  const int64_t whole = width / kCount * kCount;
  for (int64_t i = 0; i < whole; i += kCount) {
    const int64_t c = down ? whole - kCount - i : i;
    if constexpr (streaming) {
      unrolled<rows>([&](auto r)
                         __attribute__((always_inline)) { (prefetch<kCount>(in + r * apart + c + ahead), ...); });
    }
    decltype(f(static_cast<const Vec<A, kLanes>*>(nullptr), load_part<A, 0>(in)...)) result[rows][kParts];
    unrolled<kParts>([&](auto v) {
      Vec<A, kLanes> factor[factor_count];
      unrolled<factor_count>(
          [&](auto j) { factor[j] = load<A>(factors + c * factor_count + (v * factor_count + j) * kLanes); });
      unrolled<rows>([&](auto r) { result[r][v] = f(factor, load_part<A, v>(in + r * apart + c)...); });
    });
    unrolled<rows>([&](auto r) { store_parts<streaming>(out + r * apart + c, result[r]); });
  }
  for (int64_t c = whole; c < width; ++c) {
    A factor[factor_count];
    for (int j = 0; j < factor_count; ++j) factor[j] = factors[factor_at<T, factor_count>(j, c)];
    for (int r = 0; r < rows; ++r) map_one<factor_count>(factor, 1, f, out + r * apart + c, in + r * apart + c...);
  }
}

// Whether a pass that reads `in` and writes `out` goes down: a load waits for stores before it whose addresses are the
// same but for a multiple of 4 KB, and where `in` lies a little before `out`, as allocators put them, what is read next
// does.
template <class Out, class... In>
bool goes_down(const Out& out, const In&... in) {
  constexpr std::uintptr_t kPage = 4096, kNear = 128;
  const auto before = [&](std::uintptr_t bytes) { return bytes > 0 && bytes <= kNear; };
  return (before((address(out) - address(in)) % kPage) || ...);
}

// out[i] = f(factors of i's channel, in[i]...) for a range of each channel's values: planes in order of memory, and of
// rows stretch after stretch, of which prefetchers follow a few parts at once, but not neighbouring rows.
template <bool streaming, bool down, class T, int factor_count, class F, class Out, class... In>
void map_in_order(const Problem& p, const Scratch& scratch, Range channels, Range values, F f, Out out, In... in) {
  const auto* factors = static_cast<const Compute<T>*>(scratch.factors);
  if (p.layout == Layout::planar) {
    // The next group of channels is read while this one is written.
    const bool grouped = values.end - values.begin == p.count() && channels.end < p.C;
    const int64_t ahead = grouped ? (channels.end - channels.begin) * p.S : 0;
    for (int64_t value = values.begin; value < values.end;) {
      const int64_t n = value / p.S, s = value % p.S, size = std::min(p.S - s, values.end - value);
      const int64_t together = size == p.S ? channels.end - channels.begin : 1;  // planes
      for (int64_t c = channels.begin; c < channels.end; c += together) {
        const int64_t i = (n * p.C + c) * p.S + s;
        map_runs<streaming, down, T, factor_count>(factors + c * factor_count, together, size, ahead, f, out + i,
                                                   in + i...);
      }
      value += size;
    }
    return;
  }
  constexpr int kRows = 4;
  const int64_t width = Row(p.C).width(), end = values.end * p.C, rows = (end - values.begin * p.C) / width;
  const auto each = [](int64_t count, auto f) __attribute__((always_inline)) {
    for (int64_t n = 0; n < count; ++n) f(down ? count - 1 - n : n);
  };
  // kRows times `apart` rows from `row` on.
  const auto write = [&](int64_t row, int64_t apart) __attribute__((always_inline)) {
    each(apart, [&](int64_t r) {
      const int64_t i = values.begin * p.C + (row + r) * width;
      map_rows<streaming, down, T, factor_count, kRows>(factors, width, apart * width, f, out + i, in + i...);
    });
  };
  const int64_t most = rows_apart(stretch_rows<T>(width), kRows), stretches = rows / (kRows * most);
  each(stretches, [&](int64_t n) { write(n * kRows * most, most); });
  int64_t row = stretches * kRows * most;
  for (int64_t apart; (apart = rows_apart(rows - row, kRows)) > 0; row += kRows * apart) write(row, apart);
  int64_t i = values.begin * p.C + row * width;
  for (int64_t size; (size = std::min(width, end - i)) > 0; i += size)
    map_rows<streaming, down, T, factor_count, 1>(factors, size, 0, f, out + i, in + i...);
}

template <class T, int factor_count, class F, class Out, class... In>
void map(const Problem& p, const Scratch& scratch, Range channels, Range values, F f, Out out, In... in) {
  // streams() wants rows of whole lines, which must begin as such.
  const std::uintptr_t begin = address(out + values.begin * p.C);
  const bool streaming = scratch.streaming && aligned_alike(out) && (begin % kLine == 0 || p.layout == Layout::planar);
  const auto write = [&](auto streams, auto down) {
    map_in_order<streams, down, T, factor_count>(p, scratch, channels, values, f, out, in...);
  };
  const auto write_in_order = [&](auto streams) {
    if constexpr (kSpecialized<T>) {  // the other dtypes are not worth compiling twice
      if (goes_down(out, in...)) return write(streams, std::true_type{});
    }
    write(streams, std::false_type{});
  };
  streaming ? write_in_order(std::true_type{}) : write_in_order(std::false_type{});
  if (streaming) fence();
}

// Whether math::normalize gives 0 or no denormal, and math::grad_input_train, whatever x and dy are, numbers of 8
// digits or fewer. A difference of such a number and a float32 number a is 0 or a multiple of 2^-25 |a|; a product with
// b, of 2^-49 |a b|; and so is what two of them add up to, of the smaller.
inline bool never_denormal(float mean, float scale, float bias) {
  return (scale == 0 || std::abs(mean * scale) >= 0x1p-70f) && (bias == 0 || std::abs(bias) >= 0x1p-95f);
}
inline bool never_denormal(float mean, float scale, float grad_mean, float projection) {
  return std::abs(mean * projection * scale) >= 0x1p-70f && std::abs(grad_mean * scale) >= 0x1p-95f;
}

// map, where that holds for all channels, without a look for denormals.
template <class T, int factor_count, class F, class... In>
void map_normal(const Problem& p, const Scratch& scratch, Range channels, Range values, F f, T* out, In... in) {
#ifdef BNEXT_BF16
  if constexpr (kFlushes<T>) {
    if (std::all_of(scratch.normal + channels.begin, scratch.normal + channels.end, [](bool normal) { return normal; }))
      return map<T, factor_count>(p, scratch, channels, values, f, Normal{out}, in...);
  }
#endif
  map<T, factor_count>(p, scratch, channels, values, f, out, in...);
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
