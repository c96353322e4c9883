// A loop over tasks on XLA's own thread pool.
#ifndef XNOR_JAX_PARALLEL_H_
#define XNOR_JAX_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace xnor {

// Calls task(i) for every i in [0, count), on the caller's thread and on up to
// `helpers` more. The caller takes tasks too and waits only for tasks that were begun: a
// pool whose threads are all busy, or all in here, delays nothing and locks nothing up.
template <class Task>
void ParallelFor(::xla::ffi::ThreadPool& pool, int64_t count, int64_t helpers,
                 const Task& task) {
  if (helpers > count - 1) helpers = count - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  // A helper may start after the loop is over: it finds no task and must find the state.
  auto state = std::make_shared<State>();
  auto work = [state, count, &task] {
    int64_t finished = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; ++finished) task(i);
    if (finished > 0) state->done.fetch_add(finished, std::memory_order_release);
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

}  // namespace xnor

#endif  // XNOR_JAX_PARALLEL_H_
