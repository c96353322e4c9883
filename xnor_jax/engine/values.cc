// Signs to floats, sums to signs, moves, constants, and products of two values.
#include "values.h"

#include <algorithm>
#include <utility>

#include "select.h"
#include "walk.h"

namespace xnor {
namespace {

class Unpack : public Pixelwise {
 public:
  Unpack(int64_t pixels, int64_t channels)
      : Pixelwise({Type::kFloats, pixels, 1, channels}, pixels, channels) {}
  void RunPixels(const Call& call, int64_t begin, int64_t end) const override {
    const int64_t channels = out.depth;
    const uint32_t* x = call.words() + begin * WordsFor(channels);
    Chosen().unpack(x, x, channels, end - begin,
                    static_cast<float*>(call.out) + begin * channels);
  }
};

class Regroup : public Pixelwise {
 public:
  Regroup(int64_t pixels, int64_t channels, int64_t groups)
      : Pixelwise({Type::kWords, pixels, groups, WordsFor(channels / groups)}, pixels,
                  Times(groups, WordsFor(channels / groups))),
        each_(channels / groups), words_(WordsFor(channels)) {}
  void RunPixels(const Call& call, int64_t begin, int64_t end) const override {
    const int64_t groups = out.width, words = out.depth;
    uint32_t* y = static_cast<uint32_t*>(call.out) + begin * groups * words;
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const uint32_t* x = call.words() + pixel * words_;
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t word = 0; word < words; ++word, ++y) {
          const int64_t first = group * each_ + word * kPanel;
          const int64_t low = first / kPanel, high = std::min(low + 1, words_ - 1);
          const int shift = static_cast<int>(first % kPanel);
          const int64_t used = std::min<int64_t>(each_ - word * kPanel, kPanel);
          const uint64_t both = static_cast<uint64_t>(x[high]) << kPanel | x[low];
          *y = static_cast<uint32_t>(both >> shift) & (~0u >> (kPanel - used));
        }
    }
  }

 private:
  const int64_t each_, words_;
};

class Threshold : public Pixelwise {
 public:
  Threshold(int64_t pixels, int64_t channels, const Target<int32_t>& target)
      : Pixelwise({Type::kWords, pixels, 1, WordsFor(channels)}, pixels, channels),
        channels_(channels), target_(target) {}
  void RunPixels(const Call& call, int64_t begin, int64_t end) const override {
    const int64_t words = out.depth;
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int32_t* x = static_cast<const int32_t*>(call.in[0]) + pixel * channels_;
      uint32_t* y = static_cast<uint32_t*>(call.out) + pixel * words;
      for (int64_t word = 0; word < words; ++word) {
        uint32_t bits = target_.flip[word];
        const int64_t last = std::min((word + 1) * kPanel, channels_);
        for (int64_t c = word * kPanel; c < last; ++c)
          bits ^= static_cast<uint32_t>(x[c] < target_.threshold[c]) << c % kPanel;
        y[word] = bits;
      }
    }
  }

 private:
  const int64_t channels_;
  const Target<int32_t> target_;
};

class Moves : public Operation {
 public:
  Moves(int64_t size, std::vector<Move> moves, const float* fill)
      : Operation(Flat(Type::kFloats, size)), filled_(fill != nullptr),
        fill_(fill != nullptr ? *fill : 0) {
    for (Move& move : moves) {
      Walk walk;
      for (size_t axis = 0; axis < move.sizes.size(); ++axis)
        walk.Add(move.sizes[axis], {move.from[axis], move.to[axis]});
      walk.Add(1, {1, 1});
      moves_.push_back({std::move(move), std::move(walk)});
    }
    work = kOnce * static_cast<double>(size);
  }
  void Run(const Call& call) const override {
    uint32_t* const y = static_cast<uint32_t*>(call.out);
    if (filled_)
      InParts(call.team, call.images * out.depth, 1, [&](int64_t begin, int64_t end) {
        std::fill(static_cast<float*>(call.out) + begin,
                  static_cast<float*>(call.out) + end, fill_);
      });
    for (const auto& each : moves_) {
      const Move& move = each.first;  // C++17's lambdas capture no structured bindings.
      const Walk& walk = each.second;
      const uint32_t* const x = call.words(move.input);
      const int64_t last = walk.axes() - 1, row = walk.sizes[last];
      const int64_t from = walk.strides[last][0], to = walk.strides[last][1];
      const int64_t rows = Product(walk.sizes) / row;
      InParts(call.team, call.images * rows, row, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const uint32_t* source = x + r / rows * move.input_size + move.from_offset +
                                   walk.Offset(r % rows, last, 0);
          uint32_t* target = y + r / rows * out.depth + move.to_offset +
                             walk.Offset(r % rows, last, 1);
          if (from == 1 && to == 1)
            std::copy(source, source + row, target);
          else
            for (int64_t i = 0; i < row; ++i) target[i * to] = source[i * from];
        }
      });
    }
  }

 private:
  const bool filled_;
  const float fill_;
  std::vector<std::pair<Move, Walk>> moves_;
};

class Take : public Operation {
 public:
  Take(int64_t in_size, std::vector<int32_t> indices)
      : Operation(Flat(Type::kFloats, static_cast<int64_t>(indices.size()))),
        in_size_(in_size), indices_(std::move(indices)) {
    work = kOnce * static_cast<double>(out.depth);
  }
  void Run(const Call& call) const override {
    InParts(call.team, call.images, out.depth, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t i = 0; i < out.depth; ++i)
          static_cast<float*>(call.out)[n * out.depth + i] =
              call.floats()[n * in_size_ + indices_[i]];
    });
  }

 private:
  const int64_t in_size_;
  const std::vector<int32_t> indices_;
};

class Constant : public Operation {
 public:
  explicit Constant(std::vector<float> value)
      : Operation(Flat(Type::kFloats, static_cast<int64_t>(value.size()))),
        value_(std::move(value)) {}
  void Run(const Call& call) const override {
    for (int64_t n = 0; n < call.images; ++n)
      std::copy(value_.begin(), value_.end(), static_cast<float*>(call.out) + n * out.depth);
  }

 private:
  const std::vector<float> value_;
};

class MatMul : public Operation {
 public:
  MatMul(int64_t batch, int64_t rows, int64_t inner, int64_t columns)
      : Operation({Type::kFloats, batch, rows, columns}), inner_(inner) {
    work = static_cast<double>(out.size()) * static_cast<double>(inner);
  }
  void Run(const Call& call) const override {
    const int64_t rows = out.width, columns = out.depth, count = call.images * out.pixels();
    InParts(call.team, count, static_cast<double>(inner_) * columns,
            [&](int64_t begin, int64_t end) {
              for (int64_t r = begin; r < end; ++r) {
                const float* a = call.floats(0) + r * inner_;
                const float* b = call.floats(1) + r / rows * inner_ * columns;
                float* __restrict y = static_cast<float*>(call.out) + r * columns;
                std::fill(y, y + columns, 0.0f);
                for (int64_t k = 0; k < inner_; ++k, b += columns)
                  for (int64_t c = 0; c < columns; ++c) y[c] += a[k] * b[c];
              }
            });
  }

 private:
  const int64_t inner_;
};

}  // namespace

int64_t Product(const Sizes& sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) product = Times(product, size);
  return product;
}

Sizes Strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0; stride = Times(stride, sizes[axis]))
    strides[axis] = stride;
  return strides;
}

std::unique_ptr<Operation> MakeUnpack(int64_t pixels, int64_t channels) {
  return std::make_unique<Unpack>(pixels, channels);
}

std::unique_ptr<Operation> MakeRegroup(int64_t pixels, int64_t channels, int64_t groups) {
  return std::make_unique<Regroup>(pixels, channels, groups);
}

std::unique_ptr<Operation> MakeThreshold(int64_t pixels, int64_t channels,
                                         const Target<int32_t>& target) {
  return std::make_unique<Threshold>(pixels, channels, target);
}

std::unique_ptr<Operation> MakeMoves(int64_t size, std::vector<Move> moves,
                                     const float* fill) {
  return std::make_unique<Moves>(size, std::move(moves), fill);
}

std::unique_ptr<Operation> MakeTake(int64_t in_size, std::vector<int32_t> indices) {
  return std::make_unique<Take>(in_size, std::move(indices));
}

std::unique_ptr<Operation> MakeConstant(std::vector<float> value) {
  return std::make_unique<Constant>(std::move(value));
}

std::unique_ptr<Operation> MakeMatMul(int64_t batch, int64_t rows, int64_t inner,
                                      int64_t columns) {
  return std::make_unique<MatMul>(batch, rows, inner, columns);
}

}  // namespace xnor
