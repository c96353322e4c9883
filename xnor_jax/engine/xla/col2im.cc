// Sums patches into images: the transpose of extracting a convolution's windows.
#include <algorithm>
#include <cstdint>
#include <memory>

#include "operation_numbers.h"

namespace xnor {
namespace {

class Col2Im : public Operation {
 public:
  Col2Im(const Geometry& g, int64_t channels)
      : Operation({Type::kFloats, g.y.size, g.x.size, channels}), g_(g),
        patch_(g.y.window * g.x.window * channels) {
    constexpr double kAdded = 16;  // the cost of an addition, in multiplications
    work = kAdded * static_cast<double>(g.pixels()) * static_cast<double>(patch_);
  }
  void Run(const Call& call) const override {
    const int64_t patches = g_.pixels() * patch_;
    call.team.For(call.images, [&](int64_t n) {
      AddUp(call.floats() + n * patches, static_cast<float*>(call.out) + n * out.size());
    });
  }

 private:
  void AddUp(const float* patch, float* image) const {
    const Geometry& g = g_;
    std::fill(image, image + out.size(), 0.0f);
    const int64_t channels = out.depth, row = g.x.window * channels;
    for (int64_t y = 0; y < g.y.out; ++y)
      for (int64_t x = 0; x < g.x.out; ++x)
        for (int64_t i = 0; i < g.y.window; ++i, patch += row) {
          const int64_t at = y * g.y.stride + i * g.y.dilation - g.y.before;
          if (at < 0 || at >= g.y.size) continue;
          AddRow(patch, image + at * g.x.size * channels, x * g.x.stride - g.x.before);
        }
  }

  // Adds one row of a patch, its first pixel at column `left` of the image's row.
  void AddRow(const float* patch, float* row, int64_t left) const {
    const int64_t channels = out.depth;
    if (g_.x.dilation == 1) {
      const int64_t first = std::max<int64_t>(left, 0);
      const int64_t last = std::min(left + g_.x.window, g_.x.size);
      if (first >= last) return;
      Add(patch + (first - left) * channels, row + first * channels,
          (last - first) * channels);
      return;
    }
    for (int64_t j = 0; j < g_.x.window; ++j) {
      const int64_t at = left + j * g_.x.dilation;
      if (at >= 0 && at < g_.x.size) Add(patch + j * channels, row + at * channels, channels);
    }
  }

  static void Add(const float* from, float* to, int64_t count) {
    for (int64_t n = 0; n < count; ++n) to[n] += from[n];
  }

  const Geometry g_;
  const int64_t patch_;
};

}  // namespace

std::unique_ptr<Operation> MakeCol2Im(const Shape& in, const OperationNumbers& numbers) {
  Require(in.type == Type::kFloats, "expected floats");
  // The fields of the channels hold the image's size.
  const Geometry g =
      GeometryOf(numbers.channels, numbers.out_channels, numbers.window,
                 numbers.strides, numbers.padding, numbers.dilation);
  const int64_t taps = Times(g.y.window, g.x.window);
  Require(g.y.size >= 1 && g.x.size >= 1 && in.height == g.y.out &&
              in.width == g.x.out && in.depth % taps == 0,
          "expected a patch for each position of the window on the image");
  return std::make_unique<Col2Im>(g, in.depth / taps);
}

}  // namespace xnor
