// What the library's handlers share: how many threads a call is worth, and what becomes
// of what is thrown.
#ifndef XNOR_JAX_HANDLER_H_
#define XNOR_JAX_HANDLER_H_

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "check.h"
#include "xla/ffi/api/ffi.h"

namespace xnor {

namespace ffi = ::xla::ffi;

// Threads that come to help with so much work, in multiplications.
inline int64_t Helpers(ffi::ThreadPool& pool, double work) {
  constexpr double kForAThread = 1.5e6;  // about the time that waking one takes
  const double most = static_cast<double>(pool.num_threads()) - 1;
  return static_cast<int64_t>(std::max(0.0, std::min(most, work / kForAThread - 1)));
}

// What is thrown becomes XLA's error.
template <class Call>
ffi::Error Answer(const Call& call) {
  try {
    try {
      call();
      return ffi::Error::Success();
    } catch (const Refusal& refusal) {
      return ffi::Error::InvalidArgument("xnor_jax: " + refusal.message);
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "xnor_jax: out of memory");
    } catch (const std::exception& error) {
      return ffi::Error::Internal(std::string("xnor_jax: ") + error.what());
    }
  } catch (...) {  // No memory even for that text; this one needs none.
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
  }
}

}  // namespace xnor

#endif  // XNOR_JAX_HANDLER_H_
