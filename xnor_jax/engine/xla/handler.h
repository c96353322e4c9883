// Shared by the handlers: XLA's threads as a team, and exceptions as XLA's errors.
#ifndef XNOR_HANDLER_H_
#define XNOR_HANDLER_H_

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <thread>

#include "check.h"
#include "operation.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {

namespace ffi = ::xla::ffi;

// The caller's thread and its helpers from XLA's thread pool. Waking a thread takes about
// ten microseconds, so helpers are scheduled once and spin between loops until the team is
// destroyed. The caller runs tasks too and waits only for tasks that have begun, so a pool
// whose threads are all busy causes neither delay nor deadlock.
class PoolTeam {
 public:
  // `work`: the total, in multiplications.
  PoolTeam(ffi::ThreadPool& pool, double work)
      : PoolTeam(pool, Helpers(pool.num_threads(), work)) {}
  ~PoolTeam() {
    if (state_ != nullptr) state_->over.store(true, std::memory_order_release);
  }
  PoolTeam(const PoolTeam&) = delete;
  PoolTeam& operator=(const PoolTeam&) = delete;

  operator Team&() { return team_; }
  int64_t threads() const { return team_.threads(); }
  template <class Task>
  void For(int64_t count, const Task& task) {
    team_.For(count, task);
  }

 private:
  // Outlives the team if a helper starts late, which then finds no task and returns.
  struct State {
    Loops loops;
    std::atomic<bool> over{false};
  };

  PoolTeam(ffi::ThreadPool& pool, int64_t helpers)
      : state_(helpers < 1 ? nullptr : std::make_shared<State>()),
        team_(state_ == nullptr ? nullptr : &state_->loops, helpers) {
    try {
      for (int64_t i = 0; i < helpers; ++i)
        pool.Schedule([state = state_, caller = std::this_thread::get_id()] {
          // A pool whose queue is full runs the function at once, on the caller's thread.
          if (std::this_thread::get_id() == caller) return;
          int spins = 0;
          while (!state->over.load(std::memory_order_acquire)) {
            if (state->loops.Help()) spins = 0;
            Pause(spins);
          }
        });
    } catch (const std::bad_alloc&) {  // The loops run with fewer helpers, too.
    }
  }

  const std::shared_ptr<State> state_;
  Team team_;
};

// Converts exceptions to XLA's errors.
template <class Call>
ffi::Error Answer(const Call& call) {
  try {
    try {
      call();
      return ffi::Error::Success();
    } catch (const Refusal& refusal) {
      return ffi::Error::InvalidArgument("xnor_jax: " + refusal.message);
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "xnor_jax: out of memory");
    } catch (const std::exception& error) {
      return ffi::Error::Internal(std::string("xnor_jax: ") + error.what());
    }
  } catch (...) {  // No memory even for that message; this one needs none.
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
  }
}

}  // namespace xnor

#endif  // XNOR_HANDLER_H_
