#include "crew.h"

#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xnor {

#if defined(__x86_64__)

FlushSubnormals::FlushSubnormals() : before_(_mm_getcsr()) {
  _mm_setcsr(static_cast<unsigned>(before_) | 0x8040);  // of results and of operands
}
FlushSubnormals::~FlushSubnormals() { _mm_setcsr(static_cast<unsigned>(before_)); }

#elif defined(__aarch64__)

FlushSubnormals::FlushSubnormals() {
  asm volatile("mrs %0, fpcr" : "=r"(before_));
  asm volatile("msr fpcr, %0" : : "r"(before_ | 1u << 24));
}
FlushSubnormals::~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

#else

FlushSubnormals::FlushSubnormals() = default;
FlushSubnormals::~FlushSubnormals() = default;

#endif

Crew::~Crew() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    over_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Loops* Crew::Wake(int64_t helpers) {
  try {
    while (static_cast<int64_t>(threads_.size()) < helpers)
      threads_.emplace_back(&Crew::Help, this, static_cast<int64_t>(threads_.size()));
  } catch (const std::system_error&) {  // The loops run with fewer helpers, too.
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    wanted_.store(helpers, std::memory_order_release);
  }
  changed_.notify_all();
  return &loops_;
}

void Crew::Rest() { wanted_.store(0, std::memory_order_release); }

void Crew::Help(int64_t index) {
  const FlushSubnormals flush;
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return over_ || wanted_.load() > index; });
      if (over_) return;
    }
    int spins = 0;
    while (wanted_.load(std::memory_order_acquire) > index) {
      if (loops_.Help()) spins = 0;
      Pause(spins);
    }
  }
}

}  // namespace xnor
