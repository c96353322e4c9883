// Per-channel sums over all pixels, for BatchNorm and biases.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "check.h"
#include "handler.h"
#include "kernels.h"
#include "select.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {
namespace {

constexpr int64_t kElements = 16384;  // elements per task, about
constexpr int64_t kLeast = 64;        // rows per task, so that the tasks' sums are few
constexpr int64_t kNarrow = 128;      // channels
constexpr int64_t kLanes = 16;        // of the widest vectors
constexpr double kOnce = 4;  // the cost of reading an element once, in multiplications

using Floats = ffi::Buffer<ffi::F32>;

// `a` and `x`: `[..., channels]`; out: the sums of `a`, then of `a * (x - center)`.
void Run(ffi::ThreadPool& pool, Floats& a, Floats& x, Floats& center, Floats& out) {
  const auto d = a.dimensions(), e = x.dimensions(), c = center.dimensions(),
             o = out.dimensions();
  Require(d.size() >= 1 && d.size() == e.size() && std::equal(d.begin(), d.end(), e.begin()),
          "expected two arrays of one shape");
  const int64_t channels = d[d.size() - 1];
  int64_t rows = 1;
  for (size_t i = 0; i < d.size(); ++i) {
    Require(d[i] >= 1 && d[i] <= kLargest, "a size is out of range");
    if (i + 1 < d.size()) rows = Times(rows, d[i]);
  }
  Times(rows, channels);  // Throws on overflow.
  Require(c.size() == 1 && c[0] == channels, "expected a center for each channel");
  Require(o.size() == 2 && o[0] == 2 && o[1] == channels,
          "expected two sums for each channel");

  // Few channels do not fill the vectors, so `side` rows are summed as one wide row.
  const int64_t side = channels < kNarrow ? kLanes / std::gcd(channels, kLanes) : 1;
  const int64_t wide = side * channels, whole = rows / side, size = 2 * wide;
  std::vector<float> centers(wide);
  for (int64_t i = 0; i < wide; ++i) centers[i] = center.typed_data()[i % channels];

  // Each task's range is fixed, so the result does not depend on the number of threads.
  const int64_t each = std::max(kElements / wide, kLeast);
  const int64_t tasks = (whole + each - 1) / each;
  std::vector<float> parts(tasks * size), rest(2 * channels);
  const double work = kOnce * static_cast<double>(rows) * channels;
  PoolTeam team(pool, work);
  team.For(tasks, [&](int64_t task) {
    const int64_t first = task * each, at = first * wide;
    Chosen().channel_sums(a.typed_data() + at, x.typed_data() + at, centers.data(),
                                std::min(each, whole - first), wide,
                                parts.data() + task * size);
  });
  const int64_t at = whole * wide;
  Chosen().channel_sums(a.typed_data() + at, x.typed_data() + at, centers.data(),
                              rows - whole * side, channels, rest.data());

  std::vector<double> sums(rest.begin(), rest.end());
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < size; ++i)
      sums[i / wide * channels + i % channels] += parts[task * size + i];
  std::copy(sums.begin(), sums.end(), out.typed_data());
}

ffi::Error Handler(ffi::ThreadPool pool, Floats a, Floats x, Floats center,
                   ffi::Result<Floats> out) {
  return Answer([&] { Run(pool, a, x, center, *out); });
}

}  // namespace
}  // namespace xnor

XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_channel_sums, xnor::Handler,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Arg<::xla::ffi::Buffer<::xla::ffi::F32>>()
                                  .Arg<::xla::ffi::Buffer<::xla::ffi::F32>>()
                                  .Arg<::xla::ffi::Buffer<::xla::ffi::F32>>()
                                  .Ret<::xla::ffi::Buffer<::xla::ffi::F32>>());
