// The forward kernels: every instance, and the choice among them.
#include "forward.cuh"
#include "launch.cuh"

namespace bnext::cuda {

cudaError_t forward(const ForwardParams& p, const Plan& plan, void* scratch, cudaStream_t stream) {
  const Request r = request(p);
  const Work work(r, plan, scratch);
  return with_type(p.dtype, [&](auto t) {
    return with_tile<decltype(t), false>(
        p.layout, r.after(plan.whole), plan, [&](auto tile, auto resident, auto after) {
          using Tile = typename decltype(tile)::type;
          return launch<Forward<Tile, decltype(resident)::value, decltype(after)::value>>(p, plan, work, stream);
        });
  });
}

}  // namespace bnext::cuda
