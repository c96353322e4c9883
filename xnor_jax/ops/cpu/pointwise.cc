// Operations without a kernel: signs, pools, the norm and the mean.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "geometry.h"
#include "operation.h"
#include "select.h"

namespace xnor {
namespace {

constexpr double kElements = 16384;  // a task's, where there are enough
constexpr double kOnce = 8;  // multiplications in the time of an element read once

// Calls run(begin, end) for parts of [0, count), whose items read so many elements.
template <class Run>
void InParts(Team& team, int64_t count, double elements, const Run& run) {
  const int64_t each = static_cast<int64_t>(kElements / std::max(elements, 1.0)) + 1;
  team.For((count + each - 1) / each, [&](int64_t task) {
    run(task * each, std::min((task + 1) * each, count));
  });
}

Geometry PoolGeometry(const Shape& in, const Step& step) {
  const int64_t ones[] = {1, 1};
  return Geometry(in.height, in.width, step.window, step.strides, step.padding, ones);
}

Shape PoolShape(const Geometry& g, int64_t words) {
  return {Type::kWords, g.out_height, g.out_width, words};
}

// The elements that a row of a pool's windows reads, for each of a pixel's.
double RowReads(const Geometry& g) {
  const int64_t height = std::min(g.window_height, g.height);
  const int64_t width = std::min(g.window_width, g.width);
  return static_cast<double>(g.out_width) * height * width;
}

class Pack : public Operation {
 public:
  explicit Pack(const Shape& in)
      : Operation({Type::kWords, in.height, in.width, WordsFor(in.depth)}),
        channels_(in.depth) {
    work = kOnce * static_cast<double>(in.size());
  }
  void Run(Team& team, int64_t images, const void* in, void* to) const override {
    InParts(team, images * out.pixels(), channels_, [&](int64_t begin, int64_t end) {
      ChosenEngine().pack(static_cast<const float*>(in), channels_,
                          static_cast<uint32_t*>(to), begin, end);
    });
  }

 private:
  const int64_t channels_;
};

// Bytes of flags to the words of each flag, a pixel's words of one behind the other.
class PackFlags : public Operation {
 public:
  PackFlags(const Shape& in, int64_t flags)
      : Operation({Type::kWords, in.height, in.width, Times(WordsFor(in.depth), flags)}),
        channels_(in.depth), flags_(flags) {
    work = kOnce * static_cast<double>(in.size());
  }
  void Run(Team& team, int64_t images, const void* in, void* to) const override {
    InParts(team, images * out.pixels(), channels_, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel)
        Pixel(static_cast<const uint8_t*>(in) + pixel * channels_,
              static_cast<uint32_t*>(to) + pixel * out.depth);
    });
  }

 private:
  void Pixel(const uint8_t* x, uint32_t* y) const {
    const int64_t words = WordsFor(channels_);
    for (int64_t word = 0; word < words; ++word) {
      const int64_t rest = channels_ - word * kPanel;
      uint64_t eights[kPanel / 8] = {};
      if (rest < kPanel)
        std::memcpy(eights, x + word * kPanel, rest);
      else
        std::memcpy(eights, x + word * kPanel, kPanel);  // Its size known, it is no call.
      for (int64_t flag = 0; flag < flags_; ++flag) {
        uint32_t bits = 0;
        for (int i = 0; i < kPanel / 8; ++i)
          bits |= Gathered(eights[i] >> flag) << (8 * i);
        y[flag * words + word] = bits;
      }
    }
  }
  // The lowest bits of eight bytes.
  static uint32_t Gathered(uint64_t bytes) {
    return ((bytes & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
  }

  const int64_t channels_, flags_;
};

// The sign of a maximum is the `and` of the sign bits, of a minimum the `or`.
class PoolBits : public Operation {
 public:
  PoolBits(const Geometry& g, int64_t words, const uint32_t* flip)
      : Operation(PoolShape(g, words)), g_(g), flip_(flip) {
    work = kOnce * RowReads(g) * g.out_height * words;
  }
  void Run(Team& team, int64_t images, const void* in, void* to) const override {
    const Geometry& g = g_;
    const int64_t words = out.depth, row = g.out_width * words;
    const uint32_t* x = static_cast<const uint32_t*>(in);
    const int64_t rows = images * g.out_height;
    InParts(team, rows, RowReads(g) * words, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t top = r % g.out_height * g.stride_height - g.top;
        const uint32_t* image = x + r / g.out_height * g.height * g.width * words;
        uint32_t* y = static_cast<uint32_t*>(to) + r * row;
        for (int64_t column = 0; column < g.out_width; ++column, y += words)
          Pixel(image, top, column * g.stride_width - g.left, y);
      }
    });
  }

 private:
  void Pixel(const uint32_t* image, int64_t top, int64_t left, uint32_t* y) const {
    const int64_t words = out.depth;
    std::fill(y, y + words, ~0u);
    const int64_t bottom = std::min(top + g_.window_height, g_.height);
    const int64_t right = std::min(left + g_.window_width, g_.width);
    for (int64_t i = std::max<int64_t>(top, 0); i < bottom; ++i)
      for (int64_t j = std::max<int64_t>(left, 0); j < right; ++j) {
        const uint32_t* pixel = image + (i * g_.width + j) * words;
        for (int64_t w = 0; w < words; ++w) y[w] &= pixel[w] ^ flip_[w];
      }
    for (int64_t w = 0; w < words; ++w) y[w] ^= flip_[w];
  }

  const Geometry g_;
  const uint32_t* const flip_;
};

class SumPool : public Operation {
 public:
  SumPool(const Geometry& g, int64_t channels, const float* threshold,
          const uint32_t* flip)
      : Operation(PoolShape(g, WordsFor(channels))), g_(g), channels_(channels),
        threshold_(threshold), flip_(flip) {
    work = kOnce * RowReads(g) * g.out_height * channels;
  }
  void Prepare() override { padded_ = Padded(threshold_, channels_); }
  void Run(Team& team, int64_t images, const void* in, void* to) const override {
    const Geometry& g = g_;
    PoolJob job = {};
    job.x = static_cast<const float*>(in);
    job.height = g.height, job.width = g.width, job.channels = channels_;
    job.out_height = g.out_height, job.out_width = g.out_width;
    job.window_height = g.window_height, job.window_width = g.window_width;
    job.stride_height = g.stride_height, job.stride_width = g.stride_width;
    job.top = g.top, job.left = g.left;
    job.threshold = padded_.data(), job.flip = flip_;
    job.out = static_cast<uint32_t*>(to);
    const int64_t rows = images * g.out_height;
    InParts(team, rows, RowReads(g) * channels_, [&](int64_t begin, int64_t end) {
      ChosenEngine().sum_pool(job, begin, end);
    });
  }

 private:
  const Geometry g_;
  const int64_t channels_;
  const float* const threshold_;
  const uint32_t* const flip_;
  std::vector<float> padded_;
};

class Norm : public Operation {
 public:
  Norm(const Shape& in, const float* mean, const float* scale, const float* bias)
      : Operation(in), mean_(mean), scale_(scale), bias_(bias) {
    work = kOnce * static_cast<double>(in.size());
  }
  void Run(Team& team, int64_t images, const void* in, void* to) const override {
    const int64_t channels = out.depth;
    InParts(team, images * out.pixels(), channels, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const float* x = static_cast<const float*>(in) + pixel * channels;
        float* y = static_cast<float*>(to) + pixel * channels;
        for (int64_t c = 0; c < channels; ++c)
          y[c] = (x[c] - mean_[c]) * scale_[c] + bias_[c];
      }
    });
  }

 private:
  const float *const mean_, *const scale_, *const bias_;
};

class Mean : public Operation {
 public:
  explicit Mean(const Shape& in)
      : Operation({Type::kFloats, 1, 1, in.depth}), positions_(in.pixels()) {
    work = kOnce * static_cast<double>(in.size());
  }
  void Run(Team& team, int64_t images, const void* in, void* to) const override {
    const int64_t channels = out.depth;
    const double each = static_cast<double>(positions_) * channels;
    InParts(team, images, each, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const float* x = static_cast<const float*>(in) + n * positions_ * channels;
        float* y = static_cast<float*>(to) + n * channels;
        std::fill(y, y + channels, 0.0f);
        for (int64_t p = 0; p < positions_; ++p)
          for (int64_t c = 0; c < channels; ++c) y[c] += x[p * channels + c];
        // As XLA computes a division by a constant.
        const float share = 1.0f / static_cast<float>(positions_);
        for (int64_t c = 0; c < channels; ++c) y[c] *= share;
      }
    });
  }

 private:
  const int64_t positions_;
};

}  // namespace

std::unique_ptr<Operation> MakePack(const Shape& in) {
  Require(in.type == Type::kFloats, "expected floats");
  return std::make_unique<Pack>(in);
}

std::unique_ptr<Operation> MakePackFlags(const Shape& in, const Step& step) {
  Require(in.type == Type::kBytes, "expected bytes");
  Require(step.channels >= 1 && step.channels <= 8, "expected 1 to 8 flags");
  return std::make_unique<PackFlags>(in, step.channels);
}

std::unique_ptr<Operation> MakePoolBits(const Shape& in, const Step& step,
                                        Arguments& args) {
  Require(in.type == Type::kWords, "expected words of signs");
  const Geometry g = PoolGeometry(in, step);
  return std::make_unique<PoolBits>(g, in.depth, args.Vector<ffi::U32>(in.depth));
}

std::unique_ptr<Operation> MakeSumPool(const Shape& in, const Step& step,
                                       Arguments& args) {
  Require(in.type == Type::kFloats, "expected floats");
  const Geometry g = PoolGeometry(in, step);
  const float* threshold = args.Vector<ffi::F32>(in.depth);
  const uint32_t* flip = args.Vector<ffi::U32>(WordsFor(in.depth));
  return std::make_unique<SumPool>(g, in.depth, threshold, flip);
}

std::unique_ptr<Operation> MakeNorm(const Shape& in, Arguments& args) {
  Require(in.type == Type::kFloats, "expected floats");
  const float* mean = args.Vector<ffi::F32>(in.depth);
  const float* scale = args.Vector<ffi::F32>(in.depth);
  const float* bias = args.Vector<ffi::F32>(in.depth);
  return std::make_unique<Norm>(in, mean, scale, bias);
}

std::unique_ptr<Operation> MakeMean(const Shape& in) {
  Require(in.type == Type::kFloats, "expected floats");
  return std::make_unique<Mean>(in);
}

}  // namespace xnor
