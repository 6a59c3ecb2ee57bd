// The contract between torch code and kernels: raw pointers, sizes, scalars. No torch header, here or below.
#pragma once

#include <cstdint>

#include "device.h"

namespace bnext {

enum class DType : std::int32_t { float64, float32, bfloat16, float16 };

inline std::int64_t itemsize(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

enum class Layout : std::int32_t {
  planar,        // element (n, c, s) at (n * C + c) * S + s
  channels_last  // element (n, c, s) at (n * S + s) * C + c
};

// What follows the normalisation, and the residual where there is one.
enum class Act : std::int32_t { identity, relu, relu6, leaky_relu, silu, hardswish };

// Whether its gradient has two slopes, so that one bit an element tells what the backward must know.
inline bool has_two_slopes(Act act) {
  return act == Act::relu || act == Act::relu6 || act == Act::leaky_relu;
}

// One batch norm over a dense tensor [N, C, S]; S is the product of the spatial sizes.
struct Problem {
  std::int64_t N, C, S;
  Layout layout;
  DType dtype;        // of the tensors [N, C, S]
  DType param_dtype;  // of weight, bias, their gradients and the running buffers

  BNEXT_DEVICE std::int64_t count() const { return N * S; }  // values per channel
};

struct ForwardParams : Problem {
  const void* input;                  // [N, C, S] dtype
  void* output;                       // [N, C, S] dtype
  const void* weight;                 // [C] param_dtype, or null: 1
  const void* bias;                   // [C] param_dtype, or null: 0
  void* running_mean;                 // [C] param_dtype, or null; read in evaluation, updated in training
  void* running_var;                  // [C] param_dtype, or null; as running_mean
  std::int64_t* num_batches_tracked;  // scalar, or null; incremented in training
  std::int64_t* skipped_batches;      // [C], or null: a batch with statistics that are not finite is not skipped
  void* mean;                         // [C] the mean used, for the backward; float32, or float64 for float64
  void* invstd;                       // [C] 1 / sqrt(var + eps) as used; like mean
  double eps;
  double momentum;
  const void* residual;  // [N, C, S] dtype, or null: added before the activation
  Act act;
  double slope;        // of leaky ReLU below 0
  std::uint8_t* mask;  // or null; bit j of byte i: the gradient passes element 8 i + j, in order of memory
  bool cumulative;     // momentum=None: the factor is 1 / num_batches_tracked, and momentum is not read
  bool training;       // statistics of the batch, or of the running buffers
};

struct BackwardParams : Problem {
  const void* grad_output;  // [N, C, S] dtype
  const void* input;        // [N, C, S] dtype
  const void* weight;       // [C] param_dtype, or null: 1
  const void* bias;         // [C] param_dtype, or null: 0; where the activation's argument is computed again
  const void* mean;         // [C] as written by the forward
  const void* invstd;       // [C] as written by the forward
  Act act;                  // with it, bias, and, where a residual was added, the mask or, without two slopes, residual
  double slope;             // of leaky ReLU below 0
  const void* residual;     // [N, C, S] dtype, or null
  const std::uint8_t* mask;  // as written by the forward, or null
  void* grad_input;          // [N, C, S] dtype, or null: not wanted
  void* grad_residual;       // [N, C, S] dtype, or null: not wanted
  void* grad_weight;         // [C] param_dtype, or null: not wanted
  void* grad_bias;           // [C] param_dtype, or null: not wanted
  bool training;             // mean and invstd depend on the input

  // Whether the sums over a channel are needed.
  BNEXT_DEVICE bool reduces() const { return grad_weight || grad_bias || (training && grad_input); }
  // Whether there is a tensor [N, C, S] to write.
  BNEXT_DEVICE bool applies() const { return grad_input || grad_residual; }
};

}  // namespace bnext
