// Which instruction set runs.
#ifndef XNOR_SELECT_H_
#define XNOR_SELECT_H_

#include "kernels.h"

namespace xnor {

const Kernels& Chosen();
// The name of the i-th instruction set that this processor has, the best first; null
// behind the last.
const char* InstructionSet(int i);
// Makes `name` run from now on; false if this processor does not have it.
bool Choose(const char* name);

}  // namespace xnor

#endif  // XNOR_SELECT_H_
