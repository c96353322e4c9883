// Patches added up to images: what a convolution's windows read, the other way round.
#include <algorithm>
#include <cstdint>
#include <memory>

#include "geometry.h"
#include "operation.h"

namespace xnor {
namespace {

class Fold : public Operation {
 public:
  Fold(const Geometry& g, int64_t channels)
      : Operation({Type::kFloats, g.height, g.width, channels}), g_(g),
        patch_(g.window_height * g.window_width * channels) {
    constexpr double kAdded = 16;  // multiplications in the time of a sum
    work = kAdded * static_cast<double>(g.pixels()) * static_cast<double>(patch_);
  }
  void Run(Team& team, int64_t images, const void* in, void* to) const override {
    const int64_t patches = g_.pixels() * patch_;
    team.For(images, [&](int64_t n) {
      AddUp(static_cast<const float*>(in) + n * patches,
            static_cast<float*>(to) + n * out.size());
    });
  }

 private:
  void AddUp(const float* patch, float* image) const {
    const Geometry& g = g_;
    std::fill(image, image + out.size(), 0.0f);
    const int64_t channels = out.depth, row = g.window_width * channels;
    for (int64_t y = 0; y < g.out_height; ++y)
      for (int64_t x = 0; x < g.out_width; ++x)
        for (int64_t i = 0; i < g.window_height; ++i, patch += row) {
          const int64_t at = y * g.stride_height + i * g.dilation_height - g.top;
          if (at < 0 || at >= g.height) continue;
          AddRow(patch, image + at * g.width * channels, x * g.stride_width - g.left);
        }
  }

  // One row of a patch, its first pixel at column `left` of the image's row.
  void AddRow(const float* patch, float* row, int64_t left) const {
    const int64_t channels = out.depth;
    if (g_.dilation_width == 1) {
      const int64_t first = std::max<int64_t>(left, 0);
      const int64_t last = std::min(left + g_.window_width, g_.width);
      if (first >= last) return;
      Add(patch + (first - left) * channels, row + first * channels,
          (last - first) * channels);
      return;
    }
    for (int64_t j = 0; j < g_.window_width; ++j) {
      const int64_t at = left + j * g_.dilation_width;
      if (at >= 0 && at < g_.width) Add(patch + j * channels, row + at * channels, channels);
    }
  }

  static void Add(const float* from, float* to, int64_t count) {
    for (int64_t n = 0; n < count; ++n) to[n] += from[n];
  }

  const Geometry g_;
  const int64_t patch_;
};

}  // namespace

std::unique_ptr<Operation> MakeFold(const Shape& in, const Step& step) {
  Require(in.type == Type::kFloats, "expected floats");
  // The image's size stands where other operations have their channels.
  const Geometry g(step.channels, step.out_channels, step.window, step.strides,
                   step.padding, step.dilation);
  const int64_t taps = Times(g.window_height, g.window_width);
  Require(g.height >= 1 && g.width >= 1 && in.height == g.out_height &&
              in.width == g.out_width && in.depth % taps == 0,
          "expected a patch for each of the window's places on the image");
  return std::make_unique<Fold>(g, in.depth / taps);
}

}  // namespace xnor
