// Parallel loops over tasks, shared by the caller and its helper threads.
#ifndef XNOR_TEAM_H_
#define XNOR_TEAM_H_

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

#include "check.h"

namespace xnor {

// Spins once; after many spins it yields the processor instead.
inline void Pause(int& spins) {
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

// Runs one loop at a time and allocates nothing. Any number of threads may call `Help` at
// any time, also between two loops or after the caller has moved on.
//
// The caller takes tasks from the front and the helpers from the back, so that in one loop
// after another a thread finds what it wrote itself in its core's cache.
class Loops {
 public:
  // Calls call(task, i) for every i in [0, count), together with the helpers; rethrows the
  // exception of the first task that failed.
  void Run(int64_t count, void (*call)(const void*, int64_t), const void* task) {
    Require(count < kClosed, "there are too many tasks");
    const uint64_t loop = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    // Closed first: a helper that still reads the previous loop finds no task left.
    ticket_.store(loop << 32 | kClosed, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    back_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    error_ = nullptr;
    call_.store(call, std::memory_order_release);
    task_.store(task, std::memory_order_release);
    count_.store(count, std::memory_order_release);
    ticket_.store(loop << 32, std::memory_order_release);
    Work([front = int64_t{0}](int64_t) mutable { return front++; });
    int spins = 0;
    while (done_.load(std::memory_order_acquire) < count) Pause(spins);
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

  // Runs tasks until none are left; returns whether it ran any.
  bool Help() {
    return Work([&](int64_t count) { return count - ++back_; });
  }

 private:
  // Runs tasks until none are left, each of the index that `next(count)` returns.
  template <class Next>
  bool Work(Next next) {
    int64_t finished = 0;
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const int64_t count = count_.load(std::memory_order_acquire);
      const auto call = call_.load(std::memory_order_acquire);
      const void* task = task_.load(std::memory_order_acquire);
      if (static_cast<int64_t>(ticket & kClosed) >= count) break;
      // Succeeds only if the loop is still the one read above.
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel))
        continue;
      ++ticket;
      try {
        call(task, next(count));
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
      // Counted one by one: after the last, the caller may begin another loop.
      done_.fetch_add(1, std::memory_order_release);
      ++finished;
    }
    return finished > 0;
  }

  static constexpr int64_t kClosed = 0xffffffff;
  std::atomic<uint64_t> ticket_{kClosed};  // loop number << 32 | tasks taken
  std::atomic<int64_t> count_{0}, done_{0}, back_{0};  // back_: taken by helpers
  std::atomic<bool> failed_{false};
  std::atomic<void (*)(const void*, int64_t)> call_{nullptr};
  std::atomic<const void*> task_{nullptr};
  std::exception_ptr error_;
};

// The caller's thread and its helpers.
class Team {
 public:
  Team() = default;  // the caller alone
  Team(Loops* loops, int64_t helpers) : loops_(loops), helpers_(helpers) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t threads() const { return helpers_ + 1; }

  // Calls task(i) for every i in [0, count); rethrows the exception of one that failed.
  template <class Task>
  void For(int64_t count, const Task& task) {
    if (count < 2 || helpers_ < 1) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    loops_->Run(
        count,
        [](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); }, &task);
  }

 private:
  Loops* loops_ = nullptr;
  int64_t helpers_ = 0;
};

}  // namespace xnor

#endif  // XNOR_TEAM_H_
