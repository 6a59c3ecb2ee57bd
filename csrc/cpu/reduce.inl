// Sums over a channel of the two terms that math::Factors make, for kernels.inl: short sums in A, then in double, in an
// order that does not depend on the instruction set. A is float for float32 and narrower types, or double.
#pragma once

#include "tensors.h"

namespace bnext::cpu::BNEXT_ISA {
namespace {

using std::int64_t;

// Values of T summed in A: of half types more, since they are far from float32's last digits.
template <class T>
constexpr int kShort = sizeof(T) == sizeof(std::uint16_t) ? 8 : 4;

// Of the rows whose columns are summed one after the other.
constexpr int64_t kTileBytes = 64 * 1024;

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

// `count` runs of `size` consecutive elements, the first at `begin`, each `stride` elements after the one before.
struct Runs {
  int64_t count, size, stride, begin;

  // Elements further on is what will be wanted soon: the same of a later channel.
  int64_t ahead() const { return (kSoon / (count * size) + 1) * size; }

 private:
  static constexpr int64_t kSoon = 4096;  // elements that are summed before it is wanted, at least
};

// Sums over runs, of whose elements f makes factors. Elements go into 16 slots: element i of a run into slot i % 16,
// except that the last size % 16 go into the last slots. First factors of float32 are in double at once, since what
// they are sums of may cancel.
template <class A, class T>
class RunSums {
  static constexpr bool kFirstInDouble = std::is_same_v<A, float> && std::is_same_v<T, float>;
  static constexpr int kMost = kShort<T>, kSlots = 16, kPieces = kSlots / lanes<A>, kParts = lanes<A> / lanes<double>;
  using Wide = Vec<double, lanes<double>>;

 public:
  template <class F, class... P>
  void add(const Runs& runs, F f, P... p) {
    if (runs.size < kSlots) {
      for (int64_t n = 0; n < runs.count; ++n) add_one_by_one(runs.size, f, p + runs.begin + n * runs.stride...);
      return;
    }
    Wide sum[kPieces][2][kParts];
    each(sum, [](Wide& value, double* slots) { std::memcpy(&value, slots, sizeof(value)); });
    const int64_t ahead = runs.ahead();
    for (int64_t n = 0; n < runs.count; ++n) add_run(sum, runs.size, ahead, f, p + runs.begin + n * runs.stride...);
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

  template <class F, class... P>
  static void add_run(Wide (&sum)[kPieces][2][kParts], int64_t size, int64_t ahead, F f, P... p) {
    // Of `length` times kSlots elements from i on and, if there are any, of the run's last ones, fewer than kSlots.
    const auto step = [&](auto length, int64_t i, int64_t last) __attribute__((always_inline)) {
      (prefetch<length * kSlots>(p + i + ahead), ...);
#pragma GCC unroll 8
      for (int piece = 0; piece < kPieces; ++piece) {
        Vec<A, lanes<A>> some[2] = {};
        for (int u = 0; u < length; ++u) {
          const auto factors = f(load<A>(p + i + u * kSlots + piece * lanes<A>)...);
          if constexpr (kFirstInDouble) {
            add_in_double(sum[piece][0], factors.first);
            some[1] = math::multiply_add(factors.first, factors.second, some[1]);
          } else {
            math::add(some, factors);
          }
        }
        if (last) {
          auto fresh = last_lanes<A>(last, piece * lanes<A>);
          Vec<A, lanes<A>> more[2] = {};
          math::add(more, f(load<A>(p + (size - kSlots + piece * lanes<A>))...));
#pragma GCC unroll 2
          for (int t = 0; t < 2; ++t) some[t] += bit_cast<Vec<A, lanes<A>>>(bit_cast<decltype(fresh)>(more[t]) & fresh);
        }
        if (last || !kFirstInDouble) add_in_double(sum[piece][0], some[0]);
        add_in_double(sum[piece][1], some[1]);
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
// shared_count). Rows are taken in tiles that
// the nearest caches hold, since columns of a tile are summed one after the other; the next tile is asked for in order
// of memory meanwhile.
template <class A, class T, int shared_count = 1>
class RowSums {
  static constexpr int kMost = kShort<T>, kLanes = lanes<A>, kParts = lanes<A> / lanes<double>;
  static constexpr int kColumns = BNEXT_VECTOR_BYTES == 64 ? 4 : 2;  // vectors whose sums are in registers
  using Wide = Vec<double, lanes<double>>;

 public:
  RowSums(double* sums, int64_t width) : sums_(sums), width_(width) {}

  template <class F, class... P>
  void add(int64_t elements, F f, const A* channel, P... p) const {
    const int64_t rows = elements / width_, row_bytes = width_ * static_cast<int64_t>(sizeof(T) * sizeof...(P));
    const int64_t tile = std::max<int64_t>(8 / kMost, kTileBytes / row_bytes / kMost) * kMost;
    int64_t row = 0;
    for (; row < rows; row += tile) add_tile(std::min(tile, rows - row), width_, true, f, channel, p + row * width_...);
    if (const int64_t rest = elements % width_) add_tile(1, rest, false, f, channel, p + rows * width_...);
  }

 private:
  // `size` columns of some rows.
  template <class F, class... P>
  void add_tile(int64_t rows, int64_t size, bool ahead, F f, const A* channel, P... p) const {
    int64_t c = 0, asked = rows * width_;  // elements from p, in order of memory
    ahead = ahead && size > kColumns * kLanes;
    for (; c + kColumns * kLanes <= size; c += kColumns * kLanes)
      ahead ? add_columns<kColumns, true>(rows, c, asked, f, channel + c, p...)
            : add_columns<kColumns, false>(rows, c, asked, f, channel + c, p...);
    for (; c + kLanes <= size; c += kLanes) add_columns<1, false>(rows, c, asked, f, channel + c, p...);
    for (; c < size; ++c) {
      A shared[shared_count];
      for (int i = 0; i < shared_count; ++i) shared[i] = channel[i * width_ + c];
      for (int64_t row = 0, length; row < rows; row += length) {
        length = row + kMost <= rows ? kMost : 1;
        A some[2] = {};
        for (int64_t r = row; r < row + length; ++r) math::add(some, f(shared, element<A>(p, r * width_ + c)...));
        for (int t = 0; t < 2; ++t) sums_[t * width_ + c] += static_cast<double>(some[t]);
      }
    }
  }

  template <int columns, bool ahead, class F, class... P>
  void add_columns(int64_t rows, int64_t c, int64_t& asked, F f, const A* channel, P... p) const {
    const int64_t width = width_;
    int64_t next = asked;
    Wide sum[columns][2][kParts];
    each<columns>(sum, c, [](Wide& value, double* at) { std::memcpy(&value, at, sizeof(value)); });
    Vec<A, kLanes> shared[columns][shared_count];
#pragma GCC unroll 4
    for (int v = 0; v < columns; ++v)
#pragma GCC unroll 3
      for (int i = 0; i < shared_count; ++i) shared[v][i] = load<A>(channel + i * width + v * kLanes);
    const auto step = [&](auto length, int64_t first) {
#pragma GCC unroll 4
      for (int v = 0; v < columns; ++v) {
        if (ahead) (prefetch<length * kLanes>(p + next + v * length * kLanes), ...);
        Vec<A, kLanes> some[2] = {};
        for (int u = 0; u < length; ++u) math::add(some, f(shared[v], load<A>(p + first + u * width + v * kLanes)...));
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) add_in_double(sum[v][t], some[t]);
      }
      next += columns * length * kLanes;
    };
    int64_t row = 0, first = c;
    for (; row + kMost <= rows; row += kMost, first += kMost * width) step(std::integral_constant<int, kMost>{}, first);
    for (; row < rows; ++row, first += width) step(std::integral_constant<int, 1>{}, first);
    asked = next;
    each<columns>(sum, c, [](Wide value, double* at) { std::memcpy(at, &value, sizeof(value)); });
  }

  template <int columns, class F>
  void each(Wide (&sum)[columns][2][kParts], int64_t c, F f) const {
#pragma GCC unroll 4
    for (int v = 0; v < columns; ++v)
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t)
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part)
          f(sum[v][t][part], sums_ + t * width_ + c + v * kLanes + part * lanes<double>);
  }

  double* sums_;  // [2, width]
  int64_t width_;
};

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
