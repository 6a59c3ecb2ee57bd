// What of a register of gradients ReLU's backward lets pass to the sums of pairs.inl.
#pragma once

#include "common.inl"
#include "gradients.inl"
#include "pair_rows.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

// Those whose bits the mask has.
struct OfMask {
  const std::uint8_t* mask;

  __m512i operator()(int64_t i, __mmask32 present, __m512i a, __m512i) const {
    const int shift = static_cast<int>(i % 8), bytes = (shift + __builtin_popcount(present) + 7) / 8;
    const __m128i bits = _mm_maskz_loadu_epi8((1 << bytes) - 1, mask + i / 8);
    return _mm512_maskz_mov_epi16(static_cast<__mmask32>(_mm_cvtsi128_si64(bits) >> shift), a);
  }
  const OfMask& columns(int64_t) const { return *this; }
};

// Those whose x normalises to what passes.
struct OfInput {
  Vec<float, 16> factors[2][3];  // [part of a register, mean, scale or bias]

  __m512i operator()(int64_t, __mmask32, __m512i dy, __m512i x) const {
    const auto passes = [&](auto v) __attribute__((always_inline)) {
      return math::Relu::passes(math::normalize(widen_part<v>(x), factors[v][0], factors[v][1], factors[v][2]));
    };
    auto kept = (Vec<std::int32_t, 16>)dy;  // the first of two in the lower half
    kept = passes(std::integral_constant<int, 0>{}) ? kept : kept & -65536;
    kept = passes(std::integral_constant<int, 1>{}) ? kept : kept & 65535;
    return (__m512i)kept;
  }
};
class OfInputs {
 public:
  OfInputs(const BackwardParams& p, const Row& row) : factors_(new float[3 * (row.width() + kInRegister)]()) {
    for (int64_t c = 0; c < p.C; ++c)
      put_factors<BFloat16, 3>(p.layout, row, factors_.get(), c, of_forward<float>(p, c).factors);
  }
  OfInput columns(int64_t c) const {
    OfInput gate;
    for (int v = 0; v < 2; ++v)
      for (int j = 0; j < 3; ++j) gate.factors[v][j] = load<float>(&factors_[factor_at<BFloat16, 3>(j, c + v)]);
    return gate;
  }

 private:
  std::unique_ptr<float[]> factors_;
};

// The gate of channel c, and that of rows.
template <class Gradient>
auto gate_of(const BackwardParams& p, int64_t c) {
  if constexpr (std::is_same_v<Gradient, Plain>) {
    return Open();
  } else if constexpr (std::is_same_v<Gradient, ReluOfMask>) {
    return OfMask{p.mask};
  } else {
    OfInput gate;
    const auto of_channel = of_forward<float>(p, c);
    for (auto& part : gate.factors)
      for (int j = 0; j < 3; ++j) part[j] = of_channel.factors[j] - Vec<float, 16>{};
    return gate;
  }
}
template <class Gradient>
auto gate_of(const BackwardParams& p, const Row& row) {
  if constexpr (std::is_same_v<Gradient, ReluOfInput>) {
    return OfInputs(p, row);
  } else {
    return gate_of<Gradient>(p, 0);
  }
}

}  // namespace
}  // namespace bnext::cpu::BNEXT_ISA
