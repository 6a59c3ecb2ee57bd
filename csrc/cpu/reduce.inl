// Sums over a channel of the two terms that math::Factors make, for kernels.inl: short sums in A, then in double, in an
// order that does not depend on the instruction set. A is float for float32 and narrower types, or double.
#pragma once

#include "sums.h"
#include "tensors.h"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using std::int64_t;

// Values of T summed in A: of half types more, since they are far from float32's last digits.
template <class T>
constexpr int kShort = sizeof(T) == sizeof(std::uint16_t) ? 8 : 4;

// Of rows, parts of which are read side by side.
constexpr int64_t kStretchBytes = 256 * 1024;

// Elements from what is read to what is asked for.
template <class T>
constexpr int64_t kAhead = 4096 / static_cast<int64_t>(sizeof(T));

// Rows of `width` elements of T in a stretch.
template <class T>
int64_t stretch_rows(int64_t width) {
  return std::max<int64_t>(8, kStretchBytes / static_cast<int64_t>(width * sizeof(T)));
}
// From one of so many parts of a stretch to the next. Rows are often a power of two in size: an odd number of them
// keeps the parts from the same sets of the nearest cache.
inline int64_t rows_apart(int64_t rows, int parts) {
  const int64_t apart = rows / parts;
  return apart > 0 ? (apart - 1) | 1 : 0;
}
// f(how many rows together, the first of them, how far each is from the one before, columns) for all rows of `width`
// elements of T, the last of which may be short: `most` together, from so many parts of a stretch, then one by one.
template <class T, int most, class F>
[[gnu::always_inline]] inline void in_stretches(int64_t elements, int64_t width, F f) {
  const int64_t rows = elements / width, stretch = stretch_rows<T>(width);
  constexpr std::integral_constant<int, 1> kAlone{};
  int64_t row = 0;
  for (int64_t apart; (apart = rows_apart(std::min(stretch, rows - row), most)) > 0; row += most * apart)
    for (int64_t r = row; r < row + apart; ++r) f(std::integral_constant<int, most>{}, r, apart, width);
  for (; row < rows; ++row) f(kAlone, row, 0, width);
  f(kAlone, rows, 0, elements - rows * width);
}

// `count` ones in the last elements of a vector of A's integers.
template <class A>
auto last_lanes(int64_t count, int64_t first) {
  static constexpr std::int32_t kTable[32] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                              -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  using Lane = std::conditional_t<std::is_same_v<A, float>, std::int32_t, int64_t>;
  Vec<std::int32_t, lanes<A>> mask;
  std::memcpy(&mask, kTable + count + first, sizeof(mask));
  return __builtin_convertvector(mask, Vec<Lane, lanes<A>>);
}

// `count` runs of `size` consecutive elements, the first at `begin`, each `stride` elements after the one before; to be
// asked for ahead, or not.
struct Runs {
  int64_t count, size, stride, begin;
  bool asks;

  // Elements further on is what will be wanted soon, the same of a later channel; or 0.
  int64_t ahead() const { return asks ? (kSoon / (count * size) + 1) * size : 0; }

 private:
  static constexpr int64_t kSoon = 4096;  // elements that are summed before it is wanted, at least
};

// Sums over runs, of whose elements f makes factors. Elements go into 16 slots: element i of a run into slot i % 16,
// except that the last size % 16 go into the last slots. First factors of float32 are added up in two parts,
// since what they are sums of may cancel.
template <class A, class T>
class RunSums {
  static constexpr bool kSplit = std::is_same_v<A, float> && std::is_same_v<T, float>;
  static constexpr int kMost = kShort<T>, kSlots = 16, kPieces = kSlots / lanes<A>, kParts = lanes<A> / lanes<double>;
  using V = Vec<A, lanes<A>>;
  using Wide = Vec<double, lanes<double>>;

 public:
  template <class F, class... P>
  void add(const Runs& runs, F f, P... p) {
    if (runs.size < kSlots) {
      for (int64_t n = 0; n < runs.count; ++n) add_one_by_one(runs.size, f, p + runs.begin + n * runs.stride...);
      return;
    }
    Wide sum[kPieces][2][kParts];
    V rest[kPieces] = {};
    each(sum, [](Wide& value, double* slots) { std::memcpy(&value, slots, sizeof(value)); });
    const int64_t ahead = runs.ahead();
    for (int64_t n = 0; n < runs.count; ++n)
      add_run(sum, rest, runs.size, ahead, f, p + runs.begin + n * runs.stride...);
    for (int piece = 0; kSplit && piece < kPieces; ++piece) add_in_double(sum[piece][0], rest[piece]);
    each(sum, [](Wide value, double* slots) { std::memcpy(slots, &value, sizeof(value)); });
  }
  double total(int term) const {
    double slots[kSlots];
    std::memcpy(slots, sums_[term], sizeof(slots));
    for (int half = kSlots / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) slots[i] += slots[i + half];
    return slots[0];
  }

 private:
  template <class F, class... P>
  void add_one_by_one(int64_t size, F f, P... p) {
    for (int64_t i = 0; i < size; ++i) {
      double one[2] = {};
      math::add(one, f(element<double>(p, i)...));
      for (int t = 0; t < 2; ++t) sums_[t][i] += one[t];
    }
  }

  // Of a first factor what goes into a short sum; the rest, if any, is added to `rest`.
  [[gnu::always_inline]] static V part_of(V first, [[maybe_unused]] V& rest) {
    if constexpr (kSplit) {
      const V part = leading(first);
      rest = cpu::BNEXT_ISA::add(rest, subtract(first, part));
      return part;
    }
    return first;
  }

  template <class F, class... P>
  [[gnu::always_inline]] static void add_run(Wide (&sum)[kPieces][2][kParts], V (&rest)[kPieces], int64_t size,
                                             int64_t ahead, F f, P... p) {
    // Of `length` times kSlots elements from i on and, if there are any, of the run's last ones, fewer than kSlots.
    const auto step = [&](auto length, int64_t i, int64_t last) __attribute__((always_inline)) {
      if (ahead != 0) (prefetch<length * kSlots>(p + i + ahead), ...);
#pragma GCC unroll 8
      for (int piece = 0; piece < kPieces; ++piece) {
        V some[2] = {};
        unrolled<length>([&](auto u) __attribute__((always_inline)) {
          const auto factors = f(load<A>(p + i + u * kSlots + piece * lanes<A>)...);
          const V first = part_of(factors.first, rest[piece]);
          if constexpr (u == 0) {
            some[0] = first;
            some[1] = factors.first * factors.second;
          } else {
            some[0] += first;
            some[1] = math::multiply_add(factors.first, factors.second, some[1]);
          }
        });
        if (last) {
          auto fresh = last_lanes<A>(last, piece * lanes<A>);
          V more[2] = {};
          math::add(more, f(load<A>(p + (size - kSlots + piece * lanes<A>))...));
#pragma GCC unroll 2
          for (V& value : more) value = bit_cast<V>(bit_cast<decltype(fresh)>(value) & fresh);
          some[0] += part_of(more[0], rest[piece]);
          some[1] += more[1];
        }
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) add_in_double(sum[piece][t], some[t]);
      }
    };
    int64_t i = 0;
    for (; i + kMost * kSlots <= size; i += kMost * kSlots) step(std::integral_constant<int, kMost>{}, i, 0);
    for (; i + 4 * kSlots <= size; i += 4 * kSlots) step(std::integral_constant<int, 4>{}, i, 0);
    if (i < size) {
      const int64_t last = size % kSlots;
      switch ((size - i) / kSlots) {
        case 0:
          step(std::integral_constant<int, 0>{}, i, last);
          break;
        case 1:
          step(std::integral_constant<int, 1>{}, i, last);
          break;
        case 2:
          step(std::integral_constant<int, 2>{}, i, last);
          break;
        default:
          step(std::integral_constant<int, 3>{}, i, last);
      }
    }
  }

  template <class F>
  void each(Wide (&sum)[kPieces][2][kParts], F f) {
#pragma GCC unroll 8
    for (int piece = 0; piece < kPieces; ++piece)
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t)
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part)
          f(sum[piece][t][part], sums_[t] + piece * lanes<A> + part * lanes<double>);
  }
  double sums_[2][kSlots] = {};
};

// Sums over rows of `width` elements, one for each column: those of term t go into sums[t * width + c]; the last row
// may be short. f, which makes factors, also gets what all rows share, for column c channel[i * width + c], i of [0,
// shared_count). Rows whose elements are summed in A are from `kMost` parts of a stretch, each part read in order of
// memory: prefetchers follow that, and lose their way where neighbouring rows are read side by side.
template <class A, class T, int shared_count = 1>
class RowSums {
  static constexpr int kMost = kShort<T>, kLanes = lanes<A>, kParts = lanes<A> / lanes<double>;
  static constexpr int kColumns = kLine / (kLanes * static_cast<int>(sizeof(T)));  // vectors of a cache line
  using Wide = Vec<double, lanes<double>>;

 public:
  RowSums(double* sums, int64_t width, bool asks) : sums_(sums), width_(width), asks_(asks) {}

  template <class F, class... P>
  void add(int64_t elements, F f, const A* channel, P... p) const {
    in_stretches<T, kMost>(elements, width_, [&](auto rows, int64_t row, int64_t apart, int64_t size) {
      add_rows<rows>(size, apart * width_, f, channel, p + row * width_...);
    });
  }
  // The same of `least` rows or a few more, from the first to the last in equal steps, or of all where they are fewer;
  // returns how many elements they have.
  template <class F, class... P>
  int64_t add_some(int64_t elements, int64_t least, F f, const A* channel, P... p) const {
    const int64_t times = std::max<int64_t>(1, (least + kMost - 1) / kMost);
    const int64_t apart = (elements / width_ - 1) / (times * kMost - 1);
    if (apart == 0) {
      add(elements, f, channel, p...);
      return elements;
    }
    for (int64_t i = 0; i < times; ++i)
      add_rows<kMost>(width_, times * apart * width_, f, channel, p + i * apart * width_...);
    return times * kMost * width_;
  }

 private:
  // The first `size` columns of `rows` rows that are `apart` elements apart.
  template <int rows, class F, class... P>
  void add_rows(int64_t size, int64_t apart, F f, const A* channel, P... p) const {
    double* const sums = sums_;
    const int64_t width = width_;
    const bool asks = asks_;
    const auto vector = [&](int64_t c) __attribute__((always_inline)) {
      Vec<A, kLanes> shared[shared_count], some[2];
      unrolled<shared_count>([&](auto i) { shared[i] = load<A>(channel + i * width + c); });
      unrolled<rows>([&](auto r) {
        const auto factors = f(shared, load<A>(p + r * apart + c)...);
        if constexpr (r == 0) {
          some[0] = factors.first;
          some[1] = factors.first * factors.second;
        } else {
          math::add(some, factors);
        }
      });
      unrolled<2>([&](auto t) {
        Wide sum[kParts];
        double* const at = sums + t * width + c;
        unrolled<kParts>([&](auto i) { std::memcpy(&sum[i], at + i * lanes<double>, sizeof(Wide)); });
        add_in_double(sum, some[t]);
        unrolled<kParts>([&](auto i) { std::memcpy(at + i * lanes<double>, &sum[i], sizeof(Wide)); });
      });
    };
    int64_t c = 0;
    for (; c + kColumns * kLanes <= size; c += kColumns * kLanes) {
      if (asks) {
        unrolled<rows>([&](auto r)
                           __attribute__((always_inline)) { (prefetch<1>(p + r * apart + c + kAhead<T>), ...); });
      }
      unrolled<kColumns>([&](auto v) { vector(c + v * kLanes); });
    }
    for (; c + kLanes <= size; c += kLanes) vector(c);
    for (; c < size; ++c) {
      A shared[shared_count], some[2] = {};
      for (int i = 0; i < shared_count; ++i) shared[i] = channel[i * width + c];
      for (int r = 0; r < rows; ++r) math::add(some, f(shared, element<A>(p, r * apart + c)...));
      for (int t = 0; t < 2; ++t) sums[t * width + c] += static_cast<double>(some[t]);
    }
  }

  double* sums_;  // [2, width]
  int64_t width_;
  bool asks_;  // for rows ahead
};

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
