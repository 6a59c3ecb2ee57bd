// bnext._C: facts about the build. Loading it registers torch.ops.bnext.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

#define BNEXT_STRING_OF(x) #x
#define BNEXT_STRING(x) BNEXT_STRING_OF(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of bnext: loading it registers torch.ops.bnext.";
  m.attr("torch_version") = BNEXT_STRING(BNEXT_TORCH_VERSION);  // the torch it was built against
  m.def("cpu_isa", &bnext::cpu::isa,
        "Instruction set of the CPU kernels: scalar, avx2 or avx512; BNEXT_CPU_ISA forces one.");
}
