// Checks: a failed one throws a Refusal with a one-line message, before anything runs.
#ifndef XNOR_CHECK_H_
#define XNOR_CHECK_H_

#include <cstdint>
#include <exception>
#include <limits>
#include <string>
#include <utility>

namespace xnor {

// The limit on sizes, strides and channels: a product of two fits into 64 bits.
constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();

struct Refusal : std::exception {
  std::string message;
  explicit Refusal(std::string text) : message(std::move(text)) {}
  const char* what() const noexcept override { return message.c_str(); }
};

inline void Require(bool holds, const char* message) {
  if (!holds) throw Refusal(message);
}
inline void Require(bool holds, const std::string& message) {
  if (!holds) throw Refusal(message);
}

inline int64_t Times(int64_t a, int64_t b) {
  int64_t product;
  Require(!__builtin_mul_overflow(a, b, &product), "a size overflows 64 bits");
  return product;
}

}  // namespace xnor

#endif  // XNOR_CHECK_H_
