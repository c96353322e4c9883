// Operations on images: checked when made, prepared once, then run.
#ifndef XNOR_OPERATION_H_
#define XNOR_OPERATION_H_

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "check.h"
#include "geometry.h"
#include "kernels.h"
#include "team.h"

namespace xnor {

// Bytes are inputs only: results have elements of four bytes.
enum class Type { kFloats, kIntegers, kWords, kBytes };

inline int64_t BytesOf(Type type) { return type == Type::kBytes ? 1 : 4; }

// An image `[height, width, depth]`; for words of signs, `depth` is the words per pixel.
struct Shape {
  Type type;
  int64_t height, width, depth;

  int64_t pixels() const { return Times(height, width); }
  int64_t size() const { return Times(pixels(), depth); }
  bool operator==(const Shape& other) const {
    return type == other.type && height == other.height && width == other.width &&
           depth == other.depth;
  }
};

// What runs on each part of an operation's pixels as soon as it is written, while it is
// cached: the pixelwise operations that follow, if any.
class Tail {
 public:
  Tail() = default;
  // `task` is called as task(begin, end); `elements`: the most that one of the operations
  // reads or writes per pixel.
  template <class Task>
  Tail(const Task& task, int64_t elements)
      : elements_(static_cast<double>(elements)), task_(&task),
        run_([](const void* t, int64_t begin, int64_t end) {
          (*static_cast<const Task*>(t))(begin, end);
        }) {}
  bool empty() const { return run_ == nullptr; }
  double elements() const { return elements_; }
  void operator()(int64_t begin, int64_t end) const {
    if (run_ != nullptr) run_(task_, begin, end);
  }

 private:
  double elements_ = 0;
  const void* task_ = nullptr;
  void (*run_)(const void*, int64_t, int64_t) = nullptr;
};

// The arguments of a run; images are contiguous in every buffer.
struct Call {
  Team& team;
  int64_t images;
  const void* const* in;
  void* out;
  void* scratch;  // `Operation::scratch` elements per image
  Tail tail = {};

  const float* floats(int i = 0) const { return static_cast<const float*>(in[i]); }
  const uint32_t* words(int i = 0) const { return static_cast<const uint32_t*>(in[i]); }
};

class Operation {
 public:
  explicit Operation(const Shape& out) : out(out) {}
  virtual ~Operation() = default;
  // Lays out weights and constants for the kernels; called once, before any `Run`.
  virtual void Prepare() {}
  // Runs on one or more images of the shape that it was made for. Allocates nothing.
  virtual void Run(const Call& call) const = 0;
  // Runs on pixels [begin, end) of all images; only if `pixelwise`.
  virtual void RunPixels(const Call&, int64_t, int64_t) const {
    Require(false, "the operation is not pixelwise");
  }

  const Shape out;
  int64_t scratch = 0;  // elements per image that `Run` writes besides `out`
  int64_t memory = 0;   // bytes that `Prepare` allocates, at most
  double work = 0;      // multiplications per image, of floats or of words of signs
  // Pixels per image, if `Run` calls the tail for each part of them; else 0.
  int64_t pixels = 0;
  // Whether each pixel of the result depends only on the same pixel of the inputs.
  bool pixelwise = false;
  // Whether the result may overwrite an input of its size: whether each of its elements is
  // written after the same element of the inputs is read, and no other is read afterwards.
  bool in_place = false;
};

// The epilogue of a product's sums, int32_t of signs or float.
template <class Sum>
struct Target {
  Epilogue epilogue = Epilogue::kSums;
  // sum * scale + bias, or with `shift`: (sum + bias) * scale + shift
  const float *scale = nullptr, *bias = nullptr, *shift = nullptr;
  bool relu = false;
  const Sum* threshold = nullptr;
  const uint32_t* flip = nullptr;
};

// `Prepare` copies float kernels, thresholds, and the scale and bias of a `Target`; the
// other arrays must live as long as the operation. `MakeThreshold` copies nothing.

// Words [pixels, groups * words of a group's channels] times a kernel
// [groups, panels, *window, words, 32].
std::unique_ptr<Operation> MakeConv(const Geometry& g, int64_t groups, int64_t channels,
                                    int64_t out_channels, const Target<int32_t>& target,
                                    const uint32_t* kernel);
// Floats [pixels, groups * channels] times a kernel [*window, channels, out_channels].
std::unique_ptr<Operation> MakeRealConv(const Geometry& g, int64_t groups,
                                        int64_t channels, int64_t out_channels,
                                        const Target<float>& target, const float* kernel);
std::unique_ptr<Operation> MakePack(const Shape& in);
std::unique_ptr<Operation> MakePoolBits(const Geometry& g, int64_t words,
                                        const uint32_t* flip);
std::unique_ptr<Operation> MakeSumPool(const Geometry& g, int64_t channels,
                                       const float* threshold, const uint32_t* flip);
// The signs of floats [pixels, channels], compared with thresholds.
std::unique_ptr<Operation> MakeSign(int64_t pixels, int64_t channels,
                                    const float* threshold, const uint32_t* flip);
std::unique_ptr<Operation> MakeNorm(const Shape& in, const float* mean,
                                    const float* scale, const float* bias);
std::unique_ptr<Operation> MakeMean(const Shape& in);

// The number of words that hold `channels` signs; also of panels for that many columns.
inline int64_t WordsFor(int64_t channels) {
  return channels / kPanel + (channels % kPanel != 0);
}

// Allocates whole cache lines, which a vector of 64 bytes then never straddles.
template <class T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <class Other>
  Lines(const Lines<Other>&) {}
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kLine));
  }
  void deallocate(T* at, size_t) { ::operator delete(at, kLine); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
  static constexpr std::align_val_t kLine{64};
};

// A vector of channels, zero-padded to whole words or panels.
template <class T>
std::vector<T> Padded(const T* values, int64_t count) {
  std::vector<T> padded(WordsFor(count) * kPanel);
  std::memcpy(padded.data(), values, count * sizeof(T));
  return padded;
}

constexpr double kElements = 16384;  // elements per task, if there are enough
constexpr double kOnce = 8;  // the cost of reading an element once, in multiplications

// Calls run(begin, end) for parts of [0, count), whose items each read `elements` elements.
template <class Run>
void InParts(Team& team, int64_t count, double elements, const Run& run) {
  const int64_t each = static_cast<int64_t>(kElements / std::max(elements, 1.0)) + 1;
  team.For((count + each - 1) / each, [&](int64_t task) {
    run(task * each, std::min((task + 1) * each, count));
  });
}

// The same for all pixels of an operation, each part followed by the tail.
template <class Run>
void InParts(const Call& call, int64_t pixels, double elements, const Run& run) {
  InParts(call.team, pixels, std::max(elements, call.tail.elements()),
          [&](int64_t begin, int64_t end) {
            run(begin, end);
            call.tail(begin, end);
          });
}

class Pixelwise : public Operation {
 public:
  // `elements`: what a pixel reads.
  Pixelwise(const Shape& out, int64_t pixels_per_image, int64_t elements)
      : Operation(out), elements_(static_cast<double>(elements)) {
    work = kOnce * static_cast<double>(Times(pixels_per_image, elements));
    pixels = pixels_per_image;
    pixelwise = true;
  }
  void Run(const Call& call) const override {
    InParts(call, call.images * pixels, elements_,
            [&](int64_t begin, int64_t end) { RunPixels(call, begin, end); });
  }

 private:
  const double elements_;
};

// The number of helper threads for `work` multiplications.
inline int64_t Helpers(int64_t threads, double work) {
  constexpr double kForAThread = 1.5e6;  // about the time to wake one
  const double most = static_cast<double>(threads) - 1;
  return static_cast<int64_t>(std::max(0.0, std::min(most, work / kForAThread - 1)));
}

// How many images run through a network together: about as many as stay in a core's
// second-level cache, with enough chunks for all threads; or all, operation by operation.
// `elements`: an image's largest buffer between two operations or within one.
inline int64_t ChunkOf(int64_t images, int64_t elements, int64_t threads) {
  constexpr int64_t kCached = 1 << 17;  // elements: 512 KiB
  if (elements == 0) return images;
  // Larger than the cache: one image per thread at a time, which takes less memory.
  if (elements > kCached) return images < threads ? images : 1;
  const int64_t cached = std::max<int64_t>(1, kCached / elements);
  const int64_t shared = threads < 2 ? images : images / (4 * threads);
  return shared < 1 ? images : std::min(cached, shared);
}

}  // namespace xnor

#endif  // XNOR_OPERATION_H_
