// Iteration over values of any number of axes.
#ifndef XNOR_WALK_H_
#define XNOR_WALK_H_

#include <cstdint>
#include <vector>

#include "values.h"

namespace xnor {

inline Shape Flat(Type type, int64_t size) { return {type, 1, 1, size}; }

// The axes and strides of several operands, merged where all operands allow it.
struct Walk {
  Sizes sizes;
  std::vector<Sizes> strides;  // [axis][operand]

  void Add(int64_t size, const Sizes& strides_of_axis) {
    if (size == 1 && !sizes.empty()) return;
    if (!sizes.empty()) {
      bool merges = true;
      for (size_t i = 0; i < strides_of_axis.size(); ++i)
        merges &= strides.back()[i] == strides_of_axis[i] * size;
      if (merges || sizes.back() == 1) {
        sizes.back() *= size;
        strides.back() = strides_of_axis;
        return;
      }
    }
    sizes.push_back(size);
    strides.push_back(strides_of_axis);
  }
  int64_t axes() const { return static_cast<int64_t>(sizes.size()); }
  // The offset of operand i at flat index `index` of the first `count` axes.
  int64_t Offset(int64_t index, int64_t count, size_t i) const {
    int64_t offset = 0;
    for (int64_t axis = count - 1; axis >= 0; --axis) {
      offset += index % sizes[axis] * strides[axis][i];
      index /= sizes[axis];
    }
    return offset;
  }
};

// NaN propagates, as in XLA.
inline float Largest(float a, float b) { return a > b || a != a ? a : b; }
inline float Smallest(float a, float b) { return a < b || a != a ? a : b; }

}  // namespace xnor

#endif  // XNOR_WALK_H_
