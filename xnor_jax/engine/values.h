// Operations on values of any number of axes: moves, pools and functions of floats.
#ifndef XNOR_VALUES_H_
#define XNOR_VALUES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "operation.h"

namespace xnor {

using Sizes = std::vector<int64_t>;

int64_t Product(const Sizes& sizes);
// How far apart neighbours along each axis are, in C order.
Sizes Strides(const Sizes& sizes);

// A bool is a float, 0 or 1.

// Words of signs to floats.
std::unique_ptr<Operation> MakeUnpack(int64_t pixels, int64_t channels);
// Words of all channels to such that each group begins at a word of its own.
std::unique_ptr<Operation> MakeRegroup(int64_t pixels, int64_t channels, int64_t groups);
// Sums, int32_t or float, to words.
std::unique_ptr<Operation> MakeThreshold(int64_t pixels, int64_t channels,
                                         const Target<int32_t>& target);
std::unique_ptr<Operation> MakeThreshold(int64_t pixels, int64_t channels,
                                         const Target<float>& target);

enum class Reduction { kSum, kMax, kMin };

// The windows of a pool; what is outside of the image is left out.
std::unique_ptr<Operation> MakePool(const Geometry& g, int64_t channels,
                                    Reduction function);
std::unique_ptr<Operation> MakeReduce(const Sizes& shape, const std::vector<bool>& over,
                                      Reduction function);

// An operand of a function: an input, or where `constant` is not null that.
struct Operand {
  Sizes shape;
  int input = 0;
  const float* constant = nullptr;
};
// How many operands an elementwise function has; 0 if there is none of this name.
int Arity(const std::string& function);
// `shape`: what the operands broadcast to.
std::unique_ptr<Operation> MakeElementwise(const std::string& function,
                                           const Sizes& shape,
                                           const std::vector<Operand>& operands,
                                           int64_t exponent);

// A part of an input that goes to a part of the result, in elements of four bytes.
struct Move {
  int input;
  int64_t input_size;  // of an image
  Sizes sizes, from, to;  // per axis: how many, how far apart
  int64_t from_offset, to_offset;
};
// The moves' parts of a result of so many elements; `fill` where they leave some out.
std::unique_ptr<Operation> MakeMoves(int64_t size, std::vector<Move> moves,
                                     const float* fill = nullptr);
std::unique_ptr<Operation> MakeTake(int64_t in_size, std::vector<int32_t> places);
std::unique_ptr<Operation> MakeConstant(std::vector<float> value);
// `[batch, rows, inner]` times `[batch, inner, columns]` of each image.
std::unique_ptr<Operation> MakeMatMul(int64_t batch, int64_t rows, int64_t inner,
                                      int64_t columns);

}  // namespace xnor

#endif  // XNOR_VALUES_H_
