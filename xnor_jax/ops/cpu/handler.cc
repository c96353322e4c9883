// What XLA calls: a chain of operations, each on what the one before gave. Every shape,
// number and size is checked here and where an operation is made, whoever calls: what
// does not fit is answered with an error before anything runs, and nothing is read or
// written outside the buffers that were given.
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

// Every element is four bytes long, whatever it is.
std::unique_ptr<uint32_t[]> Storage(const Shape& shape) {
  return std::unique_ptr<uint32_t[]>(new uint32_t[shape.size()]);
}

void Run(ffi::ThreadPool& pool, ffi::AnyBuffer& x, Arguments args, ffi::AnyBuffer& y,
         ffi::Span<const int64_t> numbers) {
  constexpr double kForAThread = 1.5e6;  // work: about the time that waking one takes
  const int64_t count = static_cast<int64_t>(numbers.size()) / kStepNumbers;
  Require(count >= 1 && numbers.size() % kStepNumbers == 0,
          "expected a number of whole steps");
  std::vector<std::unique_ptr<Operation>> operations;
  Shape shape = ShapeOf(x);
  double work = 0;
  int64_t loops = 0;
  for (int64_t i = 0; i < count; ++i) {
    Step step;
    std::memcpy(&step, numbers.begin() + i * kStepNumbers, sizeof(step));
    operations.push_back(Make(shape, step, args));
    shape = operations.back()->out;
    Require(shape.depth >= 1 && shape.depth <= kLargest, "a size is out of range");
    work += operations.back()->work;
    loops += operations.back()->loops;
  }
  Require(args.AllTaken(), "expected fewer kernels and constants");
  Require(ShapeOf(y) == shape, "the result has not the shape that the steps give");

  const double most = static_cast<double>(pool.num_threads()) - 1;
  const double helpers = work / kForAThread - 1;
  Team team(pool, static_cast<int64_t>(helpers < most ? helpers : most), loops);
  std::unique_ptr<uint32_t[]> before, after;
  const void* in = x.untyped_data();
  for (int64_t i = 0; i < count; ++i) {
    void* to = y.untyped_data();
    if (i + 1 < count) {
      after = Storage(operations[i]->out);
      to = after.get();
    }
    operations[i]->Run(team, in, to);
    before = std::move(after);
    in = before.get();
  }
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
