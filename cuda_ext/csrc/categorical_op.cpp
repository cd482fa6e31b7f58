// npr::categorical on the CPU, around npr/categorical.h.
#include "npr/categorical.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "storage_type.h"

namespace npr {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

// -> indices, log-probabilities at temperature 1 and at the given temperatures, each [S].
std::tuple<at::Tensor, at::Tensor, at::Tensor> categorical(const at::Tensor& logits, const at::Tensor& uniforms,
                                                           const at::Tensor& temperatures) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "logits must be [S, V], not ", logits.sizes());
  TORCH_CHECK_VALUE(uniforms.scalar_type() == at::kDouble && uniforms.sizes() == at::IntArrayRef{logits.size(0)},
                    "uniforms must be float64 [S]");
  TORCH_CHECK_VALUE(temperatures.scalar_type() == at::kFloat && temperatures.sizes() == uniforms.sizes(),
                    "temperatures must be float32 [S]");
  const at::Tensor rows = logits.contiguous();
  const at::Tensor uniform = uniforms.contiguous();
  const at::Tensor temperature = temperatures.contiguous();
  at::Tensor indices = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  const auto type = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor policy = at::empty({logits.size(0)}, logits.options().dtype(type));
  at::Tensor sampler = at::empty_like(policy);
  with_storage_type(logits.scalar_type(), "categorical", [&]<typename Stored>(Stored) {
    using T = ComputeOf<Stored>;
    const int64_t size = rows.size(1);
    const auto* from = static_cast<const Stored*>(rows.const_data_ptr());
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / size);
    at::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
      LogitRow<Stored> row(size);
      for (int64_t i = begin; i < end; ++i) {
        const auto drawn = row.draw(from + i * size, uniform.const_data_ptr<double>()[i],
                                    static_cast<T>(temperature.const_data_ptr<float>()[i]));
        indices.mutable_data_ptr<int64_t>()[i] = drawn.index;
        policy.mutable_data_ptr<T>()[i] = drawn.policy;
        sampler.mutable_data_ptr<T>()[i] = drawn.sampler;
      }
    });
  });
  return {indices, policy, sampler};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(npr, library) {
  library.def("categorical(Tensor logits, Tensor uniforms, Tensor temperatures) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(npr, CPU, library) { library.impl("categorical", &categorical); }

}  // namespace npr
