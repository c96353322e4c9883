// Fuzz test of the reader: damaged files, most with a matching checksum, are read or
// rejected with a message, in bounded memory and time. `check_reader [COUNT [SEED]]`
#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>

#include "damage.h"
#include "xnor.h"

namespace {
std::atomic<long> live{0}, peak{0};
}

void* operator new(size_t size) {
  void* p = std::malloc(size);
  if (p == nullptr) throw std::bad_alloc();
  const long now = live += static_cast<long>(malloc_usable_size(p));
  if (now > peak) peak = now;
  return p;
}
void operator delete(void* p) noexcept {
  live -= static_cast<long>(malloc_usable_size(p));
  std::free(p);
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }

namespace {

// Whether the file was read.
bool Read(const std::string& file) {
  const long before = live;
  peak = before;
  xnor_model* m = nullptr;
  const xnor_status status = xnor_load_memory(file.data(), file.size(), &m);
  if (status == XNOR_OK)
    xnor_free(m);
  else if (status != XNOR_INVALID_FILE || m != nullptr || *xnor_error() == 0)
    std::abort();
  // At most three times the file's size plus a constant; the bytes themselves are one.
  if (peak - before > static_cast<long>(2 * file.size()) + (64L << 20)) std::abort();
  return status == XNOR_OK;
}

}  // namespace

int main(int count, char** arguments) {
  const int mutants = count > 1 ? std::atoi(arguments[1]) : 5000;
  checks::Numbers numbers(count > 2 ? std::atoi(arguments[2]) : 0);
  const checks::Network network(3);
  double slowest = 0;
  int read = 0;
  for (int i = 0; i < mutants; ++i) {
    const std::string damaged = checks::Damaged(network, numbers);
    const auto begin = std::chrono::steady_clock::now();
    read += Read(damaged);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    slowest = std::max(slowest, time.count());
  }
  std::printf("%d mutants, %d of them read, the slowest in %.3f s\n", mutants, read,
              slowest);
  return slowest < 10 && read > 0 && read < mutants ? 0 : 1;
}
