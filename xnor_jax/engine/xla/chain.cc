// The XLA custom call that runs a chain of operations, each on the result of the one
// before. Every shape, number and size is checked, here and where an operation is made: an
// invalid call returns an error before anything runs, and nothing outside the given
// buffers is read or written.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "handler.h"
#include "operation_numbers.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {
namespace {

// As `_Kind` in ops/cpu/operations.py.
enum class Kind : int64_t { kConv, kRealConv, kPack, kSumPool, kCol2Im, kPackFlags };

// The buffers of kernels and constants, in the order of the operations.
class Arguments {
 public:
  explicit Arguments(ffi::RemainingArgs args) : args_(args) {}

  template <ffi::DataType type>
  ffi::Buffer<type> Next() {
    Require(next_ < args_.size(), "a kernel or a constant is missing");
    auto buffer = args_.get<ffi::Buffer<type>>(next_++);
    Require(buffer.has_value(), "a kernel or a constant has the wrong type");
    return *buffer;
  }
  // The elements of the next buffer, a vector of this size.
  template <ffi::DataType type>
  const auto* Vector(int64_t size) {
    const ffi::Buffer<type> buffer = Next<type>();
    Require(buffer.dimensions().size() == 1 && buffer.dimensions()[0] == size,
            "a constant does not have an entry for each channel");
    return buffer.typed_data();
  }
  bool AllTaken() const { return next_ == args_.size(); }

 private:
  ffi::RemainingArgs args_;
  size_t next_ = 0;
};

template <class Sum>
Target<Sum> TakeTarget(const OperationNumbers& numbers, int64_t channels,
                       Arguments& args) {
  Require(numbers.epilogue >= 0 && numbers.epilogue <= 2, "unknown epilogue");
  Require(channels >= 1 && channels <= kLargest,
          "the channels are out of range or do not divide into the groups");
  Target<Sum> target;
  target.epilogue = static_cast<Epilogue>(numbers.epilogue);
  target.relu = numbers.relu != 0;
  if (target.epilogue == Epilogue::kAffine) {
    target.scale = args.Vector<ffi::F32>(channels);
    target.bias = args.Vector<ffi::F32>(channels);
  } else if (target.epilogue == Epilogue::kThreshold) {
    constexpr bool kWhole = std::is_same_v<Sum, int32_t>;
    target.threshold = args.Vector<kWhole ? ffi::S32 : ffi::F32>(channels);
    target.flip = args.Vector<ffi::U32>(WordsFor(channels));
  }
  return target;
}

std::unique_ptr<Operation> TakeConv(const Shape& in, const OperationNumbers& numbers,
                                    Arguments& args) {
  Require(in.type == Type::kWords, "expected words of signs");
  const ffi::Buffer<ffi::U32> kernel = args.Next<ffi::U32>();
  const auto k = kernel.dimensions();
  Require(k.size() == 6, "expected a kernel of shape [groups, panels, kh, kw, words, 32]");
  const int64_t window[] = {k[2], k[3]};
  const Geometry g = GeometryOf(in.height, in.width, window, numbers.strides,
                                numbers.padding, numbers.dilation);
  const Target<int32_t> target =
      TakeTarget<int32_t>(numbers, numbers.out_channels, args);
  auto conv = MakeConv(g, k[0], numbers.channels, numbers.out_channels, target,
                       kernel.typed_data());
  const int64_t words = WordsFor(numbers.channels);
  Require(k[1] == WordsFor(numbers.out_channels / k[0]) && k[4] == words &&
              k[5] == kPanel,
          "the kernel's shape does not match its channels");
  Require(in.depth == Times(k[0], words),
          "the input's words do not match the channels");
  return conv;
}

std::unique_ptr<Operation> TakeRealConv(const Shape& in, const OperationNumbers& numbers,
                                        Arguments& args) {
  Require(in.type == Type::kFloats, "expected floats");
  const ffi::Buffer<ffi::F32> kernel = args.Next<ffi::F32>();
  const auto k = kernel.dimensions();
  Require(k.size() == 4, "expected a kernel of shape [kh, kw, C, C_out]");
  const int64_t window[] = {k[0], k[1]};
  const Geometry g = GeometryOf(in.height, in.width, window, numbers.strides,
                                numbers.padding, numbers.dilation);
  Require(k[2] == in.depth, "the input's channels do not match the kernel's");
  const Target<float> target = TakeTarget<float>(numbers, k[3], args);
  return MakeRealConv(g, 1, k[2], k[3], target, kernel.typed_data());
}

std::unique_ptr<Operation> TakeSumPool(const Shape& in, const OperationNumbers& numbers,
                                       Arguments& args) {
  Require(in.type == Type::kFloats, "expected floats");
  const int64_t ones[] = {1, 1};
  const Geometry g = GeometryOf(in.height, in.width, numbers.window, numbers.strides,
                                numbers.padding, ones);
  const float* threshold = args.Vector<ffi::F32>(in.depth);
  return MakeSumPool(g, in.depth, threshold, args.Vector<ffi::U32>(WordsFor(in.depth)));
}

std::unique_ptr<Operation> Make(const Shape& in, const OperationNumbers& numbers,
                                Arguments& args) {
  switch (static_cast<Kind>(numbers.kind)) {
    case Kind::kConv: return TakeConv(in, numbers, args);
    case Kind::kRealConv: return TakeRealConv(in, numbers, args);
    case Kind::kPack: return MakePack(in);
    case Kind::kSumPool: return TakeSumPool(in, numbers, args);
    case Kind::kCol2Im: return MakeCol2Im(in, numbers);
    case Kind::kPackFlags: return MakePackFlags(in, numbers);
  }
  throw Refusal("unknown operation");
}

struct Batch {
  int64_t images;
  Shape shape;  // of one image
  char* data;

  explicit Batch(ffi::AnyBuffer& buffer)
      : data(static_cast<char*>(buffer.untyped_data())) {
    const auto d = buffer.dimensions();
    Require(d.size() == 4, "expected a batch of shape [images, height, width, depth]");
    for (int64_t n : d) Require(n >= 1 && n <= kLargest, "a size is out of range");
    images = d[0];
    shape = {TypeOf(buffer.element_type()), d[1], d[2], d[3]};
    Times(images, shape.size());  // Throws on overflow.
  }
  char* image(int64_t n) const { return data + n * shape.size() * BytesOf(shape.type); }

 private:
  static Type TypeOf(ffi::DataType type) {
    if (type == ffi::F32) return Type::kFloats;
    if (type == ffi::S32) return Type::kIntegers;
    if (type == ffi::U8) return Type::kBytes;
    Require(type == ffi::U32, "expected float32, int32, uint32 or uint8");
    return Type::kWords;
  }
};

// Operations, each on the result of the one before.
class Chain {
 public:
  Chain(const Batch& x, ffi::Span<const int64_t> numbers, Arguments args) {
    const int64_t count = static_cast<int64_t>(numbers.size()) / kOperationNumbers;
    Require(count >= 1 && numbers.size() % kOperationNumbers == 0,
            "expected one or more whole operations");
    Shape shape = x.shape;
    for (int64_t i = 0; i < count; ++i) {
      OperationNumbers own;
      std::memcpy(&own, numbers.begin() + i * kOperationNumbers, sizeof(own));
      operations_.push_back(Make(shape, own, args));
      shape = operations_.back()->out;
      Require(shape.depth >= 1 && shape.depth <= kLargest, "a size is out of range");
      const int64_t size = shape.size();
      Times(x.images, size);  // Throws on overflow.
      scratch_ = std::max(scratch_, operations_.back()->scratch);
      if (i + 1 < count) between_ = std::max(between_, size);
      work += operations_.back()->work;
    }
    Times(x.images, Times(4, largest()));
    Require(args.AllTaken(), "expected fewer kernels and constants");
  }

  const Shape& out() const { return operations_.back()->out; }
  // The largest buffer between two operations or within one, in elements per image.
  int64_t largest() const { return std::max(scratch_, between_); }

  void Prepare() {
    for (auto& operation : operations_) operation->Prepare();
  }

  void Run(Team& team, int64_t images, const void* x, void* y) const {
    const auto buffer = [&](int64_t size) {
      return std::unique_ptr<uint32_t[]>(size > 0 ? new uint32_t[images * size] : nullptr);
    };
    // The two buffers alternate as input and output.
    const std::unique_ptr<uint32_t[]> scratch = buffer(scratch_), even = buffer(between_),
                                      odd = buffer(operations_.size() > 2 ? between_ : 0);
    bool turn = false;
    for (const auto& operation : operations_) {
      const bool last = operation == operations_.back();
      void* to = last ? y : turn ? odd.get() : even.get();
      operation->Run({team, images, &x, to, scratch.get()});
      x = to;
      turn = !turn;
    }
  }

  double work = 0;  // per image

 private:
  int64_t scratch_ = 0, between_ = 0;
  std::vector<std::unique_ptr<Operation>> operations_;
};

void Run(ffi::ThreadPool& pool, ffi::AnyBuffer& in, Arguments args, ffi::AnyBuffer& out,
         ffi::Span<const int64_t> numbers) {
  const Batch x(in), y(out);
  Chain chain(x, numbers, args);
  Require(y.images == x.images && y.shape == chain.out(),
          "the result does not have the shape that the operations give");
  chain.Prepare();
  PoolTeam team(pool, static_cast<double>(x.images) * chain.work);
  const int64_t chunk = ChunkOf(x.images, chain.largest(), team.threads());
  if (chunk == x.images) {
    chain.Run(team, x.images, x.data, y.data);
    return;
  }
  team.For((x.images + chunk - 1) / chunk, [&](int64_t task) {
    const int64_t first = task * chunk;
    Team alone;
    chain.Run(alone, std::min(chunk, x.images - first), x.image(first), y.image(first));
  });
}

ffi::Error Handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs args,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Span<const int64_t> numbers) {
  return Answer([&] { Run(pool, x, Arguments(args), *y, numbers); });
}

}  // namespace
}  // namespace xnor

XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_run, xnor::Handler,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<::xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<::xla::ffi::AnyBuffer>()
                                  .Attr<::xla::ffi::Span<const int64_t>>("operations"));
