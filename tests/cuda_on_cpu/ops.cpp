// bnext's CUDA backend as a Python module whose kernels run on the CPU. Loading it puts them in the place of the CPU
// kernels: the ops, the host code and the modules around them are the product's own.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <string>

#include "../../csrc/host.h"
#include "backend.h"
#include "cuda_on_cpu.h"
#include "plan_dict.h"
#include "planner.h"

namespace py = pybind11;

namespace bnext::cuda {
namespace {

Device gpu{};
std::optional<Plan> last_plan;
std::optional<Strategy> forced;
std::mutex mutex;

void add(const char* name, const void* pointer, std::int64_t bytes, bool initialised) {
  if (pointer) cuda_on_cpu::register_global(pointer, static_cast<size_t>(bytes), name, initialised);
}

std::int64_t tensor_bytes(const Problem& p) {
  return p.N * p.C * p.S * itemsize(p.dtype);
}

// Bits of packs that are not whole are put among those of others, whatever was there.
void add_mask(const Problem& p, const void* mask, bool initialised) {
  add("mask", mask, (p.N * p.C * p.S + 31) / 32 * 4, initialised);
}

void add_all(const ForwardParams& p, const Plan& plan) {
  const std::int64_t params = p.C * itemsize(p.param_dtype), stats = p.C * (p.dtype == DType::float64 ? 8 : 4);
  add("input", p.input, tensor_bytes(p), true);
  add("output", p.output, tensor_bytes(p), false);
  add("weight", p.weight, params, true);
  add("bias", p.bias, params, true);
  add("running_mean", p.running_mean, params, true);
  add("running_var", p.running_var, params, true);
  add("num_batches_tracked", p.num_batches_tracked, 8, true);
  add("residual", p.residual, tensor_bytes(p), true);
  add_mask(p, p.mask, !plan.whole);
  add("skipped_batches", p.skipped_batches, p.C * 8, true);
  add("mean", p.mean, stats, false);
  add("invstd", p.invstd, stats, false);
}
void add_all(const BackwardParams& p, const Plan&) {
  const std::int64_t params = p.C * itemsize(p.param_dtype), stats = p.C * (p.dtype == DType::float64 ? 8 : 4);
  add("grad_output", p.grad_output, tensor_bytes(p), true);
  add("input", p.input, tensor_bytes(p), true);
  add("weight", p.weight, params, true);
  add("mean", p.mean, stats, true);
  add("invstd", p.invstd, stats, true);
  add("bias", p.bias, params, true);
  add("residual", p.residual, tensor_bytes(p), true);
  add_mask(p, p.mask, true);
  add("grad_residual", p.grad_residual, tensor_bytes(p), false);
  add("grad_input", p.grad_input, tensor_bytes(p), false);
  add("grad_weight", p.grad_weight, params, false);
  add("grad_bias", p.grad_bias, params, false);
}

struct Runtime {
  struct Guard {  // one call at a time: the execution has one set of fibers
    explicit Guard(c10::Device) : lock(mutex) {}
    std::lock_guard<std::mutex> lock;
  };
  static cudaStream_t stream(c10::Device) { return nullptr; }
  static Device device(c10::Device) { return gpu; }
  static Plan plan(const Request& request, const Device& device) { return make_plan(request, device, forced); }
  template <class Params>
  static void launched(const Params& p, const Plan& plan, const at::Tensor& scratch) {
    last_plan = plan;
    cuda_on_cpu::clear_globals();
    add_all(p, plan);
    add("scratch", scratch.data_ptr(), plan.scratch, false);
  }
  static std::string message(cudaError_t error) {
    return cuda_on_cpu::last_error() + std::string(" (error ") + std::to_string(error) + ")";
  }
};

void set_gpu(const py::dict& properties) {
  gpu = device_of(properties);
  const auto [multiprocessors, shared_per_block] = std::pair{gpu.multiprocessors, gpu.shared_per_block};
  cuda_on_cpu::config().num_sms = static_cast<unsigned>(multiprocessors);
  cuda_on_cpu::config().shared_limit = static_cast<size_t>(shared_per_block);
}

py::dict traffic() {
  py::dict all;
  for (const cuda_on_cpu::RangeStats& range : cuda_on_cpu::stats()) {
    py::dict one;
    one["read"] = range.read_bytes;
    one["written"] = range.written_bytes;
    for (const auto& [name, counts] : {std::pair{"reads", range.reads}, {"writes", range.writes}}) {
      py::list widths;
      for (int i = 0; i < 5; ++i) widths.append(counts[i]);
      one[name] = widths;
    }
    all[py::str(range.name)] = one;
  }
  return all;
}

py::dict planned() {
  if (!last_plan) return {};
  return as_dict(*last_plan);
}

}  // namespace

TORCH_LIBRARY_IMPL(bnext, CPU, m) {
  host::register_backend<Backend<Runtime>>(m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using py::arg;
  m.def("set_gpu", &set_gpu, arg("properties"));
  m.def("force", [](const std::string& strategy) { forced = strategy_named(strategy); });
  m.def("configure", &cuda_on_cpu::configure, arg("schedule"), arg("seed"), arg("check"));
  m.def("take_multiprocessors", [](unsigned left) { cuda_on_cpu::config().num_sms = left; });
  m.def("take_clusters", [](unsigned left) { cuda_on_cpu::config().max_cluster = left; });
  m.def("launches", [] { return cuda_on_cpu::totals().launches; });
  m.def("traffic", &traffic, "Bytes and accesses of the last op, by buffer; in a checked build.");
  m.def("explain", [](int error) { return explain(static_cast<cudaError_t>(error), "the runtime's words"); });
  m.def("planned", &planned, "The plan of the last op.");
}

}  // namespace bnext::cuda
