// Convolutions of signs and of floats: the geometry, the padding and the epilogue's
// constants, in the form in which the engine wants them.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <type_traits>
#include <vector>

#include "geometry.h"
#include "operation.h"
#include "select.h"

namespace xnor {
namespace {

template <class Element>
constexpr bool kIsWords = std::is_same_v<Element, uint32_t>;

template <class Element>
using Sum = typename SumOf<Element>::Type;

// What becomes of the sums. The pointers are to all channels, of every group.
template <class Element>
struct Target {
  Epilogue epilogue;
  const float *scale = nullptr, *bias = nullptr;
  bool relu = false;
  const Sum<Element>* threshold = nullptr;
  const uint32_t* flip = nullptr;
};

template <class Element>
Target<Element> TakeTarget(const Step& step, int64_t channels, Arguments& args) {
  Require(step.epilogue >= 0 && step.epilogue <= 2, "there is no such epilogue");
  Target<Element> target = {static_cast<Epilogue>(step.epilogue)};
  target.relu = step.relu != 0;
  if (target.epilogue == Epilogue::kAffine) {
    target.scale = args.Vector<ffi::F32>(channels);
    target.bias = args.Vector<ffi::F32>(channels);
  } else if (target.epilogue == Epilogue::kThreshold) {
    target.threshold = args.Vector<kIsWords<Element> ? ffi::S32 : ffi::F32>(channels);
    target.flip = args.Vector<ffi::U32>(WordsFor(channels));
  }
  return target;
}

template <class Element>
Shape OutShape(const Geometry& g, Epilogue epilogue, int64_t channels) {
  const Type sums = kIsWords<Element> ? Type::kIntegers : Type::kFloats;
  Shape out = {sums, g.out_height, g.out_width, channels};
  if (epilogue == Epilogue::kAffine) out.type = Type::kFloats;
  if (epilogue == Epilogue::kThreshold)
    out.type = Type::kWords, out.depth = WordsFor(channels);
  return out;
}

// The padded constants of one group's epilogue, which the job points to.
template <class Element>
struct Constants {
  std::vector<float> scale, bias;
  std::vector<Sum<Element>> threshold;

  Constants(Job<Element>& job, const Target<Element>& target, int64_t first,
            int64_t columns) {
    job.epilogue = target.epilogue;
    job.columns = columns;
    job.relu = target.relu;
    if (target.epilogue == Epilogue::kAffine) {
      scale = Padded(target.scale + first, columns);
      bias = Padded(target.bias + first, columns);
      job.scale = scale.data();
      job.bias = bias.data();
    } else if (target.epilogue == Epilogue::kThreshold) {  // A group begins at a word.
      threshold = Padded(target.threshold + first, columns);
      job.threshold = threshold.data();
      job.flip = target.flip + first / kPanel;
    }
  }
};

// The images with their zeros around them.
template <class Element>
std::vector<Element> WithPadding(Team& team, const Geometry& g, int64_t depth,
                                 int64_t images, const Element* x) {
  const int64_t row = g.padded_width * depth, image = g.padded_height * row;
  std::vector<Element> padded(Times(images, image));
  team.For(images, [&](int64_t n) {
    for (int64_t y = 0; y < g.height; ++y)
      std::memcpy(padded.data() + n * image + (y + g.top) * row + g.left * depth,
                  x + (n * g.height + y) * g.width * depth,
                  g.width * depth * sizeof(Element));
  });
  return padded;
}

// All pixels by all panels.
template <class Element>
void RunJob(Team& team, const Job<Element>& job, int64_t pixels, double work) {
  constexpr int64_t kPixels = 64;  // a task's, where there are enough
  constexpr double kSmallest = 3e4;  // about a microsecond's
  const auto run = [&] {
    if constexpr (kIsWords<Element>)
      return ChosenEngine().binary;
    else
      return ChosenEngine().real;
  }();
  const int64_t panels = WordsFor(job.columns), threads = team.threads();
  if (threads < 2 || work < kSmallest) {
    run(job, 0, pixels, 0, panels);
    return;
  }
  const int64_t blocks = (pixels + kPixels - 1) / kPixels, wanted = 4 * threads;
  const int64_t parts = std::min(panels, (wanted + blocks - 1) / blocks);
  team.For(blocks * parts, [&](int64_t task) {
    const int64_t block = task / parts, part = task % parts;
    const int64_t begin = block * kPixels;
    run(job, begin, std::min(begin + kPixels, pixels), part * panels / parts,
        (part + 1) * panels / parts);
  });
}

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
  // corner[i][j][column]: what a 0 adds at all taps above i and left of j. On the way its
  // sums may pass 32 bits, modulo which they are right.
  const int64_t stride = (g.window_width + 1) * columns;
  std::vector<uint32_t> corner((g.window_height + 1) * stride);
  for (int64_t i = 0; i < g.window_height; ++i)
    for (int64_t j = 0; j < g.window_width; ++j) {
      const int32_t* count = counts.data() + (i * g.window_width + j) * columns;
      uint32_t* at = corner.data() + (i + 1) * stride + (j + 1) * columns;
      for (int64_t n = 0; n < columns; ++n)
        at[n] = static_cast<uint32_t>(channels - 2 * count[n]) + at[n - stride] +
                at[n - columns] - at[n - stride - columns];
    }
  const uint32_t* all = corner.data() + corner.size() - columns;
  for (size_t cy = 0; cy < y.inside.size(); ++cy)
    for (size_t cx = 0; cx < x.inside.size(); ++cx) {
      const auto [top, bottom] = y.inside[cy];
      const auto [left, right] = x.inside[cx];
      const uint32_t* first = corner.data() + top * stride;
      const uint32_t* last = corner.data() + bottom * stride;
      int32_t* row = base.data() + (cy * x.inside.size() + cx) * columns;
      for (int64_t n = 0; n < columns; ++n)
        row[n] -= static_cast<int32_t>(
            all[n] - last[right * columns + n] + last[left * columns + n] +
            first[right * columns + n] - first[left * columns + n]);
    }
  return base;
}

// A group of output channels: the job but for its buffers, and what the job points to.
template <class Element>
struct Group {
  Job<Element> job;
  Constants<Element> constants;
  std::vector<int32_t> base;
  std::vector<float> panels;

  Group(const Job<Element>& of_all, const Target<Element>& target, int64_t first,
        int64_t columns)
      : job(of_all), constants(job, target, first, columns) {}
};

template <class Element>
class Conv : public Operation {
 public:
  // `depth`: elements of a pixel that a group of output channels sees; `channels`: signs.
  Conv(const Geometry& g, int64_t groups, int64_t depth, int64_t channels,
       int64_t out_channels, const Target<Element>& target, const Element* kernel)
      : Operation(OutShape<Element>(g, target.epilogue, out_channels)),
        g_(g), depth_(depth), channels_(channels), columns_(out_channels / groups),
        pixel_(Times(groups, depth)), target_(target), kernel_(kernel) {
    const int64_t padded = Times(Times(g.padded_height, g.padded_width), pixel_);
    out.size();  // Both fit into 64 bits.
    if (g.padded()) scratch = padded;
    const double taps = static_cast<double>(g.window_height) * g.window_width;
    work = taps * depth * WordsFor(columns_) * kPanel * groups * g.pixels();
    loops = 1 + groups;
  }

  void Prepare() override {
    const Geometry& g = g_;
    Job<Element> job = {};
    offsets_ = Segments(g, pixel_, depth_, job.length);
    job.pixel_stride = pixel_;
    job.row_stride = g.padded_width * pixel_;
    job.image_stride = g.padded_height * job.row_stride;
    job.out_height = g.out_height, job.out_width = g.out_width;
    job.stride_height = g.stride_height, job.stride_width = g.stride_width;
    job.offsets = offsets_.data();
    job.segments = static_cast<int64_t>(offsets_.size());
    job.out_stride = out.depth;
    if constexpr (kIsWords<Element>) {
      y_ = Classes(g.height, g.out_height, g.window_height, g.stride_height, g.top,
                   g.dilation_height);
      x_ = Classes(g.width, g.out_width, g.window_width, g.stride_width, g.left,
                   g.dilation_width);
      job.class_y = y_.of.data();
      job.class_x = x_.of.data();
      job.classes_x = static_cast<int64_t>(x_.inside.size());
    }
    for (int64_t group = 0; group < pixel_ / depth_; ++group) {
      groups_.emplace_back(job, target_, group * columns_, columns_);
      LayOut(groups_.back(), group);
    }
  }

  void Run(Team& team, int64_t images, const void* in, void* to) const override {
    const Element* x = static_cast<const Element*>(in);
    std::vector<Element> padded;
    if (g_.padded()) {
      padded = WithPadding(team, g_, pixel_, images, x);
      x = padded.data();
    }
    const double groups = static_cast<double>(groups_.size());
    const bool bits = target_.epilogue == Epilogue::kThreshold;
    const int64_t each = bits ? columns_ / kPanel : columns_;
    for (size_t group = 0; group < groups_.size(); ++group) {
      Job<Element> job = groups_[group].job;
      job.image = x + group * depth_;
      job.out = static_cast<uint32_t*>(to) + group * each;  // All are of four bytes.
      RunJob(team, job, images * g_.pixels(), images * work / groups);
    }
  }

 private:
  void LayOut(Group<Element>& group, int64_t index) const;

  const Geometry g_;
  const int64_t depth_, channels_, columns_, pixel_;
  const Target<Element> target_;
  const Element* const kernel_;
  std::vector<int64_t> offsets_;
  Classes y_, x_;  // Words only.
  std::deque<Group<Element>> groups_;  // Their jobs point into them.
};

template <>
void Conv<uint32_t>::LayOut(Group<uint32_t>& group, int64_t index) const {
  const int64_t panels = WordsFor(columns_);
  Job<uint32_t>& job = group.job;
  job.kernel = kernel_ + index * panels * job.segments * job.length * kPanel;
  group.base = Base(g_, y_, x_, job.kernel, panels, depth_, channels_);
  job.base = group.base.data();
}

// The columns of the kernel in panels.
template <>
void Conv<float>::LayOut(Group<float>& group, int64_t) const {
  Job<float>& job = group.job;
  const int64_t panels = WordsFor(columns_), rows = job.segments * job.length;
  group.panels.resize(panels * rows * kPanel);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t width = std::min<int64_t>(columns_ - p * kPanel, kPanel);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(group.panels.data() + (p * rows + r) * kPanel,
                  kernel_ + r * columns_ + p * kPanel, width * sizeof(float));
  }
  job.kernel = group.panels.data();
}

bool InRange(int64_t size) { return size >= 1 && size <= kLargest; }

}  // namespace

std::unique_ptr<Operation> MakeConv(const Shape& in, const Step& step, Arguments& args) {
  Require(in.type == Type::kWords, "expected words of signs");
  const ffi::Buffer<ffi::U32> kernel = args.Next<ffi::U32>();
  const auto k = kernel.dimensions();
  Require(k.size() == 6, "expected a kernel of shape [groups, panels, kh, kw, words, 32]");
  const int64_t window[] = {k[2], k[3]};
  const Geometry g(in.height, in.width, window, step.strides, step.padding,
                   step.dilation);
  const int64_t groups = k[0], channels = step.channels, out_channels = step.out_channels;
  Require(InRange(channels) && InRange(out_channels) && InRange(groups) &&
              out_channels % groups == 0,
          "the channels are out of range or do not divide into the groups");
  const int64_t columns = out_channels / groups, words = WordsFor(channels);
  Require(k[1] == WordsFor(columns) && k[4] == words && k[5] == kPanel,
          "the kernel has not the shape of its channels");
  Require(in.depth == Times(groups, words), "the words are not those of the channels");
  Require(Times(Times(window[0], window[1]), channels) <= kLargest / 2,
          "the window has too many weights for sums of 32 bits");
  const Target<uint32_t> target = TakeTarget<uint32_t>(step, out_channels, args);
  Require(target.epilogue != Epilogue::kThreshold || groups == 1 || columns % kPanel == 0,
          "thresholds need groups of a multiple of 32 channels");
  return std::make_unique<Conv<uint32_t>>(g, groups, words, channels, out_channels,
                                          target, kernel.typed_data());
}

std::unique_ptr<Operation> MakeRealConv(const Shape& in, const Step& step,
                                        Arguments& args) {
  Require(in.type == Type::kFloats, "expected floats");
  const ffi::Buffer<ffi::F32> kernel = args.Next<ffi::F32>();
  const auto k = kernel.dimensions();
  Require(k.size() == 4, "expected a kernel of shape [kh, kw, C, C_out]");
  const int64_t window[] = {k[0], k[1]};
  const Geometry g(in.height, in.width, window, step.strides, step.padding,
                   step.dilation);
  Require(InRange(k[2]) && InRange(k[3]) && k[2] == in.depth,
          "the channels are out of range or not the kernel's");
  const Target<float> target = TakeTarget<float>(step, k[3], args);
  return std::make_unique<Conv<float>>(g, 1, k[2], k[2], k[3], target,
                                       kernel.typed_data());
}

}  // namespace xnor
