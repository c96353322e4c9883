#include "select.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace xnor {
namespace {

constexpr int kMost = 3;

struct Sets {
  const Kernels* sets[kMost + 1] = {};
  Sets() {
    int n = 0;
#if defined(XNOR_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq"))
      sets[n++] = &kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      sets[n++] = &kAvx2;
#elif defined(XNOR_ARM64)
    sets[n++] = &kNeon;
#endif
    sets[n++] = &kPortable;
  }
};

const Sets& All() {
  static const Sets all;
  return all;
}

std::atomic<const Kernels*> chosen{nullptr};

// The best, or the one that XNOR_INSTRUCTION_SET names, if this processor has it.
const Kernels& First() {
  static const Kernels* const first = [] {
    const char* name = std::getenv("XNOR_INSTRUCTION_SET");
    for (const Kernels* const* set = All().sets; name != nullptr && *set != nullptr; ++set)
      if (std::strcmp((*set)->name, name) == 0) return *set;
    return All().sets[0];
  }();
  return *first;
}

}  // namespace

const Kernels& Chosen() {
  const Kernels* kernels = chosen.load(std::memory_order_relaxed);
  return kernels != nullptr ? *kernels : First();
}

const char* InstructionSet(int i) {
  if (i < 0 || i > kMost || All().sets[i] == nullptr) return nullptr;
  return All().sets[i]->name;
}

bool Choose(const char* name) {
  for (const Kernels* const* set = All().sets; *set != nullptr; ++set)
    if (std::strcmp((*set)->name, name) == 0) {
      chosen.store(*set);
      return true;
    }
  return false;
}

}  // namespace xnor
