// Each instruction set's engine against the portable one, without XLA: also for a
// processor that is only emulated. Prints the names that were compared.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "kernels.h"

using xnor::Kernels;
using xnor::Epilogue;
using xnor::Job;
using xnor::kPanel;
using xnor::Reduction;

namespace {

std::mt19937 generator(0);

int64_t Draw(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

void Fill(std::vector<uint32_t>& v) {
  for (uint32_t& word : v) word = generator();
}

// Small integers: sums of products are exact in any order.
void Fill(std::vector<float>& v) {
  for (float& x : v) x = static_cast<float>(Draw(-8, 8));
}

template <class T>
void Expect(const std::vector<T>& a, const std::vector<T>& b, const char* what,
            const char* engine) {
  if (a.size() == b.size() &&
      (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0))
    return;
  std::fprintf(stderr, "%s: %s differs from the portable engine's\n", engine, what);
  std::exit(1);
}

template <class Element, class Sum>
void CheckConvolution(const Kernels& engine, Epilogue epilogue) {
  constexpr bool kWords = std::is_same_v<Element, uint32_t>;
  const int64_t images = Draw(1, 2), depth = Draw(1, 40), window = Draw(1, 3);
  const int64_t planes = Draw(1, 3);
  const int64_t height = window + Draw(0, 6), width = window + Draw(0, 6);
  const int64_t columns = Draw(1, 80), panels = (columns + kPanel - 1) / kPanel;
  Job<Element> job = {};
  job.pixel_stride = depth;
  job.row_stride = width * depth;
  job.plane_stride = height * job.row_stride;
  job.image_stride = planes * job.plane_stride;
  job.out_depth = (planes + 1) / 2, job.stride_depth = 2;
  job.stride_height = Draw(1, 2), job.stride_width = Draw(1, 2);
  job.out_height = (height - window) / job.stride_height + 1;
  job.out_width = (width - window) / job.stride_width + 1;
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < window; ++i) offsets.push_back(i * job.row_stride);
  job.offsets = offsets.data(), job.segments = window, job.length = window * depth;
  std::vector<Element> image(images * job.image_stride);
  std::vector<Element> kernel(panels * job.segments * job.length * kPanel);
  Fill(image), Fill(kernel);
  job.image = image.data(), job.kernel = kernel.data(), job.columns = columns;
  std::vector<int32_t> base(4 * panels * kPanel), class_z(job.out_depth);
  std::vector<int32_t> class_y(job.out_height), class_x(job.out_width);
  for (int32_t& b : base) b = static_cast<int32_t>(Draw(-1000, 1000));
  for (int32_t& c : class_z) c = static_cast<int32_t>(Draw(0, 1));
  for (int32_t& c : class_y) c = static_cast<int32_t>(Draw(0, 1));
  job.base = base.data(), job.class_y = class_y.data(), job.class_x = class_x.data();
  job.class_z = class_z.data(), job.classes_y = 2, job.classes_x = 1;
  std::vector<float> scale(panels * kPanel), bias(panels * kPanel), shift(panels * kPanel);
  Fill(scale), Fill(bias), Fill(shift);
  std::vector<Sum> threshold(panels * kPanel);
  for (Sum& t : threshold) t = static_cast<Sum>(Draw(-100, 100));
  std::vector<uint32_t> flip(panels);
  Fill(flip);
  job.epilogue = epilogue, job.scale = scale.data(), job.bias = bias.data();
  job.shift = Draw(0, 1) ? shift.data() : nullptr;
  job.relu = Draw(0, 1), job.threshold = threshold.data(), job.flip = flip.data();
  job.out_stride = epilogue == Epilogue::kThreshold ? panels : columns;
  const int64_t pixels = images * job.out_depth * job.out_height * job.out_width;
  std::vector<uint32_t> ours(pixels * job.out_stride), portable(ours.size());
  std::vector<Element> laid_out(kernel.size());
  for (const Kernels* e : {&engine, &xnor::kPortable}) {
    job.out = e == &engine ? ours.data() : portable.data();
    job.kernel = kernel.data();
    if constexpr (kWords) {
      if (e->lay_out != nullptr && panels > 1) {
        e->lay_out(kernel.data(), panels, job.segments * job.length, laid_out.data());
        job.kernel = laid_out.data();
      }
    }
    const int64_t middle = Draw(0, pixels);
    const int64_t split = std::min(2 * Draw(0, (panels + 1) / 2), panels);
    const auto run = [&] {
      if constexpr (kWords)
        return e->binary;
      else
        return e->real;
    }();
    run(job, 0, middle, 0, panels);
    run(job, middle, pixels, 0, split);
    run(job, middle, pixels, split, panels);
  }
  Expect(ours, portable, kWords ? "binary" : "real", engine.name);
}

void CheckPack(const Kernels& engine) {
  const int64_t pixels = Draw(1, 5), channels = Draw(1, 100);
  const float special[] = {0.0f, -0.0f, 1e-42f, -1e-42f, -INFINITY, NAN, -1.0f, 1.0f};
  std::vector<float> x(pixels * channels);
  for (float& value : x) value = special[Draw(0, 7)];
  std::vector<uint32_t> ours(pixels * ((channels + kPanel - 1) / kPanel));
  std::vector<uint32_t> portable(ours.size());
  engine.pack(x.data(), channels, ours.data(), 0, pixels);
  xnor::kPortable.pack(x.data(), channels, portable.data(), 0, pixels);
  Expect(ours, portable, "pack", engine.name);
}

void CheckSumPool(const Kernels& engine) {
  xnor::PoolJob job = {};
  job.height = Draw(1, 8), job.width = Draw(1, 8), job.channels = Draw(1, 70);
  job.window_height = job.window_width = 3;
  job.stride_height = job.stride_width = 2, job.top = job.left = 1;
  job.out_height = (job.height - 1) / 2 + 1, job.out_width = (job.width - 1) / 2 + 1;
  const int64_t words = (job.channels + kPanel - 1) / kPanel;
  std::vector<float> x(2 * job.height * job.width * job.channels);
  std::vector<float> threshold(words * kPanel);
  std::vector<uint32_t> flip(words);
  Fill(x), Fill(threshold), Fill(flip);
  job.x = x.data(), job.threshold = threshold.data(), job.flip = flip.data();
  std::vector<uint32_t> ours(2 * job.out_height * job.out_width * words);
  std::vector<uint32_t> portable(ours.size());
  job.out = ours.data();
  engine.sum_pool(job, 0, 2 * job.out_height);
  job.out = portable.data();
  xnor::kPortable.sum_pool(job, 0, 2 * job.out_height);
  Expect(ours, portable, "sum_pool", engine.name);
}

void CheckCounts(const Kernels& engine) {
  const int64_t panels = Draw(1, 3), taps = Draw(1, 9), words = Draw(1, 40);
  std::vector<uint32_t> kernel(panels * taps * words * kPanel);
  Fill(kernel);
  std::vector<int32_t> ours(panels * taps * kPanel), portable(ours.size());
  engine.count_taps(kernel.data(), panels, taps, words, ours.data());
  xnor::kPortable.count_taps(kernel.data(), panels, taps, words, portable.data());
  Expect(ours, portable, "count_taps", engine.name);
}

void CheckUnpack(const Kernels& engine) {
  const int64_t pixels = Draw(1, 5), channels = Draw(1, 100);
  std::vector<uint32_t> a(pixels * ((channels + kPanel - 1) / kPanel)), b(a.size());
  Fill(a), Fill(b);
  std::vector<float> ours(pixels * channels), portable(ours.size());
  engine.unpack(a.data(), b.data(), channels, pixels, ours.data());
  xnor::kPortable.unpack(a.data(), b.data(), channels, pixels, portable.data());
  Expect(ours, portable, "unpack", engine.name);
}

void CheckProducts(const Kernels& engine) {
  const int64_t rows = Draw(1, 60), count = Draw(1, 50), columns = Draw(1, 3 * kPanel);
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  std::vector<float> x(1000 + rows), gradient(panels * count * kPanel);
  std::vector<int64_t> pixels(count);
  for (int64_t& pixel : pixels) pixel = Draw(0, 1000);
  Fill(x), Fill(gradient);
  std::vector<float> ours(rows * panels * kPanel);
  Fill(ours);
  std::vector<float> portable = ours;
  for (const auto& [e, sums] : {std::pair(&engine, &ours),
                                std::pair(&xnor::kPortable, &portable)})
    e->add_products(x.data(), rows, pixels.data(), count, gradient.data(), columns,
                    sums->data());
  for (std::vector<float>* sums : {&ours, &portable})
    for (int64_t i = 0; i < rows * panels * kPanel; ++i)
      if (i % (panels * kPanel) >= columns) (*sums)[i] = 0;
  Expect(ours, portable, "add_products", engine.name);
}

// Against one number after another: only sets with vectors have the kernel.
void CheckReduce(const Kernels& engine) {
  const int64_t count = Draw(1, 10), channels = Draw(1, 200);
  const float special[] = {0.0f, -0.0f, -INFINITY, INFINITY, NAN, -1.0f, 1.0f, 2.0f};
  for (const Reduction function : {Reduction::kSum, Reduction::kMax}) {
    std::vector<float> x((count + 1) * channels);
    Fill(x);
    if (function == Reduction::kMax)
      for (float& value : x) value = special[Draw(0, 7)];
    std::vector<const float*> rows;
    for (int64_t r = 1; r <= count; ++r) rows.push_back(x.data() + r * channels);
    std::vector<float> ours(x.begin(), x.begin() + channels), wanted = ours;
    const int64_t done =
        engine.reduce(function, rows.data(), count, channels, ours.data());
    if (done < 0 || done > channels || (channels >= 64 && done < 64)) {
      std::fprintf(stderr, "%s: reduce did %d channels\n", engine.name,
                   static_cast<int>(done));
      std::exit(1);
    }
    for (const float* row : rows)
      for (int64_t c = 0; c < done; ++c) {
        const float a = wanted[c], b = row[c];
        wanted[c] = function == Reduction::kSum ? a + b : a > b || a != a ? a : b;
      }
    Expect(ours, wanted, "reduce", engine.name);
  }
}

}  // namespace

int main() {
  std::vector<const Kernels*> engines;
#if defined(XNOR_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    engines.push_back(&xnor::kAvx2);
  if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bw"))
    engines.push_back(&xnor::kAvx512);
#elif defined(XNOR_ARM64)
  engines.push_back(&xnor::kNeon);
#endif
  for (const Kernels* engine : engines) {
    for (int i = 0; i < 500; ++i) {
      for (Epilogue e : {Epilogue::kSums, Epilogue::kAffine, Epilogue::kThreshold}) {
        CheckConvolution<uint32_t, int32_t>(*engine, e);
        CheckConvolution<float, float>(*engine, e);
      }
      CheckPack(*engine);
      CheckSumPool(*engine);
      CheckCounts(*engine);
      CheckUnpack(*engine);
      CheckProducts(*engine);
      CheckReduce(*engine);
    }
    std::printf("%s\n", engine->name);
  }
}
