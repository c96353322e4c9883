// Loops over tasks, one after another, on XLA's own thread pool.
#ifndef XNOR_JAX_TEAM_H_
#define XNOR_JAX_TEAM_H_

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace xnor {

// The caller's thread and the pool's threads that have come to help it. Waking a thread
// takes some ten microseconds, so helpers are called once and then stay, spinning between
// two loops, until the team is gone. The caller takes tasks too and waits only for tasks
// that were begun: a pool whose threads are all busy delays nothing and locks nothing up.
class Team {
 public:
  // `loops`: how many loops there will be at most; any more run on the caller alone.
  Team(::xla::ffi::ThreadPool& pool, int64_t helpers, int64_t loops)
      : helpers_(helpers) {
    if (helpers < 1) return;
    state_ = std::make_shared<State>(loops);
    try {
      for (int64_t i = 0; i < helpers; ++i)
        pool.Schedule([state = state_, caller = std::this_thread::get_id()] {
          // A pool whose queue is full runs what it is given at once.
          if (std::this_thread::get_id() != caller) Help(*state);
        });
    } catch (const std::bad_alloc&) {  // It goes without the others, too.
    }
  }
  ~Team() {
    if (state_ != nullptr) state_->over.store(true, std::memory_order_release);
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t threads() const { return helpers_ < 1 ? 1 : helpers_ + 1; }

  // Calls task(i) for every i in [0, count); throws what one of them threw.
  template <class Task>
  void For(int64_t count, const Task& task) {
    if (count < 2 || state_ == nullptr || begun_ == state_->loops.size()) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    Loop& loop = state_->loops[begun_];
    loop.count = count;
    loop.task = &task;
    loop.call = [](const void* task, int64_t i) { (*static_cast<const Task*>(task))(i); };
    state_->begun.store(++begun_, std::memory_order_release);
    Take(loop);
    int spins = 0;
    while (loop.done.load(std::memory_order_acquire) < count) Pause(spins);
    if (loop.error != nullptr) std::rethrow_exception(loop.error);
  }

 private:
  struct Loop {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // the first task's that failed
    int64_t count = 0;
    void (*call)(const void*, int64_t) = nullptr;
    const void* task = nullptr;
  };
  // Outlives the team where a helper starts late: it finds no task left, and goes.
  struct State {
    std::vector<Loop> loops;
    std::atomic<size_t> begun{0};
    std::atomic<bool> over{false};
    explicit State(int64_t count) : loops(count) {}
  };

  static void Take(Loop& loop) {
    int64_t finished = 0;
    for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;
         ++finished) {
      try {
        loop.call(loop.task, i);
      } catch (...) {
        if (!loop.failed.exchange(true)) loop.error = std::current_exception();
      }
    }
    if (finished > 0) loop.done.fetch_add(finished, std::memory_order_release);
  }

  static void Help(State& state) {
    size_t seen = 0;
    int spins = 0;
    while (!state.over.load(std::memory_order_acquire)) {
      const size_t begun = state.begun.load(std::memory_order_acquire);
      if (begun > seen) {  // Every loop before the last one is over.
        Take(state.loops[begun - 1]);
        seen = begun;
        spins = 0;
      }
      Pause(spins);
    }
  }

  static void Pause(int& spins) {
    if (spins == 2000) {
      std::this_thread::yield();
      return;
    }
    ++spins;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int64_t helpers_;
  size_t begun_ = 0;
  std::shared_ptr<State> state_;
};

}  // namespace xnor

#endif  // XNOR_JAX_TEAM_H_
