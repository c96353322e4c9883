// The engine's own helper threads, which sleep between runs.
#ifndef XNOR_CREW_H_
#define XNOR_CREW_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "team.h"

namespace xnor {

// Flushes subnormal floats to 0 within its scope, as in XLA's programs.
class FlushSubnormals {
 public:
  FlushSubnormals();
  ~FlushSubnormals();
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  uint64_t before_ = 0;
};

class Crew {
 public:
  Crew() = default;
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  // Wakes `helpers` threads, which stay awake until `Rest`; starts missing ones first.
  // There are fewer if the system cannot start more.
  Loops* Wake(int64_t helpers);
  void Rest();

 private:
  void Help(int64_t index);

  Loops loops_;
  std::atomic<int64_t> wanted_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace xnor

#endif  // XNOR_CREW_H_
