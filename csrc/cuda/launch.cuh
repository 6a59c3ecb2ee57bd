// From a plan to the kernel instance and its launches; one set of instances for each Op.
#pragma once

#include "driver.cuh"
#include "kernels.h"

namespace bnext::cuda {

template <class Op>
__global__ void __launch_bounds__(kMaxThreads, promised_threads(Op::kKind) / kMaxThreads)
    kernel(const __grid_constant__ typename Op::Params p, const __grid_constant__ Work w) {
  GPU_DYN_SHARED(unsigned char, shared);
  run(Op{p, w, {w, shared}}, w);
}

template <class Op>
cudaError_t launch(const typename Op::Params& p, const Plan& plan, Work work, cudaStream_t stream) {
  static_assert(sizeof(typename Op::Partial) == partial_bytes(Op::kKind.backward, Op::kKind.element));
  gpu::Launch l;
  l.grid = dim3(static_cast<unsigned>(plan.blocks));
  l.block = dim3(static_cast<unsigned>(plan.threads));
  l.shared = static_cast<size_t>(plan.shared);
  l.stream = stream;
  l.cluster = static_cast<unsigned>(plan.cluster);
  l.cooperative = plan.cooperative;
  if (plan.launches == 1) return gpu::launch(kernel<Op>, l, p, work);
  work.apply = false;
  if (const cudaError_t error = gpu::launch(kernel<Op>, l, p, work); error != cudaSuccess) return error;
  work.apply = true;
  work.reduce = false;
  return gpu::launch(kernel<Op>, l, p, work);
}

template <After after>
using AfterConstant = std::integral_constant<After, after>;

// f(TypeId of the tile, whether resident, what follows: both as constants), for what the plan says.
template <class T, bool backward, class F>
cudaError_t with_tile(Layout layout, After after, const Plan& plan, F f) {
  const auto with_after = [&](auto tile, auto resident) {
    using Tile = typename decltype(tile)::type;
    if (after == After::nothing) return f(tile, resident, AfterConstant<After::nothing>{});
    if constexpr (has_relu(Tile::kWholePacks, sizeof(T))) {
      if (after == After::relu) return f(tile, resident, AfterConstant<After::relu>{});
      if constexpr (backward)
        if (after == After::relu_of_mask) return f(tile, resident, AfterConstant<After::relu_of_mask>{});
    }
    return f(tile, resident, AfterConstant<After::any>{});
  };
  const auto with = [&](auto tile) {
    return plan.strategy == Strategy::streaming ? with_after(tile, std::false_type{})
                                                : with_after(tile, std::true_type{});
  };
  if (plan.planes) return with(gpu::TypeId<Rows<T, true, true>>{});
  if (layout == Layout::planar)
    return plan.whole ? with(gpu::TypeId<Planar<T, true>>{}) : with(gpu::TypeId<Planar<T, false>>{});
  return plan.whole ? with(gpu::TypeId<Rows<T, true, false>>{}) : with(gpu::TypeId<Rows<T, false, false>>{});
}

}  // namespace bnext::cuda
