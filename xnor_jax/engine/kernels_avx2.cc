// AVX2: Haswell, Zen and newer. Bits are counted by a lookup table of the 16 half bytes.
#include <immintrin.h>

#include <cfloat>
#include <cstdint>

namespace xnor {
namespace {

struct Words {
  using Vector = __m256i;
  // A byte counts up to 8 bits per word: the counts of 31 words stay below 256.
  static constexpr int kLanes = 8, kRows = 2, kFlush = 31;
  static Vector Load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Vector Broadcast(uint32_t word) {
    return _mm256_set1_epi32(static_cast<int>(word));
  }
  static Vector Zero() { return _mm256_setzero_si256(); }
  static Vector Xor(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
  static Vector Count(Vector acc, Vector bits) {
    const Vector table =
        _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2,
                         2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const Vector low = _mm256_set1_epi8(15);
    const Vector high_bits = _mm256_and_si256(_mm256_srli_epi32(bits, 4), low);
    const Vector halves =
        _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(bits, low)),
                        _mm256_shuffle_epi8(table, high_bits));
    return _mm256_add_epi8(acc, halves);
  }
  static Vector Widen(Vector acc) {
    const Vector pairs = _mm256_maddubs_epi16(acc, _mm256_set1_epi8(1));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static Vector Add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
  static Vector LessTwice(Vector a, Vector b) {
    return _mm256_sub_epi32(a, _mm256_add_epi32(b, b));
  }
  static void Store(int32_t* p, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
};

struct Floats {
  using Vector = __m256;
  static constexpr int kLanes = 8, kRows = 3;
  static Vector Load(const float* p) { return _mm256_loadu_ps(p); }
  static Vector Broadcast(float x) { return _mm256_set1_ps(x); }
  static Vector Zero() { return _mm256_setzero_ps(); }
  static Vector MultiplyAdd(Vector a, Vector b, Vector acc) {
    return _mm256_fmadd_ps(a, b, acc);
  }
  static void Store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
};

inline uint32_t Bits(__m256 mask, int part) {
  return static_cast<uint32_t>(_mm256_movemask_ps(mask)) << (8 * part);
}

inline uint32_t LessMask(const int32_t* a, const int32_t* b) {
  uint32_t mask = 0;
  for (int part = 0; part < 4; ++part) {
    const __m256i less = _mm256_cmpgt_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 8 * part)),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + 8 * part)));
    mask |= Bits(_mm256_castsi256_ps(less), part);
  }
  return mask;
}

inline uint32_t LessMask(const float* a, const float* b) {
  uint32_t mask = 0;
  for (int part = 0; part < 4; ++part)
    mask |= Bits(_mm256_cmp_ps(_mm256_loadu_ps(a + 8 * part),
                               _mm256_loadu_ps(b + 8 * part), _CMP_NGE_UQ),
                 part);
  return mask;
}

inline uint32_t NegativeMask(const float* x) {
  const __m256 least = _mm256_set1_ps(-FLT_MIN);
  uint32_t mask = 0;
  for (int part = 0; part < 4; ++part)
    mask |= Bits(_mm256_cmp_ps(_mm256_loadu_ps(x + 8 * part), least, _CMP_NGT_UQ), part);
  return mask;
}

}  // namespace
}  // namespace xnor

#include "kernels_impl.h"

namespace xnor {
const Kernels kAvx2 = {"avx2", Convolve<uint32_t>, Convolve<float>, CountTaps,
                     Pack, Unpack, AddProducts, ChannelSums, SumPool,
                     MultiplyAdd, Norm};
}  // namespace xnor
