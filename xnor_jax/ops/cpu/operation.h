// One operation on images: checked when it is made, then made ready, then run.
#ifndef XNOR_JAX_OPERATION_H_
#define XNOR_JAX_OPERATION_H_

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "engine.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {

namespace ffi = ::xla::ffi;

// Bytes come in only: what an operation gives has elements of four bytes.
enum class Type { kFloats, kIntegers, kWords, kBytes };

inline int64_t BytesOf(Type type) { return type == Type::kBytes ? 1 : 4; }

// An image `[height, width, depth]`; words of signs: so many words a pixel.
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

// What Python says of an operation; xnor_jax/ops/cpu writes these numbers in this order.
// Of a fold, `channels` and `out_channels` are the image's height and width; of flags to
// pack, `channels` is how many.
struct Step {
  int64_t kind, epilogue, relu, channels, out_channels;
  int64_t window[2], strides[2], padding[4], dilation[2];
};
constexpr int64_t kStepNumbers = 15;
static_assert(sizeof(Step) == kStepNumbers * sizeof(int64_t));

// The buffers of kernels and constants, in the order in which the operations take them.
class Arguments {
 public:
  explicit Arguments(ffi::RemainingArgs args) : args_(args) {}

  template <ffi::DataType type>
  ffi::Buffer<type> Next() {
    Require(next_ < args_.size(), "a kernel or a constant is missing");
    auto buffer = args_.get<ffi::Buffer<type>>(next_++);
    Require(buffer.has_value(), "a kernel or a constant is of another type");
    return *buffer;
  }
  // The elements of a vector of this size.
  template <ffi::DataType type>
  const auto* Vector(int64_t size) {
    const ffi::Buffer<type> buffer = Next<type>();
    Require(buffer.dimensions().size() == 1 && buffer.dimensions()[0] == size,
            "a constant has not an entry for each channel");
    return buffer.typed_data();
  }
  bool AllTaken() const { return next_ == args_.size(); }

 private:
  ffi::RemainingArgs args_;
  size_t next_ = 0;
};

class Operation {
 public:
  explicit Operation(const Shape& out) : out(out) {}
  virtual ~Operation() = default;
  // Lays out kernels and constants as the engine wants them: once, before any `Run`.
  virtual void Prepare() {}
  // Runs on one image or more of the shape that it was made for.
  virtual void Run(Team& team, int64_t images, const void* in, void* to) const = 0;

  const Shape out;
  int64_t scratch = 0;  // elements that `Run` writes besides `out`, for an image
  double work = 0;    // an image's multiplications, of floats or of words of signs
  int64_t loops = 1;  // of `Run`, at most
};

std::unique_ptr<Operation> MakeConv(const Shape& in, const Step& step, Arguments& args);
std::unique_ptr<Operation> MakeRealConv(const Shape& in, const Step& step,
                                        Arguments& args);
std::unique_ptr<Operation> MakePack(const Shape& in);
std::unique_ptr<Operation> MakePackFlags(const Shape& in, const Step& step);
std::unique_ptr<Operation> MakePoolBits(const Shape& in, const Step& step,
                                        Arguments& args);
std::unique_ptr<Operation> MakeSumPool(const Shape& in, const Step& step,
                                       Arguments& args);
std::unique_ptr<Operation> MakeNorm(const Shape& in, Arguments& args);
std::unique_ptr<Operation> MakeMean(const Shape& in);
std::unique_ptr<Operation> MakeFold(const Shape& in, const Step& step);

// How many words hold the signs of these channels; also panels of so many columns.
inline int64_t WordsFor(int64_t channels) {
  return channels / kPanel + (channels % kPanel != 0);
}

// A vector of channels, filled up to whole words or panels.
template <class T>
std::vector<T> Padded(const T* values, int64_t count) {
  std::vector<T> padded(WordsFor(count) * kPanel);
  std::memcpy(padded.data(), values, count * sizeof(T));
  return padded;
}

}  // namespace xnor

#endif  // XNOR_JAX_OPERATION_H_
