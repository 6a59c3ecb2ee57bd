// The backend of csrc/host.h for a GPU: plan, scratch, launch, errors. Runtime is the real one (ops.cpp), or the tests'
// own, which executes the kernels on the CPU:
//   Guard(c10::Device)               makes the device current
//   stream(c10::Device)              the current stream there
//   Device device(c10::Device)       what the planner asks of it
//   plan(request, device)            make_plan, or another plan
//   launched(params, plan, scratch)  before a launch
//   message(cudaError_t)             in words
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <string>

#include "kernels.h"

namespace bnext::cuda {

// One sentence for what a user can mend; otherwise the runtime's own words.
inline std::string explain(cudaError_t error, const std::string& message) {
  const char* const rebuild =
      "rebuild bnext on this machine, or with TORCH_CUDA_ARCH_LIST naming its compute capability";
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return std::string("bnext was built without code for this GPU (") + message + "): " + rebuild;
    case cudaErrorInsufficientDriver:
      return "bnext was built with a newer CUDA than this machine's NVIDIA driver supports (" + message +
             "): update the driver, or rebuild bnext with the CUDA of your torch";
    default:
      return "bnext: a CUDA kernel could not be launched, or an earlier kernel of any library failed: " + message;
  }
}

template <class Runtime>
class Backend {
 public:
  static void forward(const ForwardParams& p, const at::Tensor& input) { run(p, input, cuda::forward); }
  static void backward(const BackwardParams& p, const at::Tensor& input) { run(p, input, cuda::backward); }

 private:
  // Whether the error says that the device cannot do what it has said it can, as under MPS; then it says so no more.
  static bool take_back(Device& device, cudaError_t error) {
    const Device before = device;
    if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported) device.cooperative = false;
    if (error == cudaErrorInvalidClusterSize || error == cudaErrorNotSupported)
      std::fill_n(device.clustered, kClusterSizes, 0);
    return device.cooperative != before.cooperative ||
           !std::equal(device.clustered, device.clustered + kClusterSizes, before.clustered);
  }

  template <class Params, class Launch>
  static void run(const Params& p, const at::Tensor& input, Launch launch) {
    const Request r = request(p);
    if (!r.reduces && r.outputs() == 0) return;
    const typename Runtime::Guard guard(input.device());
    Device device = Runtime::device(input.device());
    cudaError_t error = cudaSuccess;
    while ((error = enqueue(p, input, Runtime::plan(r, device), launch)) != cudaSuccess) {
      if (!take_back(device, error)) break;
      Runtime::message(error);  // and forgets it, which torch would find at its next launch
    }
    TORCH_CHECK(error == cudaSuccess, explain(error, Runtime::message(error)));
  }

  template <class Params, class Launch>
  static cudaError_t enqueue(const Params& p, const at::Tensor& input, const Plan& plan, Launch launch) {
    const at::Tensor scratch = at::empty({plan.scratch}, input.options().dtype(at::kByte));
    Runtime::launched(p, plan, scratch);
    return launch(p, plan, scratch.data_ptr(), Runtime::stream(input.device()));
  }
};

}  // namespace bnext::cuda
