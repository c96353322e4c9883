// AVX-512 with VPOPCNTDQ: Ice Lake, Zen 4 and newer.
#include <immintrin.h>

#include <cfloat>
#include <cstdint>

namespace xnor {
namespace {

struct Words {
  using Vector = __m512i;
  static constexpr int kLanes = 16, kRows = 8, kFlush = 0, kPairRows = 0;
  static Vector Load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Vector Broadcast(uint32_t word) {
    return _mm512_set1_epi32(static_cast<int>(word));
  }
  static Vector Zero() { return _mm512_setzero_si512(); }
  static Vector Xor(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
  static Vector Count(Vector acc, Vector bits) {
    acc = _mm512_add_epi32(acc, _mm512_popcnt_epi32(bits));
    // Keeps GCC from computing the counts of a whole block first and spilling them.
    asm volatile("" : "+v"(acc));
    return acc;
  }
  static Vector Widen(Vector acc) { return acc; }
  static Vector Add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
  static Vector LessTwice(Vector a, Vector b) {
    return _mm512_sub_epi32(a, _mm512_add_epi32(b, b));
  }
  static void Store(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
};

struct Floats {
  using Vector = __m512;
  static constexpr int kLanes = 16, kRows = 8, kGradientRows = 12;
  static Vector Load(const float* p) { return _mm512_loadu_ps(p); }
  static Vector Broadcast(float x) { return _mm512_set1_ps(x); }
  static Vector Zero() { return _mm512_setzero_ps(); }
  static Vector MultiplyAdd(Vector a, Vector b, Vector acc) {
    return _mm512_fmadd_ps(a, b, acc);
  }
  static Vector Add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  // a where it is the larger or NaN, else b; the processor's own returns b for NaN.
  static Vector Largest(Vector a, Vector b) {
    const __mmask16 first = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
    return _mm512_mask_blend_ps(first | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), b, a);
  }
  static void Store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
};

inline uint32_t Join(__mmask16 low, __mmask16 high) {
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

inline uint32_t LessMask(const int32_t* a, const int32_t* b) {
  return Join(
      _mm512_cmplt_epi32_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b)),
      _mm512_cmplt_epi32_mask(_mm512_loadu_si512(a + 16), _mm512_loadu_si512(b + 16)));
}

inline uint32_t LessMask(const float* a, const float* b) {
  return Join(_mm512_cmp_ps_mask(_mm512_loadu_ps(a), _mm512_loadu_ps(b), _CMP_NGE_UQ),
              _mm512_cmp_ps_mask(_mm512_loadu_ps(a + 16), _mm512_loadu_ps(b + 16),
                                 _CMP_NGE_UQ));
}

inline uint32_t NegativeMask(const float* x) {
  const __m512 least = _mm512_set1_ps(-FLT_MIN);
  return Join(_mm512_cmp_ps_mask(_mm512_loadu_ps(x), least, _CMP_NGT_UQ),
              _mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16), least, _CMP_NGT_UQ));
}

}  // namespace
}  // namespace xnor

#include "kernels_impl.h"

namespace xnor {
const Kernels kAvx512 = {"avx512", Convolve<uint32_t>, Convolve<float>, nullptr, CountTaps,
                     Pack, Unpack, AddProducts, ChannelSums, SumPool,
                     Norm, Reduce<Floats>, Combine<Floats>};
}  // namespace xnor
