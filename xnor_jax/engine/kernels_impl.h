// The kernels, written once over the vectors of an instruction set. Each kernels_*.cc
// defines the following and then includes this file:
//
//   struct Words: a vector of `kLanes` uint32 lanes.
//     kRows       rows of the image whose sums stay in registers
//     kFlush      counts that a lane's accumulator can hold before it must be widened;
//                 0 if it counts in 32 bits
//     kPairRows   the same as kRows for `MultiplyPair`, which replaces `Multiply` for pairs
//                 of panels; 0 without it
//     Load, Broadcast, Zero, Xor, Count(acc, bits) -> acc, Widen(acc) -> uint32 lanes,
//     Add, LessTwice(a, b) -> a - 2 b, Store
//   struct Floats: a vector of `kLanes` floats.
//     kRows; kGradientRows, the same for `AddRows` on whole panels; Load, Broadcast, Zero,
//     MultiplyAdd(a, b, acc), Store; where Reduce is used, also Add, and Largest as in
//     walk.h
//   uint32_t LessMask(const int32_t* a, const int32_t* b): bit i is a[i] < b[i], i < 32
//   uint32_t LessMask(const float* a, const float* b): bit i is !(a[i] >= b[i])
//   uint32_t NegativeMask(const float* x): bit i is !(x[i] > -FLT_MIN), i < 32
//
// Everything is in an unnamed namespace and uses no function template of the standard
// library, so that the linker cannot merge copies compiled for different instruction sets.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace xnor {
namespace {

inline int64_t Larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t Smaller(int64_t a, int64_t b) { return b < a ? b : a; }

constexpr int kBlock = 64;  // pixels, for which a panel stays in the first-level cache

// For a panel of at most kPanel / 2 columns only half of it is computed, so that twice as
// many rows fit into the registers.
template <class Lanes>
struct Half {
  static constexpr int kVectors = kPanel / Lanes::kLanes / 2;
  static constexpr int kRows = Lanes::kRows * 2;
};

// sums[m][column] = base of row m - 2 * popcount(row m xor column).
template <int M, int V = kPanel / Words::kLanes>
inline void Multiply(const uint32_t* const* rows, const int32_t* const* base,
                     const Job<uint32_t>& job, const uint32_t* panel,
                     int32_t (*sums)[kPanel]) {
  using Vector = Words::Vector;
  Vector acc[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = Words::Zero();
  Vector wide[Words::kFlush ? M : 1][Words::kFlush ? V : 1];
  if constexpr (Words::kFlush > 0)
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) wide[m][v] = Words::Zero();
  int held = 0;
  for (int64_t s = 0; s < job.segments; ++s) {
    const uint32_t* a[M];
    for (int m = 0; m < M; ++m) a[m] = rows[m] + job.offsets[s];
    for (int64_t k = 0; k < job.length; ++k, panel += kPanel) {
      Vector b[V];
      for (int v = 0; v < V; ++v) b[v] = Words::Load(panel + v * Words::kLanes);
      for (int m = 0; m < M; ++m) {
        const Vector bits = Words::Broadcast(a[m][k]);
        for (int v = 0; v < V; ++v)
          acc[m][v] = Words::Count(acc[m][v], Words::Xor(bits, b[v]));
      }
      if constexpr (Words::kFlush > 0) {
        if (++held == Words::kFlush) {
          held = 0;
          for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) {
              wide[m][v] = Words::Add(wide[m][v], Words::Widen(acc[m][v]));
              acc[m][v] = Words::Zero();
            }
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      Vector count = Words::Widen(acc[m][v]);
      if constexpr (Words::kFlush > 0) count = Words::Add(wide[m][v], count);
      Words::Store(sums[m] + v * Words::kLanes,
                   Words::LessTwice(Words::Load(reinterpret_cast<const uint32_t*>(
                                        base[m] + v * Words::kLanes)),
                                    count));
    }
}

// A segment of M rows, with a pointer to each.
template <int M>
struct Pointers {
  const float* a[M];
  Pointers(const float* const* rows, int64_t offset) {
    for (int m = 0; m < M; ++m) a[m] = rows[m] + offset;
  }
  float operator()(int m, int64_t k) const { return a[m][k]; }
};

// The same of rows at equal distances. A pointer to every fourth row suffices: 16 pointers
// do not fit into a processor's registers.
template <int M>
struct Steps {
  const float* a[(M + 3) / 4];
  int64_t step;
  Steps(const float* const* rows, int64_t offset) : step(rows[1] - rows[0]) {
    for (int m = 0; m < M; m += 4) a[m / 4] = rows[0] + m * step + offset;
  }
  float operator()(int m, int64_t k) const { return a[m / 4][m % 4 * step + k]; }
};

inline bool AtEqualDistances(const float* const* rows, int count) {
  bool equal = true;
  for (int m = 2; m < count; ++m)
    equal &= rows[m] - rows[m - 1] == rows[1] - rows[0];
  return equal;
}

// sums[m][column] = row m · column, in the order of the window.
template <int M, int V = kPanel / Floats::kLanes, class Rows = Pointers<M>>
inline void Multiply(const float* const* rows, const int32_t* const*,
                     const Job<float>& job, const float* panel,
                     float (*sums)[kPanel]) {
  using Vector = Floats::Vector;
  Vector acc[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = Floats::Zero();
  for (int64_t s = 0; s < job.segments; ++s) {
    const Rows a(rows, job.offsets[s]);
    for (int64_t k = 0; k < job.length; ++k, panel += kPanel) {
      Vector b[V];
      for (int v = 0; v < V; ++v) b[v] = Floats::Load(panel + v * Floats::kLanes);
      for (int m = 0; m < M; ++m) {
        const Vector x = Floats::Broadcast(a(m, k));
        for (int v = 0; v < V; ++v)
          acc[m][v] = Floats::MultiplyAdd(x, b[v], acc[m][v]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v)
      Floats::Store(sums[m] + v * Floats::kLanes, acc[m][v]);
}

// Columns in half a panel.
inline void MultiplyHalf(const uint32_t* const* rows, const int32_t* const* base,
                         const Job<uint32_t>& job, const uint32_t* panel,
                         int32_t (*sums)[kPanel]) {
  using Narrow = Half<Words>;
  Multiply<Narrow::kRows, Narrow::kVectors>(rows, base, job, panel, sums);
}

inline void MultiplyHalf(const float* const* rows, const int32_t* const* base,
                         const Job<float>& job, const float* panel,
                         float (*sums)[kPanel]) {
  constexpr int M = Half<Floats>::kRows, V = Half<Floats>::kVectors;
  if (AtEqualDistances(rows, M))
    Multiply<M, V, Steps<M>>(rows, base, job, panel, sums);
  else
    Multiply<M, V>(rows, base, job, panel, sums);
}

template <int M, class Element>
inline void MultiplyRows(int m, const Element* const* rows, const int32_t* const* base,
                         const Job<Element>& job, const Element* panel,
                         typename SumOf<Element>::Type (*sums)[kPanel]) {
  if constexpr (M > 1) {
    if (m < M) {
      MultiplyRows<M - 1>(m, rows, base, job, panel, sums);
      return;
    }
  }
  Multiply<M>(rows, base, job, panel, sums);
}

inline uint32_t FirstBits(int count) { return ~0u >> (kPanel - count); }

// Copies the first columns of a panel; the sizes known here need no call.
template <class Value>
inline void CopyColumns(const Value* from, int columns, Value* to) {
  if (columns == kPanel)
    std::memcpy(to, from, kPanel * sizeof(Value));
  else if (columns == kPanel / 2)
    std::memcpy(to, from, kPanel / 2 * sizeof(Value));
  else
    std::memcpy(to, from, columns * sizeof(Value));
}

template <class Element, class Sum>
inline void Finish(const Job<Element>& job, const Sum* sums, int64_t pixel,
                   int64_t panel) {
  const int64_t first = panel * kPanel;
  const int64_t rest = job.columns - first;
  const int columns = rest < kPanel ? static_cast<int>(rest) : kPanel;
  if (job.epilogue == Epilogue::kThreshold) {
    const Sum* threshold = static_cast<const Sum*>(job.threshold) + first;
    static_cast<uint32_t*>(job.out)[pixel * job.out_stride + panel] =
        (LessMask(sums, threshold) ^ job.flip[panel]) & FirstBits(columns);
    return;
  }
  if (job.epilogue == Epilogue::kSums) {
    Sum* out = static_cast<Sum*>(job.out) + pixel * job.out_stride + first;
    CopyColumns(sums, columns, out);
    return;
  }
  const float* scale = job.scale + first;
  const float* bias = job.bias + first;
  const float least = job.relu ? 0.0f : -INFINITY;
  float y[kPanel];
  if (job.shift != nullptr) {
    const float* shift = job.shift + first;
    for (int n = 0; n < kPanel; ++n)
      y[n] = (static_cast<float>(sums[n]) + bias[n]) * scale[n] + shift[n];
  } else {
    for (int n = 0; n < kPanel; ++n)
      y[n] = scale[n] * static_cast<float>(sums[n]) + bias[n];
  }
  for (int n = 0; n < kPanel; ++n) y[n] = y[n] < least ? least : y[n];
  float* out = static_cast<float*>(job.out) + pixel * job.out_stride + first;
  CopyColumns(y, columns, out);
}

template <class Element>
inline void MultiplyBlock(const Job<Element>& job, const Element* const* rows,
                          const int32_t* const* base, int64_t pixel, int count,
                          int64_t panel) {
  using Lanes = std::conditional_t<std::is_same_v<Element, uint32_t>, Words, Floats>;
  using Narrow = Half<Lanes>;
  const bool narrow = job.columns - panel * kPanel <= kPanel / 2;
  alignas(64) typename SumOf<Element>::Type sums[Narrow::kRows][kPanel] = {};
  const Element* kernel = job.kernel + panel * job.segments * job.length * kPanel;
  for (int i = 0, m; i < count; i += m) {
    const bool many = narrow && count - i >= Narrow::kRows;
    m = many ? Narrow::kRows : static_cast<int>(Smaller(count - i, Lanes::kRows));
    const int32_t* from[Narrow::kRows] = {};
    if constexpr (std::is_same_v<Element, uint32_t>)
      for (int r = 0; r < m; ++r) from[r] = base[i + r] + panel * kPanel;
    if (many)
      MultiplyHalf(rows + i, from, job, kernel, sums);
    else
      MultiplyRows<Lanes::kRows>(m, rows + i, from, job, kernel, sums);
    for (int r = 0; r < m; ++r) Finish(job, sums[r], pixel + i + r, panel);
  }
}

// The same for two panels.
template <class Lanes>
inline void MultiplyPairs(const Job<uint32_t>& job, const uint32_t* const* rows,
                          const int32_t* const* base, int64_t pixel, int count,
                          int64_t panel) {
  int32_t sums[Lanes::kPairRows][2 * kPanel];
  const uint32_t* kernel = job.kernel + panel * job.segments * job.length * kPanel;
  for (int i = 0, m; i < count; i += m) {
    m = count - i >= Lanes::kPairRows ? Lanes::kPairRows : 1;
    const int32_t* from[Lanes::kPairRows];
    for (int r = 0; r < m; ++r) from[r] = base[i + r] + panel * kPanel;
    if (m > 1)
      Lanes::template MultiplyPair<Lanes::kPairRows>(rows + i, from, job, kernel, sums);
    else
      Lanes::template MultiplyPair<1>(rows + i, from, job, kernel, sums);
    for (int r = 0; r < m; ++r) {
      Finish(job, sums[r], pixel + i + r, panel);
      Finish(job, sums[r] + kPanel, pixel + i + r, panel + 1);
    }
  }
}

template <class Element>
void Convolve(const Job<Element>& job, int64_t begin, int64_t end, int64_t panel_begin,
              int64_t panel_end) {
  const Element* rows[kBlock];
  const int32_t* base[kBlock];
  const int64_t all_columns = (job.columns + kPanel - 1) / kPanel * kPanel;
  int64_t x = begin % job.out_width;
  int64_t y = begin / job.out_width % job.out_height;
  int64_t z = begin / (job.out_width * job.out_height) % job.out_depth;
  int64_t image = begin / (job.out_width * job.out_height * job.out_depth);
  for (int64_t block = begin; block < end; block += kBlock) {
    const int count = static_cast<int>(end - block < kBlock ? end - block : kBlock);
    for (int i = 0; i < count; ++i) {
      rows[i] = job.image + image * job.image_stride +
                z * job.stride_depth * job.plane_stride +
                y * job.stride_height * job.row_stride +
                x * job.stride_width * job.pixel_stride;
      if constexpr (std::is_same_v<Element, uint32_t>)
        base[i] = job.base + ((job.class_z[z] * job.classes_y + job.class_y[y]) *
                                  job.classes_x +
                              job.class_x[x]) *
                                 all_columns;
      if (++x == job.out_width) {
        x = 0;
        if (++y == job.out_height) {
          y = 0;
          if (++z == job.out_depth) {
            z = 0;
            ++image;
          }
        }
      }
    }
    int64_t panel = panel_begin;
    if constexpr (std::is_same_v<Element, uint32_t>) {
      // Dependent, so that only sets with pairs need a `MultiplyPair`.
      using Lanes = std::conditional_t<std::is_same_v<Element, uint32_t>, Words, void>;
      if constexpr (Lanes::kPairRows > 0)
        for (; panel + 1 < panel_end; panel += 2)
          MultiplyPairs<Lanes>(job, rows, base, block, count, panel);
    }
    for (; panel < panel_end; ++panel) MultiplyBlock(job, rows, base, block, count, panel);
  }
}

// out[tap][column] = popcount of the column's words at the tap, over all panels.
void CountTaps(const uint32_t* kernel, int64_t panels, int64_t taps, int64_t words,
               int32_t* out) {
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t t = 0; t < taps; ++t) {
      const uint32_t* tap = kernel + (p * taps + t) * words * kPanel;
      int32_t* counts = out + (t * panels + p) * kPanel;
      for (int n = 0; n < kPanel; n += Words::kLanes) {
        Words::Vector count = Words::Zero();
        for (int64_t w = 0; w < words; ++w) {
          const Words::Vector bits = Words::Load(tap + w * kPanel + n);
          const Words::Vector word = Words::Widen(Words::Count(Words::Zero(), bits));
          count = Words::Add(count, word);
        }
        Words::Store(counts + n, count);
      }
    }
}

// Bit 1 where !(x >= 0); subnormal numbers count as zeros, as in XLA's CPU programs.
void Pack(const float* x, int64_t channels, uint32_t* out, int64_t begin, int64_t end) {
  const int64_t words = (channels + kPanel - 1) / kPanel;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const float* row = x + pixel * channels;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t rest = channels - word * kPanel;
      if (rest >= kPanel) {
        out[pixel * words + word] = NegativeMask(row + word * kPanel);
      } else {
        float tail[kPanel] = {};
        std::memcpy(tail, row + word * kPanel, rest * sizeof(float));
        out[pixel * words + word] = NegativeMask(tail);
      }
    }
  }
}

// Converts bits to 1.0f or -1.0f, or to 0 where the two words differ.
inline void UnpackWord(uint32_t a, uint32_t b, float* out) {
  uint32_t ones[kPanel];
  const uint32_t differ = a ^ b;
  for (uint32_t n = 0; n < kPanel; ++n) {
    const uint32_t one = 0x3f800000u | (a >> n) << 31;
    ones[n] = one & (((differ >> n) & 1u) - 1u);
  }
  std::memcpy(out, ones, sizeof(ones));
}

void Unpack(const uint32_t* a, const uint32_t* b, int64_t channels, int64_t pixels,
            float* out) {
  const int64_t words = channels / kPanel, rest = channels % kPanel;
  for (int64_t p = 0; p < pixels; ++p, out += channels) {
    for (int64_t w = 0; w < words; ++w) UnpackWord(*a++, *b++, out + w * kPanel);
    if (rest == 0) continue;
    float tail[kPanel], *const last = out + words * kPanel;
    // The next pixels overwrite the numbers past the channels.
    const bool overwritten = (pixels - p - 1) * channels >= kPanel;
    UnpackWord(*a++, *b++, overwritten ? last : tail);
    if (!overwritten) std::memcpy(last, tail, rest * sizeof(float));
  }
}

template <int M, int V>
inline void AddRows(const float* x, const int64_t* pixels, int64_t count,
                    const float* gradient, float* sums, int64_t stride) {
  using Vector = Floats::Vector;
  Vector acc[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = Floats::Zero();
  for (int64_t p = 0; p < count; ++p, gradient += V * Floats::kLanes) {
    const float* row = x + pixels[p];
    Vector g[V];
    for (int v = 0; v < V; ++v) g[v] = Floats::Load(gradient + v * Floats::kLanes);
    for (int i = 0; i < M; ++i) {
      const Vector each = Floats::Broadcast(row[i]);
      for (int v = 0; v < V; ++v) acc[i][v] = Floats::MultiplyAdd(each, g[v], acc[i][v]);
    }
  }
  const Vector one = Floats::Broadcast(1.0f);
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) {
      float* at = sums + i * stride + v * Floats::kLanes;
      Floats::Store(at, Floats::MultiplyAdd(acc[i][v], one, Floats::Load(at)));
    }
}

// M rows at once, then at most half as many, and so on.
template <int M, int V>
void AddAllRows(const float* x, int64_t rows, const int64_t* pixels, int64_t count,
                const float* gradient, float* sums, int64_t stride) {
  for (; rows >= M; rows -= M, x += M, sums += M * stride)
    AddRows<M, V>(x, pixels, count, gradient, sums, stride);
  if constexpr (M > 1)
    if (rows > 0)
      AddAllRows<M / 2, V>(x, rows, pixels, count, gradient, sums, stride);
}

void AddProducts(const float* x, int64_t rows, const int64_t* pixels, int64_t count,
                 const float* gradient, int64_t columns, float* sums) {
  using Narrow = Half<Floats>;
  const int64_t stride = (columns + kPanel - 1) / kPanel * kPanel;
  for (int64_t first = 0; first < columns; first += kPanel) {
    const float* panel = gradient + first * count;
    if (columns - first <= kPanel / 2)
      AddAllRows<Narrow::kRows, Narrow::kVectors>(x, rows, pixels, count, panel,
                                                  sums + first, stride);
    else
      AddAllRows<Floats::kGradientRows, 2 * Narrow::kVectors>(x, rows, pixels, count,
                                                              panel, sums + first, stride);
  }
}

// Adds to the sums of V vectors of channels.
template <int V>
inline void SumVectors(const float* a, const float* x, const float* center, int64_t rows,
                       int64_t channels, float* sums) {
  using Vector = Floats::Vector;
  const Vector one = Floats::Broadcast(1.0f), minus = Floats::Broadcast(-1.0f);
  Vector middle[V], plain[V], centred[V];
  for (int v = 0; v < V; ++v) {
    middle[v] = Floats::Load(center + v * Floats::kLanes);
    plain[v] = Floats::Load(sums + v * Floats::kLanes);
    centred[v] = Floats::Load(sums + channels + v * Floats::kLanes);
  }
  for (int64_t row = 0; row < rows; ++row, a += channels, x += channels)
    for (int v = 0; v < V; ++v) {
      const Vector value = Floats::Load(a + v * Floats::kLanes);
      const Vector other = Floats::Load(x + v * Floats::kLanes);
      plain[v] = Floats::MultiplyAdd(value, one, plain[v]);
      centred[v] = Floats::MultiplyAdd(
          value, Floats::MultiplyAdd(middle[v], minus, other), centred[v]);
    }
  for (int v = 0; v < V; ++v) {
    Floats::Store(sums + v * Floats::kLanes, plain[v]);
    Floats::Store(sums + channels + v * Floats::kLanes, centred[v]);
  }
}

void ChannelSums(const float* a, const float* x, const float* center, int64_t rows,
                 int64_t channels, float* sums) {
  constexpr int kVectors = 4;  // in registers
  constexpr int64_t kOne = Floats::kLanes, kAll = kVectors * kOne;
  int64_t c = 0;
  for (; c + kAll <= channels; c += kAll)
    SumVectors<kVectors>(a + c, x + c, center + c, rows, channels, sums + c);
  for (; c + kOne <= channels; c += kOne)
    SumVectors<1>(a + c, x + c, center + c, rows, channels, sums + c);
  for (; c < channels; ++c)
    for (int64_t i = c; i < rows * channels; i += channels) {
      sums[c] += a[i];
      sums[channels + c] += a[i] * (x[i] - center[c]);
    }
}

void SumPool(const PoolJob& job, int64_t begin, int64_t end) {
  const int64_t words = (job.channels + kPanel - 1) / kPanel;
  // Whether every window is one pixel of the image.
  const bool alone = job.window_height * job.window_width == 1 && job.top == 0 &&
                     job.left == 0 &&
                     (job.out_height - 1) * job.stride_height < job.height &&
                     (job.out_width - 1) * job.stride_width < job.width;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / job.out_height;
    const int64_t y0 = row % job.out_height * job.stride_height - job.top;
    const int64_t bottom = Smaller(y0 + job.window_height, job.height);
    const float* source = job.x + image * job.height * job.width * job.channels;
    for (int64_t out_x = 0; out_x < job.out_width; ++out_x) {
      const int64_t x0 = out_x * job.stride_width - job.left;
      const int64_t right = Smaller(x0 + job.window_width, job.width);
      for (int64_t word = 0; word < words; ++word) {
        const int64_t first = word * kPanel;
        const int64_t rest = job.channels - first;
        const int lanes = rest < kPanel ? static_cast<int>(rest) : kPanel;
        uint32_t& to = job.out[(row * job.out_width + out_x) * words + word];
        const auto signs = [&](const float* sums) {
          return (LessMask(sums, job.threshold + first) ^ job.flip[word]) &
                 FirstBits(lanes);
        };
        if (alone && lanes == kPanel) {
          to = signs(source + (y0 * job.width + x0) * job.channels + first);
          continue;
        }
        alignas(64) float sums[kPanel] = {};
        for (int64_t y = Larger(y0, 0); y < bottom; ++y) {
          for (int64_t x = Larger(x0, 0); x < right; ++x) {
            const float* pixel = source + (y * job.width + x) * job.channels + first;
            if (lanes == kPanel)
              for (int n = 0; n < kPanel; ++n) sums[n] += pixel[n];
            else
              for (int n = 0; n < lanes; ++n) sums[n] += pixel[n];
          }
        }
        to = signs(sums);
      }
    }
  }
}

// Loads `lanes` numbers; the other lanes are 0.
inline Floats::Vector LoadSome(const float* from, int64_t lanes) {
  if (lanes == Floats::kLanes) return Floats::Load(from);
  alignas(64) float some[Floats::kLanes] = {};
  for (int64_t i = 0; i < lanes; ++i) some[i] = from[i];
  return Floats::Load(some);
}

inline void StoreSome(float* to, Floats::Vector v, int64_t lanes) {
  if (lanes == Floats::kLanes) return Floats::Store(to, v);
  alignas(64) float some[Floats::kLanes];
  Floats::Store(some, v);
  for (int64_t i = 0; i < lanes; ++i) to[i] = some[i];
}

// Adding -0 is exact, also if the product is 0 or -0.
template <class Lanes>
inline typename Lanes::Vector Product(typename Lanes::Vector a, typename Lanes::Vector b) {
  return Lanes::MultiplyAdd(a, b, Lanes::Broadcast(-0.0f));
}

void Norm(const float* x, const float* mean, const float* scale, const float* bias,
          int64_t channels, int64_t pixels, float* out) {
  // Multiplying by 1 or -1 is exact, so that each step rounds once.
  const Floats::Vector one = Floats::Broadcast(1.0f), minus = Floats::Broadcast(-1.0f);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, out += channels)
    for (int64_t c = 0; c < channels; c += Floats::kLanes) {
      const int64_t lanes = Smaller(channels - c, Floats::kLanes);
      const auto load = [&](const float* from) { return LoadSome(from + c, lanes); };
      const Floats::Vector centred = Floats::MultiplyAdd(load(mean), minus, load(x));
      const Floats::Vector scaled = Product<Floats>(centred, load(scale));
      StoreSome(out + c, Floats::MultiplyAdd(scaled, one, load(bias)), lanes);
    }
}

// A template, so that only sets with vectors need the functions.
template <class Lanes>
int64_t Reduce(Reduction function, const float* const* rows, int64_t count,
               int64_t channels, float* out) {
  using Vector = typename Lanes::Vector;
  constexpr int kVectors = 4, kWide = kVectors * Lanes::kLanes;
  const auto with = [&](auto combine) {
    int64_t c = 0;
    for (; c + kWide <= channels; c += kWide) {
      Vector acc[kVectors];
      for (int v = 0; v < kVectors; ++v) acc[v] = Lanes::Load(out + c + v * Lanes::kLanes);
      for (int64_t r = 0; r < count; ++r)
        for (int v = 0; v < kVectors; ++v)
          acc[v] = combine(acc[v], Lanes::Load(rows[r] + c + v * Lanes::kLanes));
      for (int v = 0; v < kVectors; ++v) Lanes::Store(out + c + v * Lanes::kLanes, acc[v]);
    }
    return c;
  };
  if (function == Reduction::kSum)
    return with([](Vector a, Vector b) { return Lanes::Add(a, b); });
  if (function == Reduction::kMax)
    return with([](Vector a, Vector b) { return Lanes::Largest(a, b); });
  return 0;
}

template <class Lanes>
int64_t Combine(Combination function, const float* a, const float* b, int64_t step,
                int64_t count, float* out) {
  using Vector = typename Lanes::Vector;
  const Vector first = Lanes::Broadcast(*b);
  const auto with = [&](auto combine) {
    int64_t i = 0;
    for (; i + Lanes::kLanes <= count; i += Lanes::kLanes)
      Lanes::Store(out + i,
                   combine(Lanes::Load(a + i), step == 0 ? first : Lanes::Load(b + i)));
    return i;
  };
  switch (function) {
    case Combination::kSum: return with([](Vector x, Vector y) { return Lanes::Add(x, y); });
    case Combination::kProduct: return with(Product<Lanes>);
    case Combination::kMax:
      return with([](Vector x, Vector y) { return Lanes::Largest(x, y); });
  }
  return 0;
}

}  // namespace
}  // namespace xnor
