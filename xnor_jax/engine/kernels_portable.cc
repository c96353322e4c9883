// Plain C++, two words at a time in 64-bit integers.
#include <cfloat>
#include <cstdint>
#include <cstring>

namespace xnor {
namespace {

struct Words {
  using Vector = uint64_t;
  // A byte counts up to 8 bits per word: the counts of 31 words stay below 256.
  static constexpr int kLanes = 2, kRows = 1, kFlush = 31, kPairRows = 0;
  static Vector Load(const uint32_t* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static Vector Broadcast(uint32_t word) { return word * 0x100000001u; }
  static Vector Zero() { return 0; }
  static Vector Xor(Vector a, Vector b) { return a ^ b; }
  static Vector Count(Vector acc, Vector bits) {
    bits -= bits >> 1 & 0x5555555555555555u;
    bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
    return acc + ((bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu);
  }
  static Vector Widen(Vector acc) {
    acc = (acc & 0x00ff00ff00ff00ffu) + (acc >> 8 & 0x00ff00ff00ff00ffu);
    return (acc & 0x0000ffff0000ffffu) + (acc >> 16 & 0x0000ffff0000ffffu);
  }
  static Vector Add(Vector a, Vector b) { return a + b; }
  // Lane by lane: no borrow may pass between the two lanes.
  static Vector LessTwice(Vector a, Vector b) {
    const uint32_t low = static_cast<uint32_t>(a) - 2 * static_cast<uint32_t>(b);
    const uint32_t high =
        static_cast<uint32_t>(a >> 32) - 2 * static_cast<uint32_t>(b >> 32);
    return low | static_cast<Vector>(high) << 32;
  }
  static void Store(int32_t* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
};

struct Floats {
  using Vector = float;
  static constexpr int kLanes = 1, kRows = 1, kGradientRows = 1;
  static Vector Load(const float* p) { return *p; }
  static Vector Broadcast(float x) { return x; }
  static Vector Zero() { return 0; }
  static Vector MultiplyAdd(Vector a, Vector b, Vector acc) { return a * b + acc; }
  static void Store(float* p, Vector v) { *p = v; }
};

inline uint32_t LessMask(const int32_t* a, const int32_t* b) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(a[i] < b[i]) << i;
  return mask;
}

inline uint32_t LessMask(const float* a, const float* b) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(!(a[i] >= b[i])) << i;
  return mask;
}

inline uint32_t NegativeMask(const float* x) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(!(x[i] > -FLT_MIN)) << i;
  return mask;
}

}  // namespace
}  // namespace xnor

#include "kernels_impl.h"

namespace xnor {
const Kernels kPortable = {"portable", Convolve<uint32_t>, Convolve<float>, nullptr, CountTaps,
                     Pack, Unpack, AddProducts, ChannelSums, SumPool,
                     Norm, nullptr, nullptr};
}  // namespace xnor
