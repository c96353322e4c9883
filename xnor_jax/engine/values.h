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
// The strides of a C-order array, in elements.
Sizes Strides(const Sizes& sizes);

// Bools are floats, 0 or 1.

// Unpacks words of signs to floats.
std::unique_ptr<Operation> MakeUnpack(int64_t pixels, int64_t channels);
// Repacks the words of all channels so that each group begins at a new word.
std::unique_ptr<Operation> MakeRegroup(int64_t pixels, int64_t channels, int64_t groups);
// Thresholds integer sums to words of signs.
std::unique_ptr<Operation> MakeThreshold(int64_t pixels, int64_t channels,
                                         const Target<int32_t>& target);

// Reduces windows; positions outside the image are left out.
std::unique_ptr<Operation> MakePool(const Geometry& g, int64_t channels,
                                    Reduction function);
std::unique_ptr<Operation> MakeReduce(const Sizes& shape, const std::vector<bool>& over,
                                      Reduction function);

// An operand of a function: `constant`, or an input if that is null.
struct Operand {
  Sizes shape;
  int input = 0;
  const float* constant = nullptr;
};
// The number of operands of an elementwise function; 0 if there is none of this name.
int Arity(const std::string& function);
// `shape`: the shape that the operands broadcast to.
std::unique_ptr<Operation> MakeElementwise(const std::string& function,
                                           const Sizes& shape,
                                           const std::vector<Operand>& operands,
                                           int64_t exponent);

// A copy of a part of an input to a part of the result, in elements of four bytes.
struct Move {
  int input;
  int64_t input_size;  // of an image
  Sizes sizes, from, to;  // per axis: size; strides of input and result
  int64_t from_offset, to_offset;
};
// Applies moves to a result of `size` elements; the rest, if any, becomes `*fill`.
std::unique_ptr<Operation> MakeMoves(int64_t size, std::vector<Move> moves,
                                     const float* fill = nullptr);
std::unique_ptr<Operation> MakeTake(int64_t in_size, std::vector<int32_t> indices);
std::unique_ptr<Operation> MakeConstant(std::vector<float> value);
// `[batch, rows, inner]` times `[batch, inner, columns]`, for each image.
std::unique_ptr<Operation> MakeMatMul(int64_t batch, int64_t rows, int64_t inner,
                                      int64_t columns);

}  // namespace xnor

#endif  // XNOR_VALUES_H_
