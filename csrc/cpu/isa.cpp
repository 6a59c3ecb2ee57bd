// Which instruction-set unit runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bnext::cpu {
namespace {

bool has_avx2() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

const char* choose() {
  const char* variable = std::getenv("BNEXT_CPU_ISA");
  const std::string name = variable ? variable : "";
  if (name.empty()) return has_avx2() ? "avx2" : "scalar";
  if (name == "scalar") return "scalar";
  if (name != "avx2") throw std::invalid_argument("BNEXT_CPU_ISA: expected scalar or avx2, got " + name);
  if (!has_avx2()) throw std::invalid_argument("BNEXT_CPU_ISA: this machine has no avx2; unset it or say scalar");
  return "avx2";
}

}  // namespace

const char* isa() {
  static const char* const chosen = choose();
  return chosen;
}

const Kernels& kernels(DType dtype) {
#ifdef __x86_64__
  static const bool wide = isa() == std::string("avx2");
  if (wide) return avx2::kernels(dtype);
#endif
  return scalar::kernels(dtype);
}

}  // namespace bnext::cpu
