// The gradient of a convolution's kernel: at each tap, the images' pixels times the output
// gradient's. The images are floats, or words of signs.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "handler.h"
#include "operation_numbers.h"
#include "select.h"

namespace xnor {
namespace {

// Reads pixels as floats from XLA's buffers of floats or of words.
class Pixels {
 public:
  explicit Pixels(const float* x) : floats_(x) {}
  // Each number is the mean of two signs; `a` and `b` may be the same array.
  Pixels(const uint32_t* a, const uint32_t* b) : a_(a), b_(b) {}

  void Read(int64_t first, int64_t count, int64_t channels, float* to) const {
    if (floats_ != nullptr) {
      std::memcpy(to, floats_ + first * channels, count * channels * sizeof(float));
      return;
    }
    const int64_t at = first * WordsFor(channels);
    Chosen().unpack(a_ + at, b_ + at, channels, count, to);
  }

 private:
  const float* floats_ = nullptr;
  const uint32_t *a_ = nullptr, *b_ = nullptr;
};

// Output rows [first, last) of some images, laid out for the kernels.
struct Block {
  int64_t image, images, first, last;
  std::vector<float> x;         // [images][rows in][padded width][channels]
  std::vector<float> gradient;  // as `Kernels::add_products` reads it
  std::vector<int64_t> pixels;  // offsets in `x` of their windows

  int64_t rows() const { return last - first; }
};

class KernelGradient {
 public:
  KernelGradient(const Geometry& g, int64_t images, int64_t channels, int64_t columns,
                 const Pixels& x, const float* gradient)
      : g_(g), images_(images), channels_(channels), columns_(columns),
        panels_(WordsFor(columns)), x_(x), gradient_(gradient) {
    offsets_ = Segments(g, channels, channels, length_);
    tiles_a_segment_ = (length_ + kTile - 1) / kTile;
    tiles_ = static_cast<int64_t>(offsets_.size()) * tiles_a_segment_;
    at_once_ = std::clamp<int64_t>(kPixels / g.pixels(), 1, images);
    band_ = std::clamp<int64_t>(kPixels / g.x.out, 1, g.y.out);
    bands_ = (g.y.out + band_ - 1) / band_;
    blocks_ = (images + at_once_ - 1) / at_once_ * bands_;
    rows_ = static_cast<int64_t>(offsets_.size()) * length_;
    size_ = Times(rows_, panels_ * kPanel);
    shares_ = size_ <= kSmall ? std::min(blocks_, kShares) : 1;
  }

  double work() const { return static_cast<double>(size_) * g_.pixels() * images_; }

  void Run(Team& team, float* out) {
    sums_.assign(Times(shares_, size_), 0);
    if (shares_ > 1)
      AddShares(team);
    else
      AddTogether(team);
    for (int64_t r = 0; r < rows_; ++r)
      std::memcpy(out + r * columns_, sums_.data() + r * panels_ * kPanel,
                  columns_ * sizeof(float));
  }

 private:
  // Output pixels whose products are summed in registers: their panel of the gradient stays
  // in the first-level cache, and all panels in the second.
  static constexpr int64_t kPixels = 256;
  // Rows of the kernel: a multiple of the rows that any set keeps in registers.
  static constexpr int64_t kTile = 48;
  // Elements of a kernel whose sums fit into a core's second-level cache beside a block.
  static constexpr int64_t kSmall = 1 << 16;
  // Fixed, so that the order of rounding does not depend on the number of threads.
  static constexpr int64_t kShares = 16;

  // A small kernel: each share of the blocks has its own sums, so that no thread waits.
  void AddShares(Team& team) {
    team.For(shares_, [&](int64_t share) {
      Block block;
      float* const sums = sums_.data() + share * size_;
      const int64_t last = (share + 1) * blocks_ / shares_;
      for (int64_t b = share * blocks_ / shares_; b < last; ++b) {
        Begin(block, b);
        for (int64_t piece = 0; piece < 2 * block.images; ++piece) LayOut(block, piece);
        for (int64_t t = 0; t < tiles_; ++t) AddTile(block, t, sums);
      }
    });
    for (int64_t share = 1; share < shares_; ++share)
      for (int64_t i = 0; i < size_; ++i) sums_[i] += sums_[share * size_ + i];
  }

  // A large kernel: one block after another, the kernel's rows split over the threads.
  void AddTogether(Team& team) {
    const int64_t parts = std::min(tiles_, 4 * team.threads());
    Block blocks[2];
    Begin(blocks[0], 0);
    team.For(2 * blocks[0].images, [&](int64_t piece) { LayOut(blocks[0], piece); });
    for (int64_t b = 0; b < blocks_; ++b) {
      Block &now = blocks[b % 2], &next = blocks[(b + 1) % 2];
      const bool more = b + 1 < blocks_;
      if (more) Begin(next, b + 1);
      // The next block is laid out in the same loop: one wait per block.
      const int64_t pieces = more ? 2 * next.images : 0;
      team.For(pieces + parts, [&](int64_t task) {
        if (task < pieces) return LayOut(next, task);
        const int64_t part = task - pieces;
        for (int64_t t = part * tiles_ / parts; t < (part + 1) * tiles_ / parts; ++t)
          AddTile(now, t, sums_.data());
      });
    }
  }

  int64_t RowsIn(const Block& b) const {
    const int64_t reach = (g_.y.window - 1) * g_.y.dilation + 1;
    return (b.rows() - 1) * g_.y.stride + reach;
  }

  void Begin(Block& b, int64_t index) const {
    b.image = index / bands_ * at_once_;
    b.images = std::min(at_once_, images_ - b.image);
    b.first = index % bands_ * band_;
    b.last = std::min(b.first + band_, g_.y.out);
    const int64_t row = g_.x.padded * channels_, image = Times(RowsIn(b), row);
    b.x.resize(Times(b.images, image));
    b.pixels.clear();
    for (int64_t n = 0; n < b.images; ++n)
      for (int64_t y = 0; y < b.rows(); ++y)
        for (int64_t x = 0; x < g_.x.out; ++x)
          b.pixels.push_back(n * image + y * g_.y.stride * row +
                             x * g_.x.stride * channels_);
    b.gradient.resize(panels_ * kPanel * b.pixels.size());
  }

  // Each image has two pieces, its pixels and its gradient.
  void LayOut(Block& b, int64_t piece) const {
    if (piece % 2 == 0)
      LayOutPixels(b, piece / 2);
    else
      LayOutGradient(b, piece / 2);
  }

  void LayOutPixels(Block& b, int64_t n) const {
    const int64_t rows = RowsIn(b), row = g_.x.padded * channels_;
    const int64_t left = g_.x.before * channels_, width = g_.x.size * channels_;
    for (int64_t r = 0; r < rows; ++r) {
      float* to = b.x.data() + (n * rows + r) * row;
      const int64_t y = b.first * g_.y.stride + r - g_.y.before;
      if (y < 0 || y >= g_.y.size) {
        std::fill(to, to + row, 0.0f);
        continue;
      }
      std::fill(to, to + left, 0.0f);
      x_.Read(((b.image + n) * g_.y.size + y) * g_.x.size, g_.x.size, channels_, to + left);
      std::fill(to + left + width, to + row, 0.0f);
    }
  }

  void LayOutGradient(Block& b, int64_t n) const {
    const int64_t count = b.rows() * g_.x.out;
    const int64_t pixels = static_cast<int64_t>(b.pixels.size());
    const int64_t before = (b.image + n) * g_.pixels() + b.first * g_.x.out;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t first = panel * kPanel;
      const int64_t width = std::min<int64_t>(columns_ - first, kPanel);
      const float* from = gradient_ + before * columns_ + first;
      const int64_t padded = width <= kPanel / 2 ? kPanel / 2 : kPanel;
      float* to = b.gradient.data() + panel * pixels * kPanel + n * count * padded;
      if (columns_ == padded) {
        std::memcpy(to, from, count * padded * sizeof(float));
        continue;
      }
      for (int64_t p = 0; p < count; ++p, from += columns_, to += padded) {
        std::memcpy(to, from, width * sizeof(float));
        std::fill(to + width, to + padded, 0.0f);
      }
    }
  }

  void AddTile(const Block& b, int64_t tile, float* sums) const {
    const int64_t segment = tile / tiles_a_segment_;
    const int64_t first = tile % tiles_a_segment_ * kTile;
    Chosen().add_products(
        b.x.data() + offsets_[segment] + first, std::min(length_ - first, kTile),
        b.pixels.data(), static_cast<int64_t>(b.pixels.size()), b.gradient.data(), columns_,
        sums + (segment * length_ + first) * panels_ * kPanel);
  }

  const Geometry g_;
  const int64_t images_, channels_, columns_, panels_;
  const Pixels x_;
  const float* const gradient_;
  // The kernel's rows are those of its segments, `length_` each.
  std::vector<int64_t> offsets_;
  int64_t rows_, length_, tiles_a_segment_, tiles_;
  // Blocks of `at_once_` images, or of bands of `band_` rows of one image.
  int64_t at_once_, band_, bands_, blocks_;
  int64_t size_, shares_;
  std::vector<float> sums_;  // [shares][rows of the kernel][panels * kPanel]
};

// `x`: floats `[images, height, width, channels]`, or words of their signs. `again`: of the
// same type and shape; words are averaged with those of `x`, floats are not read.
void Run(ffi::ThreadPool& pool, ffi::AnyBuffer& x, ffi::AnyBuffer& again,
         ffi::Buffer<ffi::F32>& gradient, ffi::Buffer<ffi::F32>& out,
         ffi::Span<const int64_t> way) {
  Require(way.size() == 8, "expected two strides, four paddings and two dilations");
  const auto d = x.dimensions(), e = again.dimensions(), o = out.dimensions(),
             y = gradient.dimensions();
  Require(d.size() == 4 && y.size() == 4 && o.size() == 4,
          "expected images, a gradient and a kernel of four axes");
  for (const auto& sizes : {d, y, o})
    for (int64_t n : sizes) Require(n >= 1 && n <= kLargest, "a size is out of range");
  const bool words = x.element_type() == ffi::U32;
  Require(words || x.element_type() == ffi::F32, "expected float32 or uint32");
  Require(again.element_type() == x.element_type() && e.size() == 4 &&
              std::equal(d.begin(), d.end(), e.begin()),
          "expected second images of the first ones' type and shape");
  const int64_t channels = o[2], window[] = {o[0], o[1]};
  const int64_t strides[] = {way[0], way[1]}, dilation[] = {way[6], way[7]};
  const int64_t padding[] = {way[2], way[3], way[4], way[5]};
  const Geometry g = GeometryOf(d[1], d[2], window, strides, padding, dilation);
  Require(d[3] == (words ? WordsFor(channels) : channels),
          "the images do not have the kernel's channels");
  Require(y[0] == d[0] && y[1] == g.y.out && y[2] == g.x.out && y[3] == o[3],
          "the gradient does not have the shape of the convolution's result");
  Times(g.padded_pixels(), channels);  // Throws on overflow.
  const Pixels pixels = words
                            ? Pixels(static_cast<const uint32_t*>(x.untyped_data()),
                                     static_cast<const uint32_t*>(again.untyped_data()))
                            : Pixels(static_cast<const float*>(x.untyped_data()));
  KernelGradient all(g, d[0], channels, o[3], pixels, gradient.typed_data());
  PoolTeam team(pool, all.work());
  all.Run(team, out.typed_data());
}

ffi::Error Handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer again,
                   ffi::Buffer<ffi::F32> gradient, ffi::Result<ffi::Buffer<ffi::F32>> out,
                   ffi::Span<const int64_t> way) {
  return Answer([&] { Run(pool, x, again, gradient, *out, way); });
}

}  // namespace
}  // namespace xnor

XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_kernel_gradient, xnor::Handler,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<::xla::ffi::AnyBuffer>()
                                  .Arg<::xla::ffi::AnyBuffer>()
                                  .Arg<::xla::ffi::Buffer<::xla::ffi::F32>>()
                                  .Ret<::xla::ffi::Buffer<::xla::ffi::F32>>()
                                  .Attr<::xla::ffi::Span<const int64_t>>("way"));
