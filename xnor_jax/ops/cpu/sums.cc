// Sums over all pixels, channel by channel: what BatchNorm and biases ask for.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "engine.h"
#include "handler.h"
#include "select.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {
namespace {

constexpr int64_t kElements = 16384;  // a task's, about
constexpr int64_t kLeast = 64;        // rows, so that the tasks' sums are few
constexpr double kOnce = 4;  // multiplications in the time of an element read once

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
  Times(rows, channels);  // Fits into 64 bits.
  Require(c.size() == 1 && c[0] == channels, "expected a center for each channel");
  Require(o.size() == 2 && o[0] == 2 && o[1] == channels,
          "expected two sums for each channel");

  // What a task sums does not hang on the number of threads, and so no result does.
  const int64_t each = std::max(kElements / channels, kLeast);
  const int64_t tasks = (rows + each - 1) / each, size = 2 * channels;
  std::vector<float> parts(tasks * size);
  const double work = kOnce * static_cast<double>(rows) * channels;
  Team team(pool, Helpers(pool, work), 1);
  team.For(tasks, [&](int64_t task) {
    const int64_t first = task * each, at = first * channels;
    ChosenEngine().channel_sums(a.typed_data() + at, x.typed_data() + at,
                                center.typed_data(), std::min(each, rows - first),
                                channels, parts.data() + task * size);
  });
  std::vector<double> sums(size);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < size; ++i) sums[i] += parts[task * size + i];
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
