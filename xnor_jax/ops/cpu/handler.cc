// What XLA calls: a chain of operations, each on what the one before gave. Every shape,
// number and size is checked here and where an operation is made, whoever calls: what
// does not fit is answered with an error before anything runs, and nothing is read or
// written outside the buffers that were given.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "operation.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {
namespace {

// As in xnor_jax/ops/cpu/__init__.py.
enum class Kind : int64_t { kConv, kRealConv, kPack, kPoolBits, kSumPool, kNorm, kMean, kFlatten };

// The same numbers as one pixel an image; of words only where they are one already.
class Flatten : public Operation {
 public:
  explicit Flatten(const Shape& in)
      : Operation({in.type, in.images, 1, 1, in.size() / in.images}) {
    Require(in.type != Type::kWords || in.height * in.width == 1,
            "expected words of one pixel");
  }
  void Run(Team&, const void* in, void* to) const override {
    std::memcpy(to, in, out.size() * sizeof(float));
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
  }
  throw Refusal("there is no such operation");
}

Shape ShapeOf(const ffi::AnyBuffer& buffer) {
  const auto d = buffer.dimensions();
  Require(d.size() == 4, "expected a batch of shape [images, height, width, depth]");
  for (int64_t size : d) Require(size >= 1 && size <= kLargest, "a size is out of range");
  Shape shape = {Type::kFloats, d[0], d[1], d[2], d[3]};
  shape.size();  // Fits into 64 bits.
  switch (buffer.element_type()) {
    case ffi::F32: return shape;
    case ffi::S32: shape.type = Type::kIntegers; return shape;
    case ffi::U32: shape.type = Type::kWords; return shape;
    default: throw Refusal("expected float32, int32 or uint32");
  }
}

// Operations, each on what the one before gives, for so many images.
class Chain {
 public:
  Chain(Shape shape, ffi::Span<const int64_t> numbers, Arguments args) {
    const int64_t count = static_cast<int64_t>(numbers.size()) / kStepNumbers;
    Require(count >= 1 && numbers.size() % kStepNumbers == 0,
            "expected a number of whole steps");
    for (int64_t i = 0; i < count; ++i) {
      Step step;
      std::memcpy(&step, numbers.begin() + i * kStepNumbers, sizeof(step));
      operations_.push_back(Make(shape, step, args));
      shape = operations_.back()->out;
      Require(shape.depth >= 1 && shape.depth <= kLargest, "a size is out of range");
      if (i + 1 < count) largest = std::max(largest, shape.size());
      work += operations_.back()->work;
      loops += operations_.back()->loops;
    }
    Require(args.AllTaken(), "expected fewer kernels and constants");
  }

  const Shape& out() const { return operations_.back()->out; }

  void Prepare() {
    for (auto& operation : operations_) operation->Prepare();
  }

  // Every element is four bytes long, whatever it is.
  void Run(Team& team, const uint32_t* x, uint32_t* y) const {
    std::unique_ptr<uint32_t[]> before, after;
    for (const auto& operation : operations_) {
      const bool last = operation == operations_.back();
      if (!last) after.reset(new uint32_t[operation->out.size()]);
      operation->Run(team, x, last ? y : after.get());
      before = std::move(after);
      x = before.get();
    }
  }

  double work = 0;
  int64_t loops = 0;
  int64_t largest = 0;  // elements between two operations

 private:
  std::vector<std::unique_ptr<Operation>> operations_;
};

// How many images go through the whole chain together: as many as stay in a core's
// second-level cache, but enough chunks for all threads; or all, step by step.
int64_t ChunkOf(int64_t images, int64_t elements, int64_t threads) {
  constexpr int64_t kCached = 1 << 17;  // elements: 512 KiB
  if (elements == 0) return images;
  const int64_t cached = std::max<int64_t>(1, kCached / elements);
  const int64_t shared = threads < 2 ? images : images / (4 * threads);
  return shared < 1 ? images : std::min(cached, shared);
}

void Run(ffi::ThreadPool& pool, ffi::AnyBuffer& x, Arguments args, ffi::AnyBuffer& y,
         ffi::Span<const int64_t> numbers) {
  constexpr double kForAThread = 1.5e6;  // work: about the time that waking one takes
  const Shape in = ShapeOf(x);
  Chain all(in, numbers, args);
  Require(ShapeOf(y) == all.out(), "the result has not the shape that the steps give");
  const uint32_t* from = static_cast<const uint32_t*>(x.untyped_data());
  uint32_t* to = static_cast<uint32_t*>(y.untyped_data());

  const double most = static_cast<double>(pool.num_threads()) - 1;
  const int64_t helpers =
      static_cast<int64_t>(std::min(most, all.work / kForAThread - 1));
  const int64_t chunk =
      ChunkOf(in.images, all.largest / in.images, std::max<int64_t>(helpers, 0) + 1);
  if (chunk == in.images) {
    Team team(pool, helpers, all.loops);
    all.Prepare();
    all.Run(team, from, to);
    return;
  }
  const auto of = [&](int64_t images) {
    Shape shape = in;
    shape.images = images;
    return Chain(shape, numbers, args);
  };
  Team team(pool, helpers, 1);
  Chain whole = of(chunk), rest = of(in.images % chunk ? in.images % chunk : chunk);
  whole.Prepare();
  if (in.images % chunk) rest.Prepare();
  const int64_t image = in.size() / in.images, result = all.out().size() / in.images;
  team.For((in.images + chunk - 1) / chunk, [&](int64_t task) {
    const int64_t first = task * chunk;
    Team alone(pool, 0, 0);
    (first + chunk <= in.images ? whole : rest)
        .Run(alone, from + first * image, to + first * result);
  });
}

// What is thrown becomes XLA's error.
ffi::Error Handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs args,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Span<const int64_t> steps) {
  try {
    Run(pool, x, Arguments(args), *y, steps);
    return ffi::Error::Success();
  } catch (const Refusal& refusal) {
    return ffi::Error::InvalidArgument("xnor_jax: " + refusal.message);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "xnor_jax: out of memory");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("xnor_jax: ") + error.what());
  }
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
