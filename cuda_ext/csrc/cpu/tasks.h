// Tasks of unequal size on ATen's threads: whoever is free takes the next one, so results must not depend on who does.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>

namespace npr {

// `make_worker()` gives each thread its own scratch; `worker(task)` runs once for every task in [0, num_tasks).
template <typename MakeWorker>
void run_tasks(int64_t num_tasks, const MakeWorker& make_worker) {
  if (num_tasks == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t num_threads = at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), num_tasks);
  at::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      auto worker = make_worker();
      for (int64_t task = next++; task < num_tasks; task = next++) worker(task);
    }
  });
}

}  // namespace npr
