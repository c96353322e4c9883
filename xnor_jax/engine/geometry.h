// Windows that slide over padded images of up to three axes.
#ifndef XNOR_GEOMETRY_H_
#define XNOR_GEOMETRY_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "check.h"

namespace xnor {

// A sliding window along one axis; the default is an axis of size 1.
struct Axis {
  int64_t size = 1, window = 1, stride = 1, before = 0, after = 0, dilation = 1;
  int64_t padded = 1, out = 1;

  Axis() = default;
  Axis(int64_t size, int64_t window, int64_t stride, int64_t before, int64_t after,
       int64_t dilation)
      : size(size), window(window), stride(stride), before(before), after(after),
        dilation(dilation) {
    Require(size >= 0 && size <= kLargest, "a size is out of range");
    Require(window >= 1 && window <= kLargest, "a window is out of range");
    Require(stride >= 1 && stride <= kLargest, "a stride is out of range");
    Require(dilation >= 1 && dilation <= kLargest, "a dilation is out of range");
    for (int64_t p : {before, after})
      Require(p >= 0 && p <= kLargest, "a padding is out of range");
    padded = size + before + after;
    const int64_t reach = Times(window - 1, dilation) + 1;
    Require(reach <= padded, "the window is larger than the padded image");
    out = (padded - reach) / stride + 1;
  }

  // The taps [first, last) that lie inside the image at an output position.
  std::pair<int64_t, int64_t> Inside(int64_t position) const {
    const int64_t start = position * stride - before;
    const auto taps_before = [&](int64_t place) {  // taps before it
      const int64_t distance = place - start;
      if (distance <= 0) return int64_t{0};
      // Without dilation there is no division, which is slow.
      return std::min(window, dilation == 1 ? distance : (distance - 1) / dilation + 1);
    };
    const int64_t first = taps_before(0);
    return {first, std::max(first, taps_before(size))};
  }
};

struct Geometry {
  Axis z, y, x;

  bool padded() const {
    return z.padded != z.size || y.padded != y.size || x.padded != x.size;
  }
  int64_t pixels() const { return Times(Times(z.out, y.out), x.out); }  // of the output
  int64_t padded_pixels() const { return Times(Times(z.padded, y.padded), x.padded); }
  int64_t taps() const { return Times(Times(z.window, y.window), x.window); }
};

// The offsets of a window's segments, each `length` contiguous elements. The image's pixels
// are `pixel` elements apart; a group reads `depth` of them.
inline std::vector<int64_t> Segments(const Geometry& g, int64_t pixel, int64_t depth,
                                     int64_t& length) {
  const int64_t row = Times(g.x.padded, pixel), plane = Times(g.y.padded, row);
  std::vector<int64_t> offsets;
  const bool whole_rows = g.x.dilation == 1 && pixel == depth;
  length = whole_rows ? Times(g.x.window, depth) : depth;
  for (int64_t k = 0; k < g.z.window; ++k)
    for (int64_t i = 0; i < g.y.window; ++i)
      for (int64_t j = 0; j < (whole_rows ? 1 : g.x.window); ++j)
        offsets.push_back(k * g.z.dilation * plane + i * g.y.dilation * row +
                          j * g.x.dilation * pixel);
  return offsets;
}

// The class of each output position along an axis: the taps that lie inside the image.
struct Classes {
  std::vector<int32_t> of;
  std::vector<std::pair<int64_t, int64_t>> inside;  // taps [first, last)

  Classes() = default;
  explicit Classes(const Axis& axis) {
    of.reserve(axis.out);
    // Both ends are non-increasing in the position, so no class recurs.
    for (int64_t position = 0; position < axis.out; ++position) {
      const auto range = axis.Inside(position);
      if (inside.empty() || inside.back() != range) inside.push_back(range);
      of.push_back(static_cast<int32_t>(inside.size()) - 1);
    }
  }
};

}  // namespace xnor

#endif  // XNOR_GEOMETRY_H_
