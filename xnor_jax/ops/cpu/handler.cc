// What XLA calls: a chain of operations, each on what the one before gave. Every shape,
// number and size is checked here and where an operation is made, whoever calls: what
// does not fit is answered with an error before anything runs, and nothing is read or
// written outside the buffers that were given.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "handler.h"
#include "operation.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {
namespace {

// As in steps.py.
enum class Kind : int64_t {
  kConv,
  kRealConv,
  kPack,
  kPoolBits,
  kSumPool,
  kNorm,
  kMean,
  kFlatten,
  kFold,
  kPackFlags
};

// The same numbers as one pixel an image; of words only where they are one already.
class Flatten : public Operation {
 public:
  explicit Flatten(const Shape& in) : Operation({in.type, 1, 1, in.size()}) {
    Require(in.type != Type::kBytes, "expected floats, integers or words");
    Require(in.type != Type::kWords || in.pixels() == 1, "expected words of one pixel");
  }
  void Run(Team&, int64_t images, const void* in, void* to) const override {
    std::memcpy(to, in, images * out.size() * sizeof(float));
  }
};

std::unique_ptr<Operation> Make(const Shape& in, const Step& step, Arguments& args) {
  switch (static_cast<Kind>(step.kind)) {
    case Kind::kConv: return MakeConv(in, step, args);
    case Kind::kRealConv: return MakeRealConv(in, step, args);
    case Kind::kPack: return MakePack(in);
    case Kind::kPoolBits: return MakePoolBits(in, step, args);
    case Kind::kSumPool: return MakeSumPool(in, step, args);
    case Kind::kNorm: return MakeNorm(in, args);
    case Kind::kMean: return MakeMean(in);
    case Kind::kFlatten: return std::make_unique<Flatten>(in);
    case Kind::kFold: return MakeFold(in, step);
    case Kind::kPackFlags: return MakePackFlags(in, step);
  }
  throw Refusal("there is no such operation");
}

struct Batch {
  int64_t images;
  Shape shape;  // of one of them
  char* data;

  explicit Batch(ffi::AnyBuffer& buffer)
      : data(static_cast<char*>(buffer.untyped_data())) {
    const auto d = buffer.dimensions();
    Require(d.size() == 4, "expected a batch of shape [images, height, width, depth]");
    for (int64_t n : d) Require(n >= 1 && n <= kLargest, "a size is out of range");
    images = d[0];
    shape = {TypeOf(buffer.element_type()), d[1], d[2], d[3]};
    Times(images, shape.size());  // Fits into 64 bits.
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

// Operations, each on what the one before gives.
class Chain {
 public:
  Chain(const Batch& x, ffi::Span<const int64_t> numbers, Arguments args) {
    const int64_t count = static_cast<int64_t>(numbers.size()) / kStepNumbers;
    Require(count >= 1 && numbers.size() % kStepNumbers == 0,
            "expected a number of whole steps");
    Shape shape = x.shape;
    for (int64_t i = 0; i < count; ++i) {
      Step step;
      std::memcpy(&step, numbers.begin() + i * kStepNumbers, sizeof(step));
      operations_.push_back(Make(shape, step, args));
      shape = operations_.back()->out;
      Require(shape.depth >= 1 && shape.depth <= kLargest, "a size is out of range");
      const int64_t size = shape.size();
      Times(x.images, size);  // Fits into 64 bits.
      largest = std::max(largest, operations_.back()->scratch);
      if (i + 1 < count) largest = std::max(largest, size);
      work += operations_.back()->work;
      loops += operations_.back()->loops;
    }
    Require(args.AllTaken(), "expected fewer kernels and constants");
  }

  const Shape& out() const { return operations_.back()->out; }

  void Prepare() {
    for (auto& operation : operations_) operation->Prepare();
  }

  void Run(Team& team, int64_t images, const void* x, void* y) const {
    std::unique_ptr<uint32_t[]> before, after;
    for (const auto& operation : operations_) {
      const bool last = operation == operations_.back();
      if (!last) after.reset(new uint32_t[images * operation->out.size()]);
      operation->Run(team, images, x, last ? y : static_cast<void*>(after.get()));
      before = std::move(after);
      x = before.get();
    }
  }

  int64_t largest = 0;  // elements between two operations or within one, of an image
  double work = 0;      // an image's
  int64_t loops = 0;

 private:
  std::vector<std::unique_ptr<Operation>> operations_;
};

// How many images go through the whole chain together: as many as about stay in a core's
// second-level cache, but enough chunks for all threads; or all, step by step.
int64_t ChunkOf(int64_t images, int64_t elements, int64_t threads) {
  constexpr int64_t kCached = 1 << 17;  // elements: 512 KiB
  if (elements == 0) return images;
  // What no cache holds is not to be there for all images at once either.
  if (elements > kCached) return images < threads ? images : 1;
  const int64_t cached = std::max<int64_t>(1, kCached / elements);
  const int64_t shared = threads < 2 ? images : images / (4 * threads);
  return shared < 1 ? images : std::min(cached, shared);
}

void Run(ffi::ThreadPool& pool, ffi::AnyBuffer& in, Arguments args, ffi::AnyBuffer& out,
         ffi::Span<const int64_t> numbers) {
  const Batch x(in), y(out);
  Chain chain(x, numbers, args);
  Require(y.images == x.images && y.shape == chain.out(),
          "the result has not the shape that the steps give");
  chain.Prepare();
  const int64_t helpers = Helpers(pool, static_cast<double>(x.images) * chain.work);
  const int64_t chunk = ChunkOf(x.images, chain.largest, helpers + 1);
  Team team(pool, helpers, chunk == x.images ? chain.loops : 1);
  if (chunk == x.images) {
    chain.Run(team, x.images, x.data, y.data);
    return;
  }
  team.For((x.images + chunk - 1) / chunk, [&](int64_t task) {
    const int64_t first = task * chunk;
    Team alone(pool, 0, 0);
    chain.Run(alone, std::min(chunk, x.images - first), x.image(first), y.image(first));
  });
}

ffi::Error Handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs args,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Span<const int64_t> steps) {
  return Answer([&] { Run(pool, x, Arguments(args), *y, steps); });
}

}  // namespace
}  // namespace xnor

XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_run, xnor::Handler,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<::xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<::xla::ffi::AnyBuffer>()
                                  .Attr<::xla::ffi::Span<const int64_t>>("steps"));
