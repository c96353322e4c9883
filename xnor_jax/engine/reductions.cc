// Sums, maxima and minima of floats, over windows and over whole axes.
#include <algorithm>
#include <limits>

#include "select.h"
#include "values.h"
#include "walk.h"

namespace xnor {
namespace {

float Start(Reduction function) {
  constexpr float kInfinite = std::numeric_limits<float>::infinity();
  return function == Reduction::kSum   ? 0.0f
         : function == Reduction::kMax ? -kInfinite
                                       : kInfinite;
}

// y[i] = combine(y[i], x[i]).
inline void Combine(Reduction function, const float* __restrict x, float* __restrict y,
                    int64_t count) {
  const auto all = [&](auto combine) {
    for (int64_t i = 0; i < count; ++i) y[i] = combine(y[i], x[i]);
  };
  switch (function) {
    case Reduction::kSum: return all([](float a, float b) { return a + b; });
    case Reduction::kMax: return all(Largest);
    case Reduction::kMin: return all(Smallest);
  }
}

class Pool : public Operation {
 public:
  Pool(const Geometry& g, int64_t channels, Reduction function)
      : Operation({Type::kFloats, Times(g.z.out, g.y.out), g.x.out, channels}), g_(g),
        function_(function) {
    reads_ = static_cast<double>(channels);
    for (const Axis* axis : {&g.z, &g.y, &g.x})
      reads_ *= static_cast<double>(std::min(axis->window, axis->size));
    work = kOnce * reads_ * g.pixels();
    pixels = g.pixels();
  }
  void Run(const Call& call) const override {
    InParts(call, call.images * pixels, reads_, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {  // row by row
        const int64_t x = at % g_.x.out, last = std::min(at - x + g_.x.out, end);
        Row(call, at / g_.x.out, x, last - (at - x));
        at = last;
      }
    });
  }

 private:
  // Pixels [first, last) of a row, counted through all images. One number after another,
  // row by row: the rounding depends on the order of additions.
  void Row(const Call& call, int64_t row, int64_t first, int64_t last) const {
    const Geometry& g = g_;
    const int64_t channels = out.depth;
    const int64_t at_y = row % g.y.out, at_z = row / g.y.out % g.z.out;
    const float* image = call.floats() + row / (g.y.out * g.z.out) *
                                             (g.z.size * g.y.size * g.x.size * channels);
    const auto [front, back] = g.z.Inside(at_z);
    const auto [top, bottom] = g.y.Inside(at_y);
    float* y = static_cast<float*>(call.out) + (row * g.x.out + first) * channels;
    const auto reduce = Chosen().reduce;
    for (int64_t at_x = first; at_x < last; ++at_x, y += channels) {
      std::fill(y, y + channels, Start(function_));
      const auto [left, right] = g.x.Inside(at_x);
      const float* rows[kRows];
      int64_t count = 0;
      const auto combine = [&] {
        const int64_t done = reduce ? reduce(function_, rows, count, channels, y) : 0;
        for (int64_t r = 0; r < count && done < channels; ++r)
          Combine(function_, rows[r] + done, y + done, channels - done);
        count = 0;
      };
      for (int64_t k = front; k < back; ++k)
        for (int64_t i = top; i < bottom; ++i) {
          const int64_t z = at_z * g.z.stride - g.z.before + k;
          const int64_t in_y = z * g.y.size + at_y * g.y.stride - g.y.before + i;
          const int64_t in_x = at_x * g.x.stride - g.x.before;
          const int64_t from = in_y * g.x.size + in_x;
          for (int64_t j = from + left; j < from + right; ++j) {
            rows[count++] = image + j * channels;
            if (count == kRows) combine();
          }
        }
      combine();
    }
  }

  static constexpr int64_t kRows = 64;  // pixels of a window, combined in one pass
  const Geometry g_;
  const Reduction function_;
  double reads_;
};

class Reduce : public Operation {
 public:
  Reduce(const Sizes& shape, const std::vector<bool>& over, Reduction function)
      : Operation(Flat(Type::kFloats, Kept(shape, over))), function_(function),
        in_size_(Product(shape)) {
    const Sizes strides = Strides(shape);
    for (size_t axis = 0; axis < shape.size(); ++axis)
      (over[axis] ? reduced_ : kept_).Add(shape[axis], {strides[axis]});
    kept_.Add(1, {1}), reduced_.Add(1, {1});  // At least one axis each.
    work = kOnce * static_cast<double>(in_size_);
  }
  void Run(const Call& call) const override {
    const int64_t row = kept_.sizes.back();
    const bool side_by_side = kept_.strides.back()[0] == 1;
    if (!side_by_side) return Alone(call);
    const int64_t rows = out.depth / row, count = Product(reduced_.sizes);
    const double reads = static_cast<double>(row) * count;
    InParts(call.team, call.images * rows, reads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const float* x = call.floats() + r / rows * in_size_ +
                         kept_.Offset(r % rows, kept_.axes() - 1, 0);
        float* y = static_cast<float*>(call.out) + r * row;
        std::fill(y, y + row, Start(function_));
        for (int64_t i = 0; i < count; ++i)
          Combine(function_, x + reduced_.Offset(i, reduced_.axes(), 0), y, row);
      }
    });
  }

 private:
  // One result at a time, for inputs whose contiguous axis is reduced.
  void Alone(const Call& call) const {
    const int64_t last = reduced_.axes() - 1, row = reduced_.sizes[last];
    const int64_t stride = reduced_.strides[last][0], rows = Product(reduced_.sizes) / row;
    const double reads = static_cast<double>(row) * rows;
    InParts(call.team, call.images * out.depth, reads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const float* x = call.floats() + n / out.depth * in_size_ +
                         kept_.Offset(n % out.depth, kept_.axes(), 0);
        float y = Start(function_);
        for (int64_t r = 0; r < rows; ++r) {
          const float* from = x + reduced_.Offset(r, last, 0);
          for (int64_t i = 0; i < row; ++i) Combine(function_, from + i * stride, &y, 1);
        }
        static_cast<float*>(call.out)[n] = y;
      }
    });
  }

  static int64_t Kept(const Sizes& shape, const std::vector<bool>& over) {
    int64_t size = 1;
    for (size_t axis = 0; axis < shape.size(); ++axis)
      if (!over[axis]) size = Times(size, shape[axis]);
    return size;
  }

  const Reduction function_;
  const int64_t in_size_;
  Walk kept_, reduced_;
};

}  // namespace

std::unique_ptr<Operation> MakePool(const Geometry& g, int64_t channels,
                                    Reduction function) {
  return std::make_unique<Pool>(g, channels, function);
}

std::unique_ptr<Operation> MakeReduce(const Sizes& shape, const std::vector<bool>& over,
                                      Reduction function) {
  return std::make_unique<Reduce>(shape, over, function);
}

}  // namespace xnor
