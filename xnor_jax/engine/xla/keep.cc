// The identity, opaque to XLA, which therefore does not compute its argument twice.
#include <cstring>

#include "check.h"
#include "handler.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {
namespace {

void Run(ffi::AnyBuffer& x, ffi::AnyBuffer& out) {
  Require(x.size_bytes() == out.size_bytes(), "expected a result of the array's size");
  // XLA usually aliases the two buffers.
  if (x.untyped_data() != out.untyped_data())
    std::memcpy(out.untyped_data(), x.untyped_data(), x.size_bytes());
}

ffi::Error Handler(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out) {
  return Answer([&] { Run(x, *out); });
}

}  // namespace
}  // namespace xnor

XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_keep, xnor::Handler,
                              ::xla::ffi::Ffi::Bind()
                                  .Arg<::xla::ffi::AnyBuffer>()
                                  .Ret<::xla::ffi::AnyBuffer>());
