// The choice of an instruction set, for Python.
#include "select.h"
#include "xnor.h"

extern "C" XNOR_API const char* xnor_jax_instruction_set(int i) {
  return xnor::InstructionSet(i);
}

extern "C" XNOR_API const char* xnor_jax_chosen() { return xnor::Chosen().name; }

extern "C" XNOR_API int xnor_jax_choose(const char* name) { return xnor::Choose(name); }
