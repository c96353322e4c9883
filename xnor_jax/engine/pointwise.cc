// Operations without a kernel: signs, pools, the norm and the mean.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "operation.h"
#include "select.h"

namespace xnor {
namespace {

Shape PoolShape(const Geometry& g, int64_t words) {
  return {Type::kWords, Times(g.z.out, g.y.out), g.x.out, words};
}

// The elements that a row of a pool's windows reads, per channel or word.
double RowReads(const Geometry& g) {
  double reads = static_cast<double>(g.x.out);
  for (const Axis* axis : {&g.z, &g.y, &g.x})
    reads *= static_cast<double>(std::min(axis->window, axis->size));
  return reads;
}

class Pack : public Pixelwise {
 public:
  explicit Pack(const Shape& in)
      : Pixelwise({Type::kWords, in.height, in.width, WordsFor(in.depth)}, in.pixels(),
                  in.depth),
        channels_(in.depth) {}
  void RunPixels(const Call& call, int64_t begin, int64_t end) const override {
    Chosen().pack(call.floats(), channels_, static_cast<uint32_t*>(call.out), begin, end);
  }

 private:
  const int64_t channels_;
};

// The sign bit of a maximum is the AND of the sign bits; that of a minimum is the OR.
class PoolBits : public Operation {
 public:
  PoolBits(const Geometry& g, int64_t words, const uint32_t* flip)
      : Operation(PoolShape(g, words)), g_(g), flip_(flip) {
    work = kOnce * RowReads(g) * out.height * words;
  }
  void Run(const Call& call) const override {
    const Geometry& g = g_;
    const int64_t words = out.depth, row = g.x.out * words;
    const int64_t image = g.z.size * g.y.size * g.x.size * words;
    const int64_t rows = call.images * out.height;
    InParts(call.team, rows, RowReads(g) * words, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at_y = r % g.y.out, at_z = r / g.y.out % g.z.out;
        const auto [front, back] = g.z.Inside(at_z);
        const auto [top, bottom] = g.y.Inside(at_y);
        const int64_t in_z = at_z * g.z.stride - g.z.before;
        const int64_t in_y = at_y * g.y.stride - g.y.before;
        uint32_t* y = static_cast<uint32_t*>(call.out) + r * row;
        for (int64_t column = 0; column < g.x.out; ++column, y += words) {
          const auto [left, right] = g.x.Inside(column);
          const int64_t in_x = column * g.x.stride - g.x.before;
          for (int64_t w = 0; w < words; ++w) {
            uint32_t all = ~0u, any = 0;
            for (int64_t k = front; k < back; ++k)
              for (int64_t i = top; i < bottom; ++i) {
                const int64_t row = ((in_z + k) * g.y.size + in_y + i) * g.x.size;
                const uint32_t* pixels = call.words() + r / out.height * image + w;
                for (int64_t j = row + in_x + left; j < row + in_x + right; ++j) {
                  all &= pixels[j * words];
                  any |= pixels[j * words];
                }
              }
            y[w] = (all & ~flip_[w]) | (any & flip_[w]);
          }
        }
      }
    });
  }

 private:
  const Geometry g_;
  const uint32_t* const flip_;
};

class SumPool : public Operation {
 public:
  SumPool(const Geometry& g, int64_t channels, const float* threshold,
          const uint32_t* flip)
      : Operation(PoolShape(g, WordsFor(channels))), g_(g), channels_(channels),
        threshold_(threshold), flip_(flip) {
    work = kOnce * RowReads(g) * g.y.out * channels;
    memory = 4 * WordsFor(channels) * kPanel;
  }
  void Prepare() override { padded_ = Padded(threshold_, channels_); }
  void Run(const Call& call) const override {
    const Geometry& g = g_;
    PoolJob job = {};
    job.x = call.floats();
    job.height = g.y.size, job.width = g.x.size, job.channels = channels_;
    job.out_height = g.y.out, job.out_width = g.x.out;
    job.window_height = g.y.window, job.window_width = g.x.window;
    job.stride_height = g.y.stride, job.stride_width = g.x.stride;
    job.top = g.y.before, job.left = g.x.before;
    job.threshold = padded_.data(), job.flip = flip_;
    job.out = static_cast<uint32_t*>(call.out);
    const int64_t rows = call.images * g.y.out;
    InParts(call.team, rows, RowReads(g) * channels_, [&](int64_t begin, int64_t end) {
      Chosen().sum_pool(job, begin, end);
    });
  }

 private:
  const Geometry g_;
  const int64_t channels_;
  const float* const threshold_;
  const uint32_t* const flip_;
  std::vector<float> padded_;
};

// A row of sum pools with windows of one number.
class Sign : public Pixelwise {
 public:
  Sign(int64_t pixels_per_image, int64_t channels, const float* threshold,
       const uint32_t* flip)
      : Pixelwise({Type::kWords, pixels_per_image, 1, WordsFor(channels)},
                  pixels_per_image, channels),
        channels_(channels), threshold_(threshold), flip_(flip) {
    memory = 4 * WordsFor(channels) * kPanel;
  }
  void Prepare() override { padded_ = Padded(threshold_, channels_); }
  void RunPixels(const Call& call, int64_t begin, int64_t end) const override {
    PoolJob job = {};
    job.x = call.floats() + begin * channels_;
    job.height = job.out_height = 1, job.channels = channels_;
    job.width = job.out_width = end - begin;
    job.window_height = job.window_width = 1;
    job.stride_height = job.stride_width = 1;
    job.threshold = padded_.data(), job.flip = flip_;
    job.out = static_cast<uint32_t*>(call.out) + begin * out.depth;
    Chosen().sum_pool(job, 0, 1);
  }

 private:
  const int64_t channels_;
  const float* const threshold_;
  const uint32_t* const flip_;
  std::vector<float> padded_;
};

class Norm : public Pixelwise {
 public:
  Norm(const Shape& in, const float* mean, const float* scale, const float* bias)
      : Pixelwise(in, in.pixels(), in.depth), mean_(mean), scale_(scale), bias_(bias) {
    in_place = true;
  }
  void RunPixels(const Call& call, int64_t begin, int64_t end) const override {
    const int64_t channels = out.depth;
    Chosen().norm(call.floats() + begin * channels, mean_, scale_, bias_, channels,
                  end - begin, static_cast<float*>(call.out) + begin * channels);
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
  void Run(const Call& call) const override {
    const int64_t channels = out.depth;
    const double each = static_cast<double>(positions_) * channels;
    InParts(call.team, call.images, each, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const float* x = call.floats() + n * positions_ * channels;
        float* y = static_cast<float*>(call.out) + n * channels;
        std::fill(y, y + channels, 0.0f);
        for (int64_t p = 0; p < positions_; ++p)
          for (int64_t c = 0; c < channels; ++c) y[c] += x[p * channels + c];
        // XLA also computes a division by a constant as a product with its inverse.
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

std::unique_ptr<Operation> MakePoolBits(const Geometry& g, int64_t words,
                                        const uint32_t* flip) {
  return std::make_unique<PoolBits>(g, words, flip);
}

std::unique_ptr<Operation> MakeSumPool(const Geometry& g, int64_t channels,
                                       const float* threshold, const uint32_t* flip) {
  Require(g.z.size == 1 && g.z.out == 1, "expected two spatial axes");
  return std::make_unique<SumPool>(g, channels, threshold, flip);
}

std::unique_ptr<Operation> MakeSign(int64_t pixels, int64_t channels,
                                    const float* threshold, const uint32_t* flip) {
  return std::make_unique<Sign>(pixels, channels, threshold, flip);
}

std::unique_ptr<Operation> MakeNorm(const Shape& in, const float* mean,
                                    const float* scale, const float* bias) {
  Require(in.type == Type::kFloats, "expected floats");
  return std::make_unique<Norm>(in, mean, scale, bias);
}

std::unique_ptr<Operation> MakeMean(const Shape& in) {
  Require(in.type == Type::kFloats, "expected floats");
  return std::make_unique<Mean>(in);
}

}  // namespace xnor
