// What XLA calls. Every shape, attribute and size is checked here, whoever calls: a
// handler answers what does not fit with an error and never reads or writes outside the
// buffers that it was given.
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "parallel.h"
#include "select.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {
namespace {

namespace ffi = ::xla::ffi;

using Numbers = ffi::Span<const int64_t>;
using Dimensions = ffi::Span<const int64_t>;

constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();

struct Refusal : std::exception {
  std::string message;
  explicit Refusal(std::string text) : message(std::move(text)) {}
};

void Require(bool holds, const char* message) {
  if (!holds) throw Refusal(message);
}

int64_t Times(int64_t a, int64_t b) {
  int64_t product;
  Require(!__builtin_mul_overflow(a, b, &product), "a size overflows 64 bits");
  return product;
}

int64_t Words(int64_t channels) { return channels / kPanel + (channels % kPanel != 0); }

// Runs a handler's body; what it throws becomes XLA's error.
template <class Body>
ffi::Error Guard(const char* name, const Body& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const Refusal& refusal) {
    return ffi::Error::InvalidArgument(std::string(name) + ": " + refusal.message);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      std::string(name) + ": out of memory");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string(name) + ": " + error.what());
  }
}

struct Geometry {
  int64_t images, height, width;      // in, without padding
  int64_t window_height, window_width;
  int64_t stride_height, stride_width;
  int64_t top, bottom, left, right;
  int64_t dilation_height, dilation_width;
  int64_t padded_height, padded_width;
  int64_t out_height, out_width;

  bool padded() const { return top || bottom || left || right; }
  int64_t pixels() const { return Times(images, Times(out_height, out_width)); }

  Geometry(int64_t n, int64_t h, int64_t w, int64_t kh, int64_t kw, Numbers strides,
           Numbers padding, Numbers dilation) {
    Require(strides.size() == 2 && padding.size() == 4 && dilation.size() == 2,
            "expected 2 strides, 4 paddings and 2 dilations");
    for (int64_t size : {n, h, w, kh, kw})
      Require(size >= 0 && size <= kLargest, "a size is out of range");
    for (int64_t s : strides) Require(s >= 1 && s <= kLargest, "a stride is out of range");
    for (int64_t d : dilation)
      Require(d >= 1 && d <= kLargest, "a dilation is out of range");
    for (int64_t p : padding)
      Require(p >= 0 && p <= kLargest, "a padding is out of range");
    Require(kh >= 1 && kw >= 1, "the window is empty");
    images = n, height = h, width = w, window_height = kh, window_width = kw;
    stride_height = strides[0], stride_width = strides[1];
    top = padding[0], bottom = padding[1], left = padding[2], right = padding[3];
    dilation_height = dilation[0], dilation_width = dilation[1];
    padded_height = h + top + bottom, padded_width = w + left + right;
    const int64_t reach_height = Times(kh - 1, dilation_height) + 1;
    const int64_t reach_width = Times(kw - 1, dilation_width) + 1;
    Require(reach_height <= padded_height && reach_width <= padded_width,
            "the window is larger than the padded image");
    out_height = (padded_height - reach_height) / stride_height + 1;
    out_width = (padded_width - reach_width) / stride_width + 1;
  }
};

void RequireShape(Dimensions dimensions, std::initializer_list<int64_t> expected) {
  bool same = dimensions.size() == expected.size();
  size_t i = 0;
  for (int64_t size : expected) same = same && dimensions[i++] == size;
  Require(same, "a buffer has not the shape that the others imply");
}

// The images with their zeros around them; `storage` holds them where there are any.
template <class Element>
const Element* WithPadding(ffi::ThreadPool& pool, const Geometry& g, int64_t depth,
                           const Element* x, std::vector<Element>& storage) {
  if (!g.padded()) return x;
  const int64_t row = Times(g.padded_width, depth);
  const int64_t image = Times(g.padded_height, row);
  storage.resize(Times(g.images, image));
  const int64_t helpers = storage.size() < 100000 ? 0 : pool.num_threads();
  ParallelFor(pool, g.images, helpers, [&](int64_t n) {
    for (int64_t y = 0; y < g.height; ++y)
      std::memcpy(storage.data() + n * image + (y + g.top) * row + g.left * depth,
                  x + (n * g.height + y) * g.width * depth,
                  g.width * depth * sizeof(Element));
  });
  return storage.data();
}

// The window as runs of neighbouring elements of an image whose pixels are `pixel`
// elements apart, `depth` of them this group's.
std::vector<int64_t> Segments(const Geometry& g, int64_t pixel, int64_t depth,
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

// base[class][column] = bits of the window - what a 0 at each outside tap would add.
std::vector<int32_t> Base(const Geometry& g, const Classes& y, const Classes& x,
                          const uint32_t* kernel, int64_t panels, int64_t words,
                          int64_t channels) {
  const int64_t taps = g.window_height * g.window_width, columns = panels * kPanel;
  const int32_t bits = static_cast<int32_t>(taps * channels);
  std::vector<int32_t> base(y.inside.size() * x.inside.size() * columns, bits);
  if (!g.padded()) return base;
  std::vector<int32_t> counts(taps * columns);
  ChosenEngine().count_taps(kernel, panels, taps, words, counts.data());
  for (size_t cy = 0; cy < y.inside.size(); ++cy)
    for (size_t cx = 0; cx < x.inside.size(); ++cx) {
      int32_t* row = base.data() + (cy * x.inside.size() + cx) * columns;
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t i = t / g.window_width, j = t % g.window_width;
        if (i >= y.inside[cy].first && i < y.inside[cy].second &&
            j >= x.inside[cx].first && j < x.inside[cx].second)
          continue;
        for (int64_t n = 0; n < columns; ++n)
          row[n] -= static_cast<int32_t>(channels) - 2 * counts[t * columns + n];
      }
    }
  return base;
}

// A vector of the output channels of one group, filled up to whole panels.
template <class T>
std::vector<T> Padded(const T* values, int64_t count, T filling) {
  std::vector<T> padded(Words(count) * kPanel, filling);
  std::memcpy(padded.data(), values, count * sizeof(T));
  return padded;
}

// The words of `flip` with the bits behind the last channel cleared.
std::vector<uint32_t> FlipWords(const uint32_t* flip, int64_t channels) {
  std::vector<uint32_t> words(flip, flip + Words(channels));
  if (channels % kPanel) words.back() &= (1u << (channels % kPanel)) - 1;
  return words;
}

// What becomes of the sums. The pointers are to all channels, of every group.
struct Target {
  Epilogue epilogue = Epilogue::kSums;
  const float *scale = nullptr, *bias = nullptr;
  bool relu = false;
  const void* threshold = nullptr;
  const uint32_t* flip = nullptr;
  void* out = nullptr;
};

// The padded constants of one group's epilogue, which the job points to.
template <class Sum>
struct Constants {
  std::vector<float> scale, bias;
  std::vector<Sum> threshold;
  std::vector<uint32_t> flip;

  template <class Element>
  Constants(Job<Element>& job, const Target& target, int64_t group, int64_t columns,
            int64_t groups) {
    const int64_t first = group * columns;
    job.epilogue = target.epilogue;
    job.columns = columns;
    job.relu = target.relu;
    job.out_stride = columns * groups;
    switch (target.epilogue) {
      case Epilogue::kSums:
        job.out = static_cast<Sum*>(target.out) + first;
        break;
      case Epilogue::kAffine:
        job.out = static_cast<float*>(target.out) + first;
        scale = Padded(target.scale + first, columns, 0.0f);
        bias = Padded(target.bias + first, columns, 0.0f);
        job.scale = scale.data();
        job.bias = bias.data();
        break;
      case Epilogue::kThreshold:
        job.out = target.out;
        job.out_stride = Words(columns);
        threshold = Padded(static_cast<const Sum*>(target.threshold), columns,
                           std::numeric_limits<Sum>::has_infinity
                               ? -std::numeric_limits<Sum>::infinity()
                               : std::numeric_limits<Sum>::lowest());
        flip = FlipWords(target.flip, columns);
        job.threshold = threshold.data();
        job.flip = flip.data();
        break;
    }
  }
};

// All pixels by all panels. Waking a second thread costs some ten microseconds: what takes
// less than fifty runs on the caller's.
template <class Element, class Run>
void RunJob(ffi::ThreadPool& pool, const Job<Element>& job, int64_t pixels, Run run) {
  constexpr int64_t kPixels = 64;  // a task's, where there are enough
  constexpr double kSmallest = 1.5e6;  // words or floats, times columns
  const int64_t panels = Words(job.columns);
  const int64_t threads = pool.num_threads();
  const double work = static_cast<double>(pixels) * panels * kPanel * job.segments *
                      job.length;
  if (pixels == 0) return;
  if (threads < 2 || work < kSmallest) {
    run(job, 0, pixels, 0, panels);
    return;
  }
  const int64_t blocks = (pixels + kPixels - 1) / kPixels;
  const int64_t wanted = 4 * threads;
  int64_t parts = blocks >= wanted ? 1 : (wanted + blocks - 1) / blocks;
  if (parts > panels) parts = panels;
  ParallelFor(pool, blocks * parts, threads - 1, [&](int64_t task) {
    const int64_t block = task / parts, part = task % parts;
    const int64_t begin = block * kPixels;
    const int64_t end = begin + kPixels < pixels ? begin + kPixels : pixels;
    run(job, begin, end, part * panels / parts, (part + 1) * panels / parts);
  });
}

void BinaryConv(ffi::ThreadPool& pool, ffi::Buffer<ffi::U32>& x,
                ffi::Buffer<ffi::U32>& kernel, Numbers strides, Numbers padding,
                Numbers dilation, int64_t channels, int64_t out_channels,
                Dimensions out_shape, const Target& target) {
  const Dimensions in = x.dimensions(), k = kernel.dimensions();
  Require(in.size() == 5, "expected words of shape [N, H, W, groups, words]");
  Require(k.size() == 6, "expected a kernel of shape [groups, panels, kh, kw, words, 32]");
  const int64_t groups = in[3], words = in[4], panels = k[1];
  const Geometry g(in[0], in[1], in[2], k[2], k[3], strides, padding, dilation);
  Require(channels >= 1 && channels <= kLargest && out_channels >= 1 &&
              out_channels <= kLargest && groups >= 1 && out_channels % groups == 0,
          "the channels are out of range or do not divide into the groups");
  const int64_t columns = out_channels / groups;
  RequireShape(k, {groups, Words(columns), g.window_height, g.window_width,
                   Words(channels), kPanel});
  Require(words == Words(channels), "the words are not those of the channels");
  Require(Times(Times(g.window_height, g.window_width), channels) <= kLargest / 2,
          "the window has too many weights for sums of 32 bits");
  const bool bits = target.epilogue == Epilogue::kThreshold;
  Require(!bits || groups == 1 || columns % kPanel == 0,
          "thresholds need groups of a multiple of 32 channels");
  RequireShape(out_shape, {g.images, g.out_height, g.out_width,
                           bits ? Words(out_channels) : out_channels});
  const int64_t pixels = g.pixels();

  const int64_t depth = Times(groups, words);
  std::vector<uint32_t> storage;
  const uint32_t* image = WithPadding(pool, g, depth, x.typed_data(), storage);
  Job<uint32_t> job = {};
  const std::vector<int64_t> offsets = Segments(g, depth, words, job.length);
  job.pixel_stride = depth;
  job.row_stride = Times(g.padded_width, depth);
  job.image_stride = Times(g.padded_height, job.row_stride);
  job.out_height = g.out_height, job.out_width = g.out_width;
  job.stride_height = g.stride_height, job.stride_width = g.stride_width;
  job.offsets = offsets.data();
  job.segments = static_cast<int64_t>(offsets.size());
  const Classes y(g.height, g.out_height, g.window_height, g.stride_height, g.top,
                  g.dilation_height);
  const Classes across(g.width, g.out_width, g.window_width, g.stride_width, g.left,
                       g.dilation_width);
  job.class_y = y.of.data();
  job.class_x = across.of.data();
  job.classes_x = static_cast<int64_t>(across.inside.size());
  const int64_t kernel_size = panels * job.segments * job.length * kPanel;
  for (int64_t group = 0; group < groups; ++group) {
    job.image = image + group * words;
    job.kernel = kernel.typed_data() + group * kernel_size;
    const std::vector<int32_t> base =
        Base(g, y, across, job.kernel, panels, words, channels);
    job.base = base.data();
    Target of_group = target;
    if (bits) {
      of_group.threshold = static_cast<const int32_t*>(target.threshold) + group * columns;
      of_group.flip = target.flip + group * panels;
      of_group.out = static_cast<uint32_t*>(target.out) + group * panels;
    }
    const Constants<int32_t> constants(job, of_group, group, columns, groups);
    if (bits) job.out_stride = Words(out_channels);
    RunJob(pool, job, pixels, ChosenEngine().binary);
  }
}

void RealConv(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32>& x,
              ffi::Buffer<ffi::F32>& kernel, Numbers strides, Numbers padding,
              Numbers dilation, Dimensions out_shape, const Target& target) {
  const Dimensions in = x.dimensions(), k = kernel.dimensions();
  Require(in.size() == 4, "expected images of shape [N, H, W, C]");
  Require(k.size() == 4, "expected a kernel of shape [kh, kw, C, C_out]");
  const int64_t channels = in[3], columns = k[3], panels = Words(columns);
  const Geometry g(in[0], in[1], in[2], k[0], k[1], strides, padding, dilation);
  Require(channels >= 1 && channels <= kLargest && columns >= 1 && columns <= kLargest &&
              k[2] == channels,
          "the channels are out of range or not the kernel's");
  const bool bits = target.epilogue == Epilogue::kThreshold;
  RequireShape(out_shape, {g.images, g.out_height, g.out_width, bits ? panels : columns});
  const int64_t pixels = g.pixels();

  std::vector<float> storage;
  Job<float> job = {};
  job.image = WithPadding(pool, g, channels, x.typed_data(), storage);
  const std::vector<int64_t> offsets = Segments(g, channels, channels, job.length);
  job.pixel_stride = channels;
  job.row_stride = Times(g.padded_width, channels);
  job.image_stride = Times(g.padded_height, job.row_stride);
  job.out_height = g.out_height, job.out_width = g.out_width;
  job.stride_height = g.stride_height, job.stride_width = g.stride_width;
  job.offsets = offsets.data();
  job.segments = static_cast<int64_t>(offsets.size());
  const int64_t rows = Times(Times(g.window_height, g.window_width), channels);
  std::vector<float> panel(Times(Times(panels, rows), kPanel));
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t rest = columns - p * kPanel, width = rest < kPanel ? rest : kPanel;
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(panel.data() + (p * rows + r) * kPanel,
                  kernel.typed_data() + r * columns + p * kPanel, width * sizeof(float));
  }
  job.kernel = panel.data();
  const Constants<float> constants(job, target, 0, columns, 1);
  RunJob(pool, job, pixels, ChosenEngine().real);
}

template <class Buffer>
void RequireVector(Buffer& buffer, int64_t size) {
  RequireShape(buffer.dimensions(), {size});
}

template <ffi::DataType Type>
void SetThreshold(Target& target, ffi::Buffer<Type>& threshold,
                  ffi::Buffer<ffi::U32>& flip, int64_t channels) {
  RequireVector(threshold, channels);
  RequireVector(flip, Words(channels));
  target.epilogue = Epilogue::kThreshold;
  target.threshold = threshold.typed_data();
  target.flip = flip.typed_data();
}

void SetAffine(Target& target, ffi::Buffer<ffi::F32>& scale, ffi::Buffer<ffi::F32>& bias,
               bool relu, int64_t channels) {
  RequireVector(scale, channels);
  RequireVector(bias, channels);
  target.epilogue = Epilogue::kAffine;
  target.scale = scale.typed_data();
  target.bias = bias.typed_data();
  target.relu = relu;
}

ffi::Error BinaryConvSums(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> x,
                          ffi::Buffer<ffi::U32> kernel,
                          ffi::ResultBuffer<ffi::S32> out, Numbers strides,
                          Numbers padding, Numbers dilation, int64_t channels,
                          int64_t out_channels) {
  return Guard("binary_conv", [&] {
    Target target;
    target.out = out->typed_data();
    BinaryConv(pool, x, kernel, strides, padding, dilation, channels, out_channels,
               out->dimensions(), target);
  });
}

ffi::Error BinaryConvAffine(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> x,
                            ffi::Buffer<ffi::U32> kernel, ffi::Buffer<ffi::F32> scale,
                            ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> out,
                            Numbers strides, Numbers padding, Numbers dilation,
                            int64_t channels, int64_t out_channels, bool relu) {
  return Guard("binary_conv", [&] {
    Target target;
    SetAffine(target, scale, bias, relu, out_channels);
    target.out = out->typed_data();
    BinaryConv(pool, x, kernel, strides, padding, dilation, channels, out_channels,
               out->dimensions(), target);
  });
}

ffi::Error BinaryConvThreshold(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> x,
                               ffi::Buffer<ffi::U32> kernel,
                               ffi::Buffer<ffi::S32> threshold,
                               ffi::Buffer<ffi::U32> flip,
                               ffi::ResultBuffer<ffi::U32> out, Numbers strides,
                               Numbers padding, Numbers dilation, int64_t channels,
                               int64_t out_channels) {
  return Guard("binary_conv", [&] {
    Require(out_channels >= 1 && out_channels <= kLargest,
            "the output channels are out of range");
    Target target;
    SetThreshold(target, threshold, flip, out_channels);
    target.out = out->typed_data();
    BinaryConv(pool, x, kernel, strides, padding, dilation, channels, out_channels,
               out->dimensions(), target);
  });
}

int64_t LastDimension(Dimensions dimensions) {
  Require(dimensions.size() > 0, "a buffer has no axes");
  return dimensions[dimensions.size() - 1];
}

ffi::Error RealConvSums(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                        ffi::Buffer<ffi::F32> kernel, ffi::ResultBuffer<ffi::F32> out,
                        Numbers strides, Numbers padding, Numbers dilation) {
  return Guard("real_conv", [&] {
    Target target;
    target.out = out->typed_data();
    RealConv(pool, x, kernel, strides, padding, dilation, out->dimensions(), target);
  });
}

ffi::Error RealConvAffine(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                          ffi::Buffer<ffi::F32> kernel, ffi::Buffer<ffi::F32> scale,
                          ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> out,
                          Numbers strides, Numbers padding, Numbers dilation, bool relu) {
  return Guard("real_conv", [&] {
    Target target;
    SetAffine(target, scale, bias, relu, LastDimension(kernel.dimensions()));
    target.out = out->typed_data();
    RealConv(pool, x, kernel, strides, padding, dilation, out->dimensions(), target);
  });
}

ffi::Error RealConvThreshold(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                             ffi::Buffer<ffi::F32> kernel,
                             ffi::Buffer<ffi::F32> threshold, ffi::Buffer<ffi::U32> flip,
                             ffi::ResultBuffer<ffi::U32> out, Numbers strides,
                             Numbers padding, Numbers dilation) {
  return Guard("real_conv", [&] {
    Target target;
    SetThreshold(target, threshold, flip, LastDimension(kernel.dimensions()));
    target.out = out->typed_data();
    RealConv(pool, x, kernel, strides, padding, dilation, out->dimensions(), target);
  });
}

ffi::Error PackBits(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                    ffi::ResultBuffer<ffi::U32> out) {
  return Guard("pack_bits", [&] {
    const Dimensions in = x.dimensions();
    RequireShape(in, {in.size() == 2 ? in[0] : 0, in.size() == 2 ? in[1] : 0});
    RequireShape(out->dimensions(), {in[0], Words(in[1])});
    constexpr int64_t kFloats = 16384;  // a task's
    const int64_t channels = in[1], pixels = in[0];
    if (pixels == 0 || channels == 0) return;
    const int64_t each = kFloats / channels + 1;
    const int64_t tasks = (pixels + each - 1) / each;
    ParallelFor(pool, tasks, tasks < 4 ? 0 : pool.num_threads() - 1, [&](int64_t task) {
      const int64_t begin = task * each;
      ChosenEngine().pack(x.typed_data(), channels, out->typed_data(), begin,
                          begin + each < pixels ? begin + each : pixels);
    });
  });
}

ffi::Error SumPoolBits(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                       ffi::Buffer<ffi::F32> threshold, ffi::Buffer<ffi::U32> flip,
                       ffi::ResultBuffer<ffi::U32> out, Numbers window, Numbers strides,
                       Numbers padding) {
  return Guard("sum_pool_bits", [&] {
    const Dimensions in = x.dimensions();
    Require(in.size() == 4, "expected images of shape [N, H, W, C]");
    Require(window.size() == 2, "expected a window of 2 sizes");
    const int64_t ones[] = {1, 1};
    const Geometry g(in[0], in[1], in[2], window[0], window[1], strides, padding,
                     Numbers(ones, 2));
    const int64_t channels = in[3], words = Words(channels);
    Require(channels >= 1 && channels <= kLargest, "the channels are out of range");
    RequireVector(threshold, channels);
    RequireVector(flip, words);
    RequireShape(out->dimensions(), {g.images, g.out_height, g.out_width, words});
    const std::vector<float> padded =
        Padded(threshold.typed_data(), channels, -std::numeric_limits<float>::infinity());
    const std::vector<uint32_t> flips = FlipWords(flip.typed_data(), channels);
    PoolJob job = {};
    job.x = x.typed_data();
    job.height = g.height, job.width = g.width, job.channels = channels;
    job.out_height = g.out_height, job.out_width = g.out_width;
    job.window_height = g.window_height, job.window_width = g.window_width;
    job.stride_height = g.stride_height, job.stride_width = g.stride_width;
    job.top = g.top, job.left = g.left;
    job.threshold = padded.data(), job.flip = flips.data();
    job.out = out->typed_data();
    const int64_t rows = Times(g.images, g.out_height);
    const int64_t helpers = g.pixels() * channels < 16384 ? 0 : pool.num_threads() - 1;
    ParallelFor(pool, rows, helpers, [&](int64_t row) {
      ChosenEngine().sum_pool(job, row, row + 1);
    });
  });
}

}  // namespace
}  // namespace xnor

using U32 = ::xla::ffi::Buffer<::xla::ffi::U32>;
using S32 = ::xla::ffi::Buffer<::xla::ffi::S32>;
using F32 = ::xla::ffi::Buffer<::xla::ffi::F32>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_binary_conv_sums, xnor::BinaryConvSums,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<U32>()
                                  .Arg<U32>()
                                  .Ret<S32>()
                                  .Attr<xnor::Numbers>("strides")
                                  .Attr<xnor::Numbers>("padding")
                                  .Attr<xnor::Numbers>("dilation")
                                  .Attr<int64_t>("channels")
                                  .Attr<int64_t>("out_channels"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_binary_conv_affine, xnor::BinaryConvAffine,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<U32>()
                                  .Arg<U32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Attr<xnor::Numbers>("strides")
                                  .Attr<xnor::Numbers>("padding")
                                  .Attr<xnor::Numbers>("dilation")
                                  .Attr<int64_t>("channels")
                                  .Attr<int64_t>("out_channels")
                                  .Attr<bool>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_binary_conv_threshold, xnor::BinaryConvThreshold,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<U32>()
                                  .Arg<U32>()
                                  .Arg<S32>()
                                  .Arg<U32>()
                                  .Ret<U32>()
                                  .Attr<xnor::Numbers>("strides")
                                  .Attr<xnor::Numbers>("padding")
                                  .Attr<xnor::Numbers>("dilation")
                                  .Attr<int64_t>("channels")
                                  .Attr<int64_t>("out_channels"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_real_conv_sums, xnor::RealConvSums,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Attr<xnor::Numbers>("strides")
                                  .Attr<xnor::Numbers>("padding")
                                  .Attr<xnor::Numbers>("dilation"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_real_conv_affine, xnor::RealConvAffine,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Attr<xnor::Numbers>("strides")
                                  .Attr<xnor::Numbers>("padding")
                                  .Attr<xnor::Numbers>("dilation")
                                  .Attr<bool>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_real_conv_threshold, xnor::RealConvThreshold,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<U32>()
                                  .Ret<U32>()
                                  .Attr<xnor::Numbers>("strides")
                                  .Attr<xnor::Numbers>("padding")
                                  .Attr<xnor::Numbers>("dilation"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    xnor_jax_pack_bits, xnor::PackBits,
    ::xla::ffi::Ffi::Bind().Ctx<::xla::ffi::ThreadPool>().Arg<F32>().Ret<U32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_sum_pool_bits, xnor::SumPoolBits,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<U32>()
                                  .Ret<U32>()
                                  .Attr<xnor::Numbers>("window")
                                  .Attr<xnor::Numbers>("strides")
                                  .Attr<xnor::Numbers>("padding"));
