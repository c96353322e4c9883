// Convolutions of signs and of floats: prepares the geometry, the padding and the
// epilogue's constants in the layout that the kernels expect.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <type_traits>
#include <vector>

#include "operation.h"
#include "select.h"

namespace xnor {
namespace {

template <class Element>
constexpr bool kIsWords = std::is_same_v<Element, uint32_t>;

template <class Element>
using Sum = typename SumOf<Element>::Type;

template <class Element>
Shape OutShape(const Geometry& g, Epilogue epilogue, int64_t channels) {
  const Type sums = kIsWords<Element> ? Type::kIntegers : Type::kFloats;
  Shape out = {sums, Times(g.z.out, g.y.out), g.x.out, channels};
  if (epilogue == Epilogue::kAffine) out.type = Type::kFloats;
  if (epilogue == Epilogue::kThreshold)
    out.type = Type::kWords, out.depth = WordsFor(channels);
  return out;
}

// The padded constants of one group's epilogue; the job points to them.
template <class Element>
struct Constants {
  std::vector<float> scale, bias, shift;
  std::vector<Sum<Element>> threshold;

  Constants(Job<Element>& job, const Target<Sum<Element>>& target, int64_t first,
            int64_t columns) {
    job.epilogue = target.epilogue;
    job.columns = columns;
    job.relu = target.relu;
    if (target.epilogue == Epilogue::kAffine) {
      scale = Padded(target.scale + first, columns);
      bias = Padded(target.bias + first, columns);
      job.scale = scale.data();
      job.bias = bias.data();
      if (target.shift != nullptr) shift = Padded(target.shift + first, columns);
      job.shift = target.shift != nullptr ? shift.data() : nullptr;
    } else if (target.epilogue == Epilogue::kThreshold) {  // Groups begin at whole words.
      threshold = Padded(target.threshold + first, columns);
      job.threshold = threshold.data();
      job.flip = target.flip + first / kPanel;
    }
  }
};

// Writes the images with zeros around them.
template <class Element>
void WritePadded(Team& team, const Geometry& g, int64_t depth, int64_t images,
                 const Element* x, Element* padded) {
  const int64_t row = g.x.padded * depth, before = g.x.before * depth;
  const int64_t width = g.x.size * depth;
  const int64_t rows = images * g.z.padded * g.y.padded;
  InParts(team, rows, static_cast<double>(row), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t y = r % g.y.padded - g.y.before;
      const int64_t z = r / g.y.padded % g.z.padded - g.z.before;
      const int64_t n = r / (g.y.padded * g.z.padded);
      Element* const to = padded + r * row;
      if (y < 0 || y >= g.y.size || z < 0 || z >= g.z.size) {
        std::fill(to, to + row, Element());
        continue;
      }
      const Element* const from = x + ((n * g.z.size + z) * g.y.size + y) * width;
      std::fill(to, to + before, Element());
      std::copy(from, from + width, to + before);
      std::fill(to + before + width, to + row, Element());
    }
  });
}

// Runs a job on all pixels and panels, split over the team's threads, then the tail.
template <class Element>
void RunJob(Team& team, const Kernels& binary, const Job<Element>& job, int64_t pixels,
            double work, const Tail& tail) {
  constexpr int64_t kPixels = 64;  // per task, if there are enough
  constexpr double kSmallest = 3e4;  // work of about a microsecond
  const auto run = [&] {
    if constexpr (kIsWords<Element>)
      return binary.binary;
    else
      return Chosen().real;
  }();
  const int64_t panels = WordsFor(job.columns), threads = team.threads();
  if (threads < 2) {
    const int64_t each = tail.empty() ? pixels : kPixels;
    for (int64_t begin = 0; begin < pixels; begin += each) {
      const int64_t end = std::min(begin + each, pixels);
      run(job, begin, end, 0, panels);
      tail(begin, end);
    }
    return;
  }
  const int64_t blocks = (pixels + kPixels - 1) / kPixels, wanted = 4 * threads;
  const int64_t pairs = (panels + 1) / 2;  // The kernels may take panels in pairs.
  const int64_t parts = std::min(pairs, (wanted + blocks - 1) / blocks);
  if (work < kSmallest)
    run(job, 0, pixels, 0, panels);
  else
    team.For(blocks * parts, [&](int64_t task) {
      const int64_t block = task / parts, part = task % parts;
      const int64_t begin = block * kPixels, end = std::min(begin + kPixels, pixels);
      run(job, begin, end, part * pairs / parts * 2,
          std::min((part + 1) * pairs / parts * 2, panels));
      if (parts == 1) tail(begin, end);
    });
  if (!tail.empty() && (work < kSmallest || parts > 1))
    InParts(team, pixels, std::max<double>(job.columns, tail.elements()), tail);
}

// base[class][column] = bits of the window - what the zero words at outside taps add.
std::vector<int32_t> Base(const Geometry& g, const Classes& z, const Classes& y,
                          const Classes& x, const uint32_t* kernel, int64_t panels,
                          int64_t words, int64_t channels) {
  const int64_t taps = g.taps(), columns = panels * kPanel;
  const int32_t bits = static_cast<int32_t>(taps * channels);
  std::vector<int32_t> base(z.inside.size() * y.inside.size() * x.inside.size() * columns,
                            bits);
  if (!g.padded()) return base;
  std::vector<int32_t> counts(taps * columns);
  Chosen().count_taps(kernel, panels, taps, words, counts.data());
  // A summed-area table: corner[k][i][j][column] is what zero words add at all taps in
  // front of k, above i and left of j. Its sums may wrap; they are exact modulo 2^32.
  const int64_t row = (g.x.window + 1) * columns, plane = (g.y.window + 1) * row;
  std::vector<uint32_t> corner((g.z.window + 1) * plane);
  for (int64_t k = 0; k < g.z.window; ++k)
    for (int64_t i = 0; i < g.y.window; ++i)
      for (int64_t j = 0; j < g.x.window; ++j) {
        const int64_t tap = (k * g.y.window + i) * g.x.window + j;
        const int32_t* count = counts.data() + tap * columns;
        uint32_t* at = corner.data() + (k + 1) * plane + (i + 1) * row + (j + 1) * columns;
        for (int64_t n = 0; n < columns; ++n)
          at[n] = static_cast<uint32_t>(channels - 2 * count[n]) + at[n - row] +
                  at[n - columns] - at[n - row - columns] + at[n - plane] -
                  at[n - plane - row] - at[n - plane - columns] +
                  at[n - plane - row - columns];
      }
  const uint32_t* all = corner.data() + corner.size() - columns;
  int32_t* to = base.data();
  for (const auto& [front, back] : z.inside)
    for (const auto& [top, bottom] : y.inside)
      for (const auto& [left, right] : x.inside) {
        // The sum inside a box, from its eight corners.
        const auto at = [&](int64_t k, int64_t i, int64_t j) {
          return corner.data() + k * plane + i * row + j * columns;
        };
        const uint32_t *bbr = at(back, bottom, right), *bbl = at(back, bottom, left),
                       *btr = at(back, top, right), *btl = at(back, top, left),
                       *fbr = at(front, bottom, right), *fbl = at(front, bottom, left),
                       *ftr = at(front, top, right), *ftl = at(front, top, left);
        for (int64_t n = 0; n < columns; ++n, ++to) {
          const uint32_t inside = bbr[n] - bbl[n] - btr[n] + btl[n] - fbr[n] + fbl[n] +
                                  ftr[n] - ftl[n];
          *to = static_cast<int32_t>(static_cast<uint32_t>(*to) - (all[n] - inside));
        }
      }
  return base;
}

// An upper bound on the number of classes of positions along an axis.
int64_t MostClasses(const Axis& axis) {
  return std::min(axis.out, Times(2, axis.window) + 1);
}

// A group of output channels: its job without the buffers, and what the job points to.
template <class Element>
struct Group {
  Job<Element> job;
  Constants<Element> constants;
  std::vector<int32_t> base;
  std::vector<Element, Lines<Element>> panels;

  Group(const Job<Element>& of_all, const Target<Sum<Element>>& target, int64_t first,
        int64_t columns)
      : job(of_all), constants(job, target, first, columns) {}
};

template <class Element>
class Conv : public Operation {
 public:
  // `depth`: the elements of a pixel that a group reads; `channels`: the channels in them.
  Conv(const Geometry& g, int64_t groups, int64_t depth, int64_t channels,
       int64_t out_channels, const Target<Sum<Element>>& target, const Element* kernel)
      : Operation(OutShape<Element>(g, target.epilogue, out_channels)),
        g_(g), depth_(depth), channels_(channels), columns_(out_channels / groups),
        pixel_(Times(groups, depth)), target_(target), kernel_(kernel) {
    const int64_t padded = Times(g.padded_pixels(), pixel_);
    out.size();  // Throws on overflow.
    pixels = g.pixels();
    if (g.padded()) scratch = padded;
    const double taps = static_cast<double>(g.taps());
    work = taps * depth * WordsFor(columns_) * kPanel * groups * g.pixels();
    const int64_t wide = Times(Times(groups, WordsFor(columns_)), kPanel * 4);
    memory = Times(8, g.taps()) + Times(4, wide);
    if (kIsWords<Element>) {
      memory += Times(4, g.z.out) + Times(4, g.y.out) + Times(4, g.x.out);
      const int64_t classes = Times(Times(MostClasses(g.z), MostClasses(g.y)),
                                    MostClasses(g.x));
      memory += Times(classes, wide);
      if (g.padded()) {  // the tables of `Base`, of one group
        const int64_t corners =
            Times(Times(g.z.window + 1, g.y.window + 1), g.x.window + 1);
        memory += Times(2, Times(corners, wide / groups));
      }
    }
    memory += Times(Times(g.taps(), depth), wide);
  }

  void Prepare() override {
    const Geometry& g = g_;
    Job<Element> job = {};
    offsets_ = Segments(g, pixel_, depth_, job.length);
    job.pixel_stride = pixel_;
    job.row_stride = g.x.padded * pixel_;
    job.plane_stride = g.y.padded * job.row_stride;
    job.image_stride = g.z.padded * job.plane_stride;
    job.out_depth = g.z.out, job.out_height = g.y.out, job.out_width = g.x.out;
    job.stride_depth = g.z.stride;
    job.stride_height = g.y.stride, job.stride_width = g.x.stride;
    job.offsets = offsets_.data();
    job.segments = static_cast<int64_t>(offsets_.size());
    job.out_stride = out.depth;
    if constexpr (kIsWords<Element>) {
      z_ = Classes(g.z), y_ = Classes(g.y), x_ = Classes(g.x);
      job.class_z = z_.of.data();
      job.class_y = y_.of.data();
      job.class_x = x_.of.data();
      job.classes_y = static_cast<int64_t>(y_.inside.size());
      job.classes_x = static_cast<int64_t>(x_.inside.size());
    }
    for (int64_t group = 0; group < pixel_ / depth_; ++group) {
      groups_.emplace_back(job, target_, group * columns_, columns_);
      LayOut(groups_.back(), group);
    }
  }

  void Run(const Call& call) const override {
    const Element* x = static_cast<const Element*>(call.in[0]);
    if (g_.padded()) {
      Element* const padded = static_cast<Element*>(call.scratch);
      WritePadded(call.team, g_, pixel_, call.images, x, padded);
      x = padded;
    }
    const double groups = static_cast<double>(groups_.size());
    const bool bits = target_.epilogue == Epilogue::kThreshold;
    const int64_t each = bits ? columns_ / kPanel : columns_;
    for (size_t group = 0; group < groups_.size(); ++group) {
      Job<Element> job = groups_[group].job;
      job.image = x + group * depth_;
      // All elements have four bytes.
      job.out = static_cast<uint32_t*>(call.out) + group * each;
      RunJob(call.team, binary_, job, call.images * pixels, call.images * work / groups,
             group + 1 == groups_.size() ? call.tail : Tail());
    }
  }

 private:
  void LayOut(Group<Element>& group, int64_t index) const;

  const Geometry g_;
  const int64_t depth_, channels_, columns_, pixel_;
  const Target<Sum<Element>> target_;
  const Element* const kernel_;
  const Kernels& binary_ = Chosen();  // which `Prepare` lays kernels of signs out for
  std::vector<int64_t> offsets_;
  Classes z_, y_, x_;  // Words only.
  std::deque<Group<Element>> groups_;  // A deque: jobs point into its elements.
};

template <>
void Conv<uint32_t>::LayOut(Group<uint32_t>& group, int64_t index) const {
  const int64_t panels = WordsFor(columns_);
  Job<uint32_t>& job = group.job;
  const int64_t words = job.segments * job.length;
  job.kernel = kernel_ + index * panels * words * kPanel;
  group.base = Base(g_, z_, y_, x_, job.kernel, panels, depth_, channels_);
  job.base = group.base.data();
  if (binary_.lay_out == nullptr || panels < 2) return;
  group.panels.resize(panels * words * kPanel);
  binary_.lay_out(job.kernel, panels, words, group.panels.data());
  job.kernel = group.panels.data();
}

// Lays out the columns of the kernel in panels.
template <>
void Conv<float>::LayOut(Group<float>& group, int64_t index) const {
  Job<float>& job = group.job;
  const int64_t panels = WordsFor(columns_), rows = job.segments * job.length;
  const int64_t all = columns_ * (pixel_ / depth_);
  group.panels.resize(panels * rows * kPanel);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t width = std::min<int64_t>(columns_ - p * kPanel, kPanel);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(group.panels.data() + (p * rows + r) * kPanel,
                  kernel_ + r * all + index * columns_ + p * kPanel,
                  width * sizeof(float));
  }
  job.kernel = group.panels.data();
}

void CheckChannels(int64_t groups, int64_t channels, int64_t out_channels,
                   Epilogue epilogue) {
  const auto in_range = [](int64_t size) { return size >= 1 && size <= kLargest; };
  Require(in_range(channels) && in_range(out_channels) && in_range(groups) &&
              out_channels % groups == 0,
          "the channels are out of range or do not divide into the groups");
  Require(epilogue != Epilogue::kThreshold || groups == 1 ||
              out_channels / groups % kPanel == 0,
          "thresholds need groups of a multiple of 32 channels");
}

}  // namespace

std::unique_ptr<Operation> MakeConv(const Geometry& g, int64_t groups, int64_t channels,
                                    int64_t out_channels, const Target<int32_t>& target,
                                    const uint32_t* kernel) {
  CheckChannels(groups, channels, out_channels, target.epilogue);
  Require(Times(g.taps(), channels) <= kLargest / 2,
          "the window has too many weights for sums of 32 bits");
  return std::make_unique<Conv<uint32_t>>(g, groups, WordsFor(channels), channels,
                                          out_channels, target, kernel);
}

std::unique_ptr<Operation> MakeRealConv(const Geometry& g, int64_t groups,
                                        int64_t channels, int64_t out_channels,
                                        const Target<float>& target,
                                        const float* kernel) {
  CheckChannels(groups, channels, out_channels, target.epilogue);
  return std::make_unique<Conv<float>>(g, groups, channels, channels, out_channels,
                                       target, kernel);
}

}  // namespace xnor
