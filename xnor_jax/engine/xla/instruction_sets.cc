// The choice of an instruction set, for Python.
#include "select.h"

#define XNOR_EXPORT extern "C" __attribute__((visibility("default")))

XNOR_EXPORT const char* xnor_jax_instruction_set(int i) {
  return xnor::InstructionSet(i);
}

XNOR_EXPORT const char* xnor_jax_chosen() { return xnor::Chosen().name; }

XNOR_EXPORT int xnor_jax_choose(const char* name) { return xnor::Choose(name); }
