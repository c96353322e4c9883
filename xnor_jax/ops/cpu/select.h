// Which instruction set runs.
#ifndef XNOR_JAX_SELECT_H_
#define XNOR_JAX_SELECT_H_

#include "engine.h"

namespace xnor {
const Engine& ChosenEngine();
}  // namespace xnor

extern "C" {
// The name of the i-th instruction set that this processor has, the best first; null
// behind the last.
const char* xnor_jax_instruction_set(int i);
// The name of the one that runs.
const char* xnor_jax_chosen();
// Makes `name` run from now on; 0 if this processor does not have it.
int xnor_jax_choose(const char* name);
}

#endif  // XNOR_JAX_SELECT_H_
