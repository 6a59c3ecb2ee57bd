// CUDA backend: the registration of the ops for CUDA tensors. Device and stream come from c10's generic interface, so
// this compiles and links against any torch, whether or not it was built with CUDA.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <array>
#include <mutex>

#include "../host.h"
#include "backend.h"
#include "planner.h"

namespace bnext::cuda {
namespace {

struct Runtime {
  // Current for torch, and for the CUDA runtime that this library may have linked for itself.
  struct Guard {
    explicit Guard(c10::Device device) : torch(device) { check(cudaSetDevice(device.index())); }
    c10::DeviceGuard torch;
  };

  static cudaStream_t stream(c10::Device device) {
    const c10::impl::VirtualGuardImpl impl(device.type());
    return static_cast<cudaStream_t>(impl.getStream(device).native_handle());
  }

  // Asked once for each device.
  static Device device(c10::Device device) {
    constexpr size_t kDevices = 64;
    static std::array<Device, kDevices> known;
    static std::array<std::once_flag, kDevices> once;
    const size_t index = static_cast<size_t>(device.index());
    TORCH_CHECK(index < kDevices, "expected a CUDA device below ", kDevices, ", got ", device);
    std::call_once(once[index], [&] {
      const Guard current(device);
      check(query(known[index]));
    });
    return known[index];
  }

  static Plan plan(const Request& request, const Device& device) {
    return make_plan(request, device, forced_strategy());
  }

  template <class Params>
  static void launched(const Params&, const Plan&, const at::Tensor&) {}

  static std::string message(cudaError_t error) {
    cudaGetLastError();  // else the next launch of anyone would find it
    return cudaGetErrorString(error);
  }

  static void check(cudaError_t error) { TORCH_CHECK(error == cudaSuccess, explain(error, message(error))); }
};

}  // namespace

Device current_device() {
  return Runtime::device(c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getDevice());
}

TORCH_LIBRARY_IMPL(bnext, CUDA, m) {
  host::register_backend<Backend<Runtime>>(m);
}

}  // namespace bnext::cuda
