// The CPU loops, compiled once for each instruction set: the unit that includes this defines BNEXT_ISA (the namespace)
// and BNEXT_VECTOR_BYTES, and BNEXT_BF16 if it is for
// bfloat16 alone, with its instructions. Every sum has one order, given by the shape alone.
#include "backward.inl"
#include "forward.inl"

namespace bnext::cpu::BNEXT_ISA {
namespace {

template <class T>
constexpr Kernels table = {
    {forward_reduce<T>, forward_finish<T>, forward_apply<T>},
    {backward_reduce<T>, backward_finish<T>, backward_apply<T>},
};

}  // namespace

const Kernels& kernels([[maybe_unused]] DType dtype) {
#ifdef BNEXT_BF16
  return table<BFloat16>;
#else
  return *with_type(dtype, [](auto t) { return &table<decltype(t)>; });
#endif
}

}  // namespace bnext::cpu::BNEXT_ISA
