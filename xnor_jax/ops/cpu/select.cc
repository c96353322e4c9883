#include "select.h"

#include <atomic>
#include <cstring>

namespace xnor {
namespace {

constexpr int kMost = 3;

struct Engines {
  const Engine* engines[kMost + 1] = {};
  Engines() {
    int n = 0;
#if defined(XNOR_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq"))
      engines[n++] = &kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      engines[n++] = &kAvx2;
#elif defined(XNOR_ARM64)
    engines[n++] = &kNeon;
#endif
    engines[n++] = &kPortable;
  }
};

const Engines& All() {
  static const Engines all;
  return all;
}

std::atomic<const Engine*> chosen{nullptr};

}  // namespace

const Engine& ChosenEngine() {
  const Engine* engine = chosen.load(std::memory_order_relaxed);
  return engine != nullptr ? *engine : *All().engines[0];
}

}  // namespace xnor

extern "C" {

const char* xnor_jax_instruction_set(int i) {
  if (i < 0 || i > xnor::kMost) return nullptr;
  const xnor::Engine* engine = xnor::All().engines[i];
  return engine != nullptr ? engine->name : nullptr;
}

const char* xnor_jax_chosen() { return xnor::ChosenEngine().name; }

int xnor_jax_choose(const char* name) {
  for (const xnor::Engine* const* e = xnor::All().engines; *e != nullptr; ++e)
    if (std::strcmp((*e)->name, name) == 0) {
      xnor::chosen.store(*e);
      return 1;
    }
  return 0;
}

}  // extern "C"
