// The engine's own helper threads, which sleep between runs.
#ifndef XNOR_CREW_H_
#define XNOR_CREW_H_

#include <cstdint>
#include <memory>

#include "team.h"

namespace xnor {

// Flushes subnormal floats to 0 within its scope, as in XLA's programs, and rounds to
// nearest even, whatever the caller has set.
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
  Crew();
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  // Wakes `helpers` threads, which stay awake until `Rest`; starts missing ones first.
  // There are fewer if the system cannot start more. A forked process has its own.
  Loops* Wake(int64_t helpers);
  void Rest();

 private:
  struct Helpers;

  std::unique_ptr<Helpers> helpers_;
};

}  // namespace xnor

#endif  // XNOR_CREW_H_
