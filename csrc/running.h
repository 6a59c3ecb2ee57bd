// How a batch enters a channel's running statistics, once for CPU and CUDA. BNEXT_ISA: as in math.h.
#pragma once

#include "half.h"
#include "math.h"

namespace bnext::inline BNEXT_ISA {

// Whether an array of dtype can keep value: neither is it infinite or NaN, nor does it become so.
template <class A>
BNEXT_DEVICE inline bool finite(DType dtype, A value) {
  return with_type(dtype, [&](auto t) {
    const auto kept = to_float(from_float<decltype(t)>(value));
    return kept - kept == 0;
  });
}

// By statistics of a batch that are not finite as numbers of the running buffers, a guarded channel is left as it is.
template <class A>
BNEXT_DEVICE inline void update_running(const ForwardParams& p, std::int64_t c, A mean, A unbiased_var, A factor) {
  if (p.skipped_batches && !(finite(p.param_dtype, mean) && finite(p.param_dtype, unbiased_var))) {
    ++p.skipped_batches[c];
    return;
  }
  const auto update = [&](void* running, A batch) {
    write(running, p.param_dtype, c, math::update_running(read<A>(running, p.param_dtype, c), batch, factor));
  };
  update(p.running_mean, mean);
  update(p.running_var, unbiased_var);
}

}  // namespace bnext::inline BNEXT_ISA
