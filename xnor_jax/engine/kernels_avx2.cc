// AVX2: Haswell, Zen and newer. Bits are counted by a lookup table of the 16 half bytes.
#include <immintrin.h>

#include <cfloat>
#include <cstdint>

#include "kernels.h"

namespace xnor {
namespace {

// of[a][b] = popcount(a xor b), for half bytes.
struct Differences {
  uint8_t of[16][16] = {};
  constexpr Differences() {
    for (int a = 0; a < 16; ++a)
      for (int b = 0; b < 16; ++b)
        for (int bits = a ^ b; bits > 0; bits >>= 1)
          of[a][b] = static_cast<uint8_t>(of[a][b] + (bits & 1));
  }
};
alignas(64) constexpr Differences kDiffering;

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

  // Pairs of panels, in the layout of `LayOutPairs`: a vector holds a byte of all columns
  // of a panel. A half byte of the row selects the table that counts the bits in which it
  // differs from each column's half byte, so that a shuffle replaces the xor as well.
  static constexpr int kPairRows = 4;

  // sums[m][column] = base of row m - 2 * popcount(row m xor column), both panels' columns.
  // Not inlined: it needs all registers.
  template <int M>
  __attribute__((noinline)) static void MultiplyPair(
      const uint32_t* const* rows, const int32_t* const* base, const Job<uint32_t>& job,
      const uint32_t* pair, int32_t (*sums)[2 * kPanel]) {
    constexpr int kWords = 7;  // A byte counts up to 32 bits per word: at most 224.
    constexpr int kFlushes = 292;  // 16 bits hold the counts of so many times `kWords`.
    Vector acc[M][2], wide[M][2][2];
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < 2 * kPanel; n += kLanes)
        Store(sums[m] + n, Load(reinterpret_cast<const uint32_t*>(base[m] + n)));
      for (int v = 0; v < 2; ++v) acc[m][v] = wide[m][v][0] = wide[m][v][1] = Zero();
    }
    const auto flush = [&] {
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < 2; ++v) {
          const __m128i halves[] = {_mm256_castsi256_si128(acc[m][v]),
                                    _mm256_extracti128_si256(acc[m][v], 1)};
          for (int i = 0; i < 2; ++i)
            wide[m][v][i] =
                _mm256_add_epi16(wide[m][v][i], _mm256_cvtepu8_epi16(halves[i]));
          acc[m][v] = Zero();
        }
    };
    const auto drain = [&] {
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < 2; ++v)
          for (int i = 0; i < 2; ++i) {
            const __m128i halves[] = {_mm256_castsi256_si128(wide[m][v][i]),
                                      _mm256_extracti128_si256(wide[m][v][i], 1)};
            for (int j = 0; j < 2; ++j) {
              int32_t* at = sums[m] + (2 * v + i) * 16 + j * kLanes;
              Store(at, LessTwice(Load(reinterpret_cast<const uint32_t*>(at)),
                                  _mm256_cvtepu16_epi32(halves[j])));
            }
            wide[m][v][i] = Zero();
          }
    };
    const Vector low = _mm256_set1_epi8(15);
    const auto table = [](uint32_t offset) {  // a row, at 16 times its index
      return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(
          reinterpret_cast<const char*>(kDiffering.of) + offset)));
    };
    int64_t left = kWords;
    int flushed = 0;
    for (int64_t s = 0; s < job.segments; ++s) {
      const uint32_t* a[M];
      for (int m = 0; m < M; ++m) a[m] = rows[m] + job.offsets[s];
      for (int64_t k = 0; k < job.length;) {
        const int64_t stop = job.length - k < left ? job.length : k + left;
        left -= stop - k;
        for (; k < stop; ++k, pair += 8 * kLanes) {
          uint32_t first[M], second[M];  // 16 times the half bytes
          for (int m = 0; m < M; ++m) {
            first[m] = a[m][k] << 4 & 0xf0f0f0f0u;
            second[m] = a[m][k] & 0xf0f0f0f0u;
          }
#pragma GCC unroll 4
          for (int byte = 0; byte < 4; ++byte) {
            Vector b[2][2];
            for (int v = 0; v < 2; ++v) {
              const Vector both = Load(pair + (2 * byte + v) * kLanes);
              b[v][0] = _mm256_and_si256(both, low);
              b[v][1] = _mm256_and_si256(_mm256_srli_epi32(both, 4), low);
            }
            for (int m = 0; m < M; ++m) {
              const Vector t0 = table(first[m] >> 8 * byte & 255);
              const Vector t1 = table(second[m] >> 8 * byte & 255);
              for (int v = 0; v < 2; ++v) {
                const Vector count = _mm256_add_epi8(_mm256_shuffle_epi8(t0, b[v][0]),
                                                     _mm256_shuffle_epi8(t1, b[v][1]));
                acc[m][v] = _mm256_add_epi8(acc[m][v], count);
                // Add now: else the compiler keeps many counts and spills them.
                asm volatile("" : "+x"(acc[m][v]));
              }
            }
          }
        }
        if (left > 0) continue;
        left = kWords;
        flush();
        if (++flushed == kFlushes) {
          flushed = 0;
          drain();
        }
      }
    }
    flush();
    drain();
  }
};

struct Floats {
  using Vector = __m256;
  static constexpr int kLanes = 8, kRows = 3, kGradientRows = 3;
  static Vector Load(const float* p) { return _mm256_loadu_ps(p); }
  static Vector Broadcast(float x) { return _mm256_set1_ps(x); }
  static Vector Zero() { return _mm256_setzero_ps(); }
  static Vector MultiplyAdd(Vector a, Vector b, Vector acc) {
    return _mm256_fmadd_ps(a, b, acc);
  }
  static Vector Add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  // a where it is the larger or NaN, else b; the processor's own returns b for NaN, and 0
  // for subnormal numbers.
  static Vector Largest(Vector a, Vector b) {
    const Vector first =
        _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_ps(b, a, first);
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
namespace {

// Writes pairs of panels by bytes: of each word in turn, byte by byte, that byte of the 32
// columns of the first panel and then of the second. An odd last panel stays as it is.
void LayOutPairs(const uint32_t* kernel, int64_t panels, int64_t words, uint32_t* out) {
  const int64_t size = words * kPanel;
  uint8_t* to = reinterpret_cast<uint8_t*>(out);
  for (int64_t pair = 0; pair < panels / 2; ++pair, kernel += 2 * size)
    for (int64_t word = 0; word < words; ++word)
      for (int byte = 0; byte < 4; ++byte)
        for (int panel = 0; panel < 2; ++panel, to += kPanel) {
          const uint32_t* from = kernel + panel * size + word * kPanel;
          for (int n = 0; n < kPanel; ++n)
            to[n] = static_cast<uint8_t>(from[n] >> 8 * byte);
        }
  if (panels % 2 != 0) std::memcpy(to, kernel, size * sizeof(uint32_t));
}

}  // namespace

const Kernels kAvx2 = {"avx2", Convolve<uint32_t>, Convolve<float>, LayOutPairs, CountTaps,
                     Pack, Unpack, AddProducts, ChannelSums, SumPool,
                     Norm, Reduce<Floats>, Combine<Floats>};
}  // namespace xnor
