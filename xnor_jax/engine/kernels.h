// The kernels of an instruction set and their arguments. The callers have checked all
// sizes; the kernels check none.
#ifndef XNOR_KERNELS_H_
#define XNOR_KERNELS_H_

#include <cstdint>

namespace xnor {

// Output channels per panel of the kernel, and bits per word: a panel's signs fill a word.
constexpr int kPanel = 32;

// The type of a sum of products, for words of signs and for floats.
template <class Element>
struct SumOf;
template <>
struct SumOf<uint32_t> {
  using Type = int32_t;
};
template <>
struct SumOf<float> {
  using Type = float;
};

enum class Reduction { kSum, kMax, kMin };

enum class Combination { kSum, kProduct, kMax };

enum class Epilogue { kSums, kAffine, kThreshold };

// A convolution of one group: rows of the (padded) image times panels of the kernel.
// `Element` is uint32_t (words of signs) or float.
template <class Element>
struct Job {
  // The image with its padding written out; strides in elements.
  const Element* image;
  int64_t image_stride, plane_stride, row_stride, pixel_stride;
  int64_t out_depth, out_height, out_width;
  int64_t stride_depth, stride_height, stride_width;
  // A window is `segments` runs of `length` elements, at these offsets from its corner.
  const int64_t* offsets;
  int64_t segments, length;
  // [panels][segments * length][kPanel], or as `Kernels::lay_out` writes it
  const Element* kernel;
  int64_t columns;  // output channels of the group
  // Words only: sum = base[class of the pixel] - 2 * popcount. Pixels of a class have the
  // same taps outside the image; [classes z][classes y][classes x][panels * kPanel].
  const int32_t* base;
  const int32_t *class_z, *class_y, *class_x;
  int64_t classes_y, classes_x;
  // Scale, bias, shift and threshold are padded to panels * kPanel; `flip` has a word per
  // panel. The affine result is sum * scale + bias, or with `shift`, which may be null,
  // (sum + bias) * scale + shift.
  Epilogue epilogue;
  const float *scale, *bias, *shift;
  bool relu;
  const void* threshold;  // int32_t for words, float for floats
  const uint32_t* flip;
  // `out_stride` numbers per pixel, or words for kThreshold.
  void* out;
  int64_t out_stride;
};

struct PoolJob {
  const float* x;
  int64_t height, width, channels;
  int64_t out_height, out_width;
  int64_t window_height, window_width, stride_height, stride_width, top, left;
  const float* threshold;  // padded to whole words
  const uint32_t* flip;
  uint32_t* out;
};

struct Kernels {
  const char* name;
  // Convolutions, at output pixels [begin, end) for panels [panel_begin, panel_end);
  // `panel_begin` is even, and `panel_end` is even or the number of panels.
  void (*binary)(const Job<uint32_t>&, int64_t begin, int64_t end, int64_t panel_begin,
                 int64_t panel_end);
  void (*real)(const Job<float>&, int64_t begin, int64_t end, int64_t panel_begin,
               int64_t panel_end);
  // Writes a kernel [panels][words][kPanel] of signs in the layout that `binary` reads;
  // null if it reads the kernel as it is.
  void (*lay_out)(const uint32_t* kernel, int64_t panels, int64_t words, uint32_t* out);
  // Counts the set bits of [panels][taps][words][kPanel], to [taps][panels * kPanel].
  void (*count_taps)(const uint32_t* kernel, int64_t panels, int64_t taps,
                     int64_t words, int32_t* out);
  // Packs the signs of pixels [begin, end), of `channels` floats, into whole words.
  void (*pack)(const float* x, int64_t channels, uint32_t* out, int64_t begin,
               int64_t end);
  // Unpacks `pixels` pixels to floats, each the mean of the signs in `a` and `b`.
  void (*unpack)(const uint32_t* a, const uint32_t* b, int64_t channels, int64_t pixels,
                 float* out);
  // sums[row][column] += x[pixels[p] + row] * gradient[p][column], summed over p < count;
  // gradient [panels][count][kPanel], but [count][kPanel / 2] for a last panel of at most
  // kPanel / 2 columns; sums [rows][panels * kPanel]. The results in columns past `columns`
  // are unused.
  void (*add_products)(const float* x, int64_t rows, const int64_t* pixels, int64_t count,
                       const float* gradient, int64_t columns, float* sums);
  // sums[c] += a[row][c] and sums[channels + c] += a[row][c] * (x[row][c] - center[c]),
  // summed over the rows.
  void (*channel_sums)(const float* a, const float* x, const float* center, int64_t rows,
                       int64_t channels, float* sums);
  // Sum pooling of output rows [begin, end), counted through all images.
  void (*sum_pool)(const PoolJob&, int64_t begin, int64_t end);
  // out[pixel][c] = (x[pixel][c] - mean[c]) * scale[c] + bias[c].
  void (*norm)(const float* x, const float* mean, const float* scale, const float* bias,
               int64_t channels, int64_t pixels, float* out);
  // out[c] = combine(out[c], row[c]) for one of `count` rows after another; returns the
  // number of channels done, in whole vectors, 0 for minima. Null without vectors.
  int64_t (*reduce)(Reduction function, const float* const* rows, int64_t count,
                    int64_t channels, float* out);
  // out[i] = combine(a[i], b[i * step]), for a step of 0 or 1; `out` may be `a` or `b`.
  // Returns the number of results, as `reduce`, and is null with it.
  int64_t (*combine)(Combination function, const float* a, const float* b, int64_t step,
                     int64_t count, float* out);
};

extern const Kernels kPortable;
#if defined(XNOR_X86)
extern const Kernels kAvx2, kAvx512;
#elif defined(XNOR_ARM64)
extern const Kernels kNeon;
#endif

}  // namespace xnor

#endif  // XNOR_KERNELS_H_
