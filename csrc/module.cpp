// bnext._C: one call of batch norm, the instruction set, and what is planned for a CPU or GPU. Loading it registers
// torch.ops.bnext.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "autograd.h"
#include "cpu/kernels.h"
#include "cuda/plan_dict.h"
#include "cuda/planner.h"

namespace py = pybind11;

namespace {

bnext::DType dtype_named(const std::string& name) {
  if (name == "float64") return bnext::DType::float64;
  if (name == "float32") return bnext::DType::float32;
  if (name == "bfloat16") return bnext::DType::bfloat16;
  if (name == "float16") return bnext::DType::float16;
  throw std::invalid_argument("expected dtype to be float64, float32, bfloat16 or float16, got " + name);
}

py::object plan(std::int64_t N, std::int64_t C, std::int64_t S, bool channels_last, const std::string& dtype,
                bool backward, bool training, bool reduces, bool applies, bool cumulative, bool aligned,
                const py::dict& gpu, const std::string& strategy) {
  if (N < 1 || C < 1 || S < 1) throw std::invalid_argument("expected N, C and S to be positive");
  const bnext::DType type = dtype_named(dtype);
  const bnext::Layout layout = channels_last && C > 1 ? bnext::Layout::channels_last : bnext::Layout::planar;
  const bnext::cuda::Request request{
      {N, C, S, layout, type, type}, backward, training, reduces, applies, cumulative, aligned};
  const bnext::cuda::Device device = bnext::cuda::device_of(gpu);
  const bnext::cuda::Planner planner(request, device);
  const auto named = bnext::cuda::strategy_named(strategy);
  const auto p = named ? planner.plan(*named) : bnext::cuda::make_plan(request, device, bnext::cuda::forced_strategy());
  if (!p) return py::none();
  py::dict result = bnext::cuda::as_dict(*p);
  result["microseconds"] = planner.microseconds(*p);
  return result;
}

py::dict cpu_plan(std::int64_t N, std::int64_t C, std::int64_t S, bool channels_last, const std::string& dtype,
                  bool backward, bool training, int threads) {
  if (N < 1 || C < 1 || S < 1) throw std::invalid_argument("expected N, C and S to be positive");
  const bool planar = (!channels_last && S != 1) || C == 1;
  const bnext::Layout layout = planar ? bnext::Layout::planar : bnext::Layout::channels_last;
  const bnext::DType type = dtype_named(dtype);
  const bnext::Problem problem{N, C, S, layout, type, type};
  py::dict result;
  const int inputs = backward ? 2 : 1;
  const std::int64_t group = bnext::cpu::group_channels(problem, training, true, inputs, threads);
  result["group"] = group;
  result["streaming"] = bnext::cpu::streams(problem, group, bnext::cpu::passes_of(inputs, training, true));
  result["cache"] = bnext::cpu::last_level_cache();
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of bnext: loading it registers torch.ops.bnext.";
  m.def("cpu_isa", &bnext::cpu::isa,
        "Instruction set of the CPU kernels: scalar, avx2, avx512 or avx512bf16; BNEXT_CPU_ISA forces one.");
  using py::arg;
  m.def("batch_norm", torch::wrap_pybind_function_no_gil(&bnext::batch_norm), arg("input"), arg("weight"), arg("bias"),
        arg("running_mean"), arg("running_var"), arg("num_batches_tracked"), arg("training"), arg("momentum"),
        arg("eps"), arg("skipped_batches") = py::none(),
        "bnext.BatchNormFunction.apply of plain tensors: the same arguments, ops and gradients, by a node in C++.");
  m.def("cpu_plan", &cpu_plan, arg("N"), arg("C"), arg("S"), py::kw_only(), arg("channels_last"), arg("dtype"),
        arg("backward"), arg("training"), arg("threads"),
        "How the CPU kernels take a batch norm, as a dict. group: channels taken together, from a cache that holds "
        "them, 0: the whole tensor. streaming: whether results are written past the caches. cache: bytes of the last.");
  m.def(
      "gpu", [] { return bnext::cuda::as_dict(bnext::cuda::current_device()); },
      "The properties of torch's current CUDA device that plan takes; NotImplementedError without CUDA kernels.");
  m.def("plan", &plan, arg("N"), arg("C"), arg("S"), py::kw_only(), arg("channels_last"), arg("dtype"), arg("backward"),
        arg("training"), arg("reduces"), arg("applies"), arg("cumulative"), arg("aligned"), arg("gpu"),
        arg("strategy") = "",
        "What csrc/cuda/planner.h chooses for a problem [N, C, S] on a GPU with these properties, as a dict; with "
        "BNEXT_CUDA_STRATEGY set, that strategy wherever it is possible. strategy: of this one, or None where it is "
        "not. microseconds: what the choice goes by, an estimate.");
}
