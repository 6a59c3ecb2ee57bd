// Which instruction-set unit runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bnext::cpu {
namespace {

struct Unit {
  const char* name;
  bool runs_here;
  const Kernels& (*kernels)(DType);
};

#ifdef __x86_64__
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
}
const Kernels& avx512bf16_kernels(DType dtype) {
  return (dtype == DType::bfloat16 ? avx512bf16::kernels : avx512::kernels)(dtype);
}
#endif

const Unit& choose() {
  // The best first.
  static const Unit units[] = {
#ifdef __x86_64__
      {"avx512bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), avx512bf16_kernels},
      {"avx512", has_avx512(), avx512::kernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"), avx2::kernels},
#endif
      {"scalar", true, scalar::kernels},
  };
  const char* variable = std::getenv("BNEXT_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  for (const Unit& unit : units) {
    if (wanted.empty() ? unit.runs_here : wanted == unit.name) {
      if (unit.runs_here) return unit;
      throw std::invalid_argument("BNEXT_CPU_ISA: this machine has no " + wanted + "; unset it or say scalar");
    }
  }
  throw std::invalid_argument("BNEXT_CPU_ISA: expected scalar, avx2, avx512 or avx512bf16, got " + wanted);
}

const Unit& unit() {
  static const Unit& chosen = choose();
  return chosen;
}

}  // namespace

const char* isa() {
  return unit().name;
}

const Kernels& kernels(DType dtype) {
  return unit().kernels(dtype);
}

}  // namespace bnext::cpu
