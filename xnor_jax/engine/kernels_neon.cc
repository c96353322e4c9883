// NEON, which every 64-bit Arm processor has.
#include <arm_neon.h>

#include <cfloat>
#include <cstdint>

namespace xnor {
namespace {

struct Words {
  using Vector = uint32x4_t;
  // A byte counts up to 8 bits per word: the counts of 31 words stay below 256.
  static constexpr int kLanes = 4, kRows = 2, kFlush = 31, kPairRows = 0;
  static Vector Load(const uint32_t* p) { return vld1q_u32(p); }
  static Vector Broadcast(uint32_t word) { return vdupq_n_u32(word); }
  static Vector Zero() { return vdupq_n_u32(0); }
  static Vector Xor(Vector a, Vector b) { return veorq_u32(a, b); }
  static Vector Count(Vector acc, Vector bits) {
    const uint8x16_t ones = vcntq_u8(vreinterpretq_u8_u32(bits));
    return vreinterpretq_u32_u8(vaddq_u8(vreinterpretq_u8_u32(acc), ones));
  }
  static Vector Widen(Vector acc) {
    return vpaddlq_u16(vpaddlq_u8(vreinterpretq_u8_u32(acc)));
  }
  static Vector Add(Vector a, Vector b) { return vaddq_u32(a, b); }
  static Vector LessTwice(Vector a, Vector b) {
    return vsubq_u32(a, vaddq_u32(b, b));
  }
  static void Store(int32_t* p, Vector v) { vst1q_s32(p, vreinterpretq_s32_u32(v)); }
};

struct Floats {
  using Vector = float32x4_t;
  static constexpr int kLanes = 4, kRows = 2, kGradientRows = 2;
  static Vector Load(const float* p) { return vld1q_f32(p); }
  static Vector Broadcast(float x) { return vdupq_n_f32(x); }
  static Vector Zero() { return vdupq_n_f32(0); }
  static Vector MultiplyAdd(Vector a, Vector b, Vector acc) {
    return vfmaq_f32(acc, a, b);
  }
  static Vector Add(Vector a, Vector b) { return vaddq_f32(a, b); }
  // a where it is the larger or NaN, else b: the processor's own orders the zeros.
  static Vector Largest(Vector a, Vector b) {
    return vbslq_f32(vorrq_u32(vcgtq_f32(a, b), vmvnq_u32(vceqq_f32(a, a))), a, b);
  }
  static void Store(float* p, Vector v) { vst1q_f32(p, v); }
};

inline uint32_t Bits(uint32x4_t mask, int part) {
  const uint32x4_t bits = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(mask, bits)) << (4 * part);
}

inline uint32_t LessMask(const int32_t* a, const int32_t* b) {
  uint32_t mask = 0;
  for (int part = 0; part < 8; ++part)
    mask |= Bits(vcltq_s32(vld1q_s32(a + 4 * part), vld1q_s32(b + 4 * part)), part);
  return mask;
}

inline uint32_t LessMask(const float* a, const float* b) {
  uint32_t mask = 0;
  for (int part = 0; part < 8; ++part)
    mask |=
        Bits(vmvnq_u32(vcgeq_f32(vld1q_f32(a + 4 * part), vld1q_f32(b + 4 * part))), part);
  return mask;
}

inline uint32_t NegativeMask(const float* x) {
  const float32x4_t least = vdupq_n_f32(-FLT_MIN);
  uint32_t mask = 0;
  for (int part = 0; part < 8; ++part)
    mask |= Bits(vmvnq_u32(vcgtq_f32(vld1q_f32(x + 4 * part), least)), part);
  return mask;
}

}  // namespace
}  // namespace xnor

#include "kernels_impl.h"

namespace xnor {
const Kernels kNeon = {"neon", Convolve<uint32_t>, Convolve<float>, nullptr, CountTaps,
                     Pack, Unpack, AddProducts, ChannelSums, SumPool,
                     Norm, Reduce<Floats>, Combine<Floats>};
}  // namespace xnor
