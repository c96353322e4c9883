// The choice of an instruction set.
#ifndef XNOR_SELECT_H_
#define XNOR_SELECT_H_

#include "kernels.h"

namespace xnor {

const Kernels& Chosen();
// The i-th instruction set of this processor by name, the best first; null after the last.
const char* InstructionSet(int i);
// Selects `name` from now on; returns false if this processor does not have it.
bool Choose(const char* name);

}  // namespace xnor

#endif  // XNOR_SELECT_H_
