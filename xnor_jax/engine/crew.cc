#include "crew.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xnor {

#if defined(__x86_64__)

FlushSubnormals::FlushSubnormals() : before_(_mm_getcsr()) {
  // Flushes results and operands, rounds to nearest even, and masks all exceptions.
  _mm_setcsr(0x1f80 | 0x8040);
}
FlushSubnormals::~FlushSubnormals() { _mm_setcsr(static_cast<unsigned>(before_)); }

#elif defined(__aarch64__)

FlushSubnormals::FlushSubnormals() {
  asm volatile("mrs %0, fpcr" : "=r"(before_));
  asm volatile("msr fpcr, %0" : : "r"(uint64_t{1} << 24));
}
FlushSubnormals::~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

#else

FlushSubnormals::FlushSubnormals() = default;
FlushSubnormals::~FlushSubnormals() = default;

#endif

struct Crew::Helpers {
  const pid_t process = getpid();
  Loops loops;
  std::atomic<int64_t> wanted{0};
  std::mutex mutex;
  std::condition_variable changed;
  bool over = false;
  std::vector<std::thread> threads;

  ~Helpers() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      over = true;
    }
    changed.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  void Help(int64_t index) {
    const FlushSubnormals flush;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return over || wanted.load() > index; });
        if (over) return;
      }
      int spins = 0;
      while (wanted.load(std::memory_order_acquire) > index) {
        if (loops.Help()) spins = 0;
        Pause(spins);
      }
    }
  }
};

Crew::Crew() : helpers_(std::make_unique<Helpers>()) {}

Crew::~Crew() {
  // In a forked process there are no threads to join: the memory is left to it.
  if (helpers_->process != getpid()) helpers_.release();
}

Loops* Crew::Wake(int64_t count) {
  if (helpers_->process != getpid()) {
    helpers_.release();
    helpers_ = std::make_unique<Helpers>();
  }
  Helpers& own = *helpers_;
  try {
    while (static_cast<int64_t>(own.threads.size()) < count)
      own.threads.emplace_back(&Helpers::Help, &own, own.threads.size());
  } catch (const std::system_error&) {  // The loops run with fewer helpers, too.
  }
  {
    std::lock_guard<std::mutex> lock(own.mutex);
    own.wanted.store(count, std::memory_order_release);
  }
  own.changed.notify_all();
  return &own.loops;
}

void Crew::Rest() { helpers_->wanted.store(0, std::memory_order_release); }

}  // namespace xnor
