// A window's way over padded images of two axes.
#ifndef XNOR_JAX_GEOMETRY_H_
#define XNOR_JAX_GEOMETRY_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "check.h"

namespace xnor {

struct Geometry {
  int64_t height, width;  // in, without padding
  int64_t window_height, window_width;
  int64_t stride_height, stride_width;
  int64_t top, bottom, left, right;
  int64_t dilation_height, dilation_width;
  int64_t padded_height, padded_width;
  int64_t out_height, out_width;

  bool padded() const { return top || bottom || left || right; }
  int64_t pixels() const { return Times(out_height, out_width); }  // of an image

  Geometry(int64_t h, int64_t w, const int64_t (&window)[2], const int64_t (&strides)[2],
           const int64_t (&padding)[4], const int64_t (&dilation)[2]) {
    for (int64_t size : {h, w, window[0], window[1]})
      Require(size >= 0 && size <= kLargest, "a size is out of range");
    for (int64_t s : strides) Require(s >= 1 && s <= kLargest, "a stride is out of range");
    for (int64_t d : dilation)
      Require(d >= 1 && d <= kLargest, "a dilation is out of range");
    for (int64_t p : padding)
      Require(p >= 0 && p <= kLargest, "a padding is out of range");
    Require(window[0] >= 1 && window[1] >= 1, "the window is empty");
    height = h, width = w;
    window_height = window[0], window_width = window[1];
    stride_height = strides[0], stride_width = strides[1];
    top = padding[0], bottom = padding[1], left = padding[2], right = padding[3];
    dilation_height = dilation[0], dilation_width = dilation[1];
    padded_height = h + top + bottom, padded_width = w + left + right;
    const int64_t reach_height = Times(window_height - 1, dilation_height) + 1;
    const int64_t reach_width = Times(window_width - 1, dilation_width) + 1;
    Require(reach_height <= padded_height && reach_width <= padded_width,
            "the window is larger than the padded image");
    out_height = (padded_height - reach_height) / stride_height + 1;
    out_width = (padded_width - reach_width) / stride_width + 1;
  }
};

// The window as runs of neighbouring elements of an image whose pixels are `pixel`
// elements apart, `depth` of them this group's.
inline std::vector<int64_t> Segments(const Geometry& g, int64_t pixel, int64_t depth,
                                     int64_t& length) {
  const int64_t row = Times(g.padded_width, pixel);
  std::vector<int64_t> offsets;
  const bool whole_rows = g.dilation_width == 1 && pixel == depth;
  length = whole_rows ? Times(g.window_width, depth) : depth;
  for (int64_t i = 0; i < g.window_height; ++i)
    for (int64_t j = 0; j < (whole_rows ? 1 : g.window_width); ++j)
      offsets.push_back(i * g.dilation_height * row + j * g.dilation_width * pixel);
  return offsets;
}

// For each output position along an axis, the class of the taps that lie inside.
struct Classes {
  std::vector<int32_t> of;
  std::vector<std::pair<int64_t, int64_t>> inside;  // taps [first, last)

  Classes() = default;
  Classes(int64_t size, int64_t out, int64_t window, int64_t stride, int64_t before,
          int64_t dilation) {
    for (int64_t position = 0; position < out; ++position) {
      const int64_t start = position * stride - before;
      int64_t first = 0, last = window;
      while (first < window && start + first * dilation < 0) ++first;
      while (last > first && start + (last - 1) * dilation >= size) --last;
      const std::pair<int64_t, int64_t> range(first, last);
      size_t index = inside.size();
      while (index > 0 && inside[index - 1] != range) --index;
      if (index == 0) {
        inside.push_back(range);
        index = inside.size();
      }
      of.push_back(static_cast<int32_t>(index - 1));
    }
  }
};

}  // namespace xnor

#endif  // XNOR_JAX_GEOMETRY_H_
