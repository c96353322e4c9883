// An operation as Python describes it, and the operations that only training uses.
#ifndef XNOR_OPERATION_NUMBERS_H_
#define XNOR_OPERATION_NUMBERS_H_

#include <cstdint>
#include <memory>

#include "geometry.h"
#include "operation.h"

namespace xnor {

// xnor_jax/ops/cpu writes these numbers in this order. For col2im, `channels` and
// `out_channels` are the image's height and width; for flags, `channels` counts them.
struct OperationNumbers {
  int64_t kind, epilogue, relu, channels, out_channels;
  int64_t window[2], strides[2], padding[4], dilation[2];
};
constexpr int64_t kOperationNumbers = 15;
static_assert(sizeof(OperationNumbers) == kOperationNumbers * sizeof(int64_t));

// The geometry of images of two axes.
inline Geometry GeometryOf(int64_t height, int64_t width, const int64_t (&window)[2],
                           const int64_t (&strides)[2], const int64_t (&padding)[4],
                           const int64_t (&dilation)[2]) {
  return {Axis(),
          Axis(height, window[0], strides[0], padding[0], padding[1], dilation[0]),
          Axis(width, window[1], strides[1], padding[2], padding[3], dilation[1])};
}

std::unique_ptr<Operation> MakePackFlags(const Shape& in,
                                         const OperationNumbers& numbers);
std::unique_ptr<Operation> MakeCol2Im(const Shape& in, const OperationNumbers& numbers);

}  // namespace xnor

#endif  // XNOR_OPERATION_NUMBERS_H_
