// The `xnor` command: describes, runs and benchmarks packed networks.
#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "xnor.h"

namespace {

constexpr char kUsage[] =
    "usage: xnor info FILE                describe the network\n"
    "       xnor run FILE < raw > logits  float32 images in, float32 logits out\n"
    "       xnor bench FILE               median milliseconds per call\n"
    "options: --threads N  at most N threads (default 0: one per processor)\n"
    "         --uint8      for run: uint8 pixels in, preprocessed as the file specifies\n"
    "         --batch N    for run: at most N images per call (default 64);\n"
    "                      for bench: N images per call (default: 1, then 128)\n";

// Prints one line and exits; status 2 for a wrong argument, 1 for anything else.
[[noreturn]] void Fail(int status, const std::string& text) {
  std::fprintf(stderr, "xnor: %s\n", text.c_str());
  std::exit(status);
}

void Check(xnor_status status) {
  if (status != XNOR_OK) Fail(1, xnor_error());
}

// What was printed has arrived; a full disk or a closed output is an error.
void Flush() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    Fail(1, std::string("standard output: ") + std::strerror(errno));
}

struct Options {
  std::string command, file;
  int threads = 0;
  size_t batch = 0;
  bool pixels = false;
};

size_t Number(const char* name, const char* text, size_t largest) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long number =
      text == nullptr || *text < '0' || *text > '9' ? 0 : std::strtoull(text, &end, 10);
  if (end == nullptr || *end != 0 || errno != 0 || number > largest)
    Fail(2, std::string(name) + ": expected a whole number of at most " +
                std::to_string(largest));
  return static_cast<size_t>(number);
}

Options Parse(int count, char** arguments) {
  Options options;
  std::vector<std::string> plain;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const char* next = i + 1 < count ? arguments[i + 1] : nullptr;
    if (argument == "-h" || argument == "--help") {
      std::fputs(kUsage, stdout);
      Flush();
      std::exit(0);
    } else if (argument == "--uint8") {
      options.pixels = true;
    } else if (argument == "--threads") {
      options.threads = static_cast<int>(Number("--threads", next, 1024)), ++i;
    } else if (argument == "--batch") {
      options.batch = Number("--batch", next, 1 << 16), ++i;
      if (options.batch == 0) Fail(2, "--batch: expected 1 or more");
    } else if (argument.size() > 1 && argument[0] == '-') {
      Fail(2, "unknown option " + argument + "; see xnor --help");
    } else {
      plain.push_back(argument);
    }
  }
  if (plain.size() != 2) Fail(2, "expected a command and a file; see xnor --help");
  options.command = plain[0], options.file = plain[1];
  return options;
}

size_t Product(const int64_t* shape, size_t rank) {
  size_t product = 1;
  for (size_t i = 0; i < rank; ++i) product *= static_cast<size_t>(shape[i]);
  return product;
}

size_t InputSize(const xnor_model* m) {
  return Product(xnor_input_shape(m), xnor_input_rank(m));
}

size_t OutputSize(const xnor_model* m) {
  return Product(xnor_output_shape(m), xnor_output_rank(m));
}

std::string Shape(const int64_t* shape, size_t rank) {
  std::string text;
  for (size_t i = 0; i < rank; ++i)
    text += (i > 0 ? " x " : "") + std::to_string(shape[i]);
  return text;
}

void Info(const xnor_model* m) {
  const auto line = [](const char* what, const std::string& text) {
    std::printf("%-16s %s\n", what, text.c_str());
  };
  if (xnor_name(m) != nullptr) line("name", xnor_name(m));
  if (xnor_dataset(m) != nullptr) line("dataset", xnor_dataset(m));
  line("input", Shape(xnor_input_shape(m), xnor_input_rank(m)));
  line("output", Shape(xnor_output_shape(m), xnor_output_rank(m)));
  if (xnor_test_accuracy(m) >= 0)
    std::printf("%-16s %.2f %%\n", "test accuracy", 100 * xnor_test_accuracy(m));
  xnor_preprocessing pixels;
  if (xnor_get_preprocessing(m, &pixels)) {
    std::printf("%-16s (x / 255 - mean) / std, mean", "preprocessing");
    for (size_t c = 0; c < pixels.channels; ++c) std::printf(" %g", pixels.mean[c]);
    std::printf(", std");
    for (size_t c = 0; c < pixels.channels; ++c) std::printf(" %g", pixels.std[c]);
    if (pixels.resize > 0) std::printf(", pictures resized to %zu", pixels.resize);
    std::printf("\n");
  }
  std::string classes;
  for (size_t i = 0; i < xnor_class_count(m); ++i)
    classes += (i > 0 ? ", " : "") + std::string(xnor_class_name(m, i));
  if (!classes.empty()) line("classes", classes);
  line("instructions", xnor_instruction_set());
  std::printf("%-16s %zu\n", "nodes", xnor_node_count(m));
  for (size_t i = 0; i < xnor_node_count(m); ++i)
    std::printf("  %4zu %-15s %s\n", i, xnor_node_kind(m, i), xnor_node_name(m, i));
}

// Reads up to `size` bytes, and at least `least` unless the input ends.
size_t ReadBytes(char* to, size_t size, size_t least) {
  size_t count = 0;
  while (count < least) {
    const ssize_t now = read(STDIN_FILENO, to + count, size - count);
    if (now < 0 && errno == EINTR) continue;
    if (now < 0) Fail(1, std::string("standard input: ") + std::strerror(errno));
    if (now == 0) break;
    count += static_cast<size_t>(now);
  }
  return count;
}

// Streams images: runs those that have arrived and writes their logits before it reads on.
void Run(const xnor_model* m, const Options& options) {
  const size_t each = InputSize(m) * (options.pixels ? 1 : sizeof(float));
  const size_t batch = options.batch > 0 ? options.batch : 64;
  const std::unique_ptr<float[]> images(new float[(batch * each + 3) / 4]);
  const std::unique_ptr<float[]> logits(new float[batch * OutputSize(m)]);
  char* const bytes = reinterpret_cast<char*>(images.get());
  size_t held = 0;
  for (;;) {
    held += ReadBytes(bytes + held, batch * each - held, each - held);
    const size_t count = held / each;
    if (count == 0) break;
    Check(options.pixels
              ? xnor_run_uint8(m, reinterpret_cast<const uint8_t*>(bytes), count,
                               logits.get(), options.threads)
              : xnor_run(m, images.get(), count, logits.get(), options.threads));
    std::fwrite(logits.get(), sizeof(float) * OutputSize(m), count, stdout);
    Flush();
    held -= count * each;
    std::memmove(bytes, bytes + count * each, held);
  }
  if (held > 0)
    Fail(1, "standard input: the last image is incomplete: expected " +
                std::to_string(each) + " bytes, got " + std::to_string(held));
}

void Bench(const xnor_model* m, const Options& options) {
  using Clock = std::chrono::steady_clock;
  const std::vector<size_t> batches =
      options.batch > 0 ? std::vector<size_t>{options.batch} : std::vector<size_t>{1, 128};
  for (size_t batch : batches) {
    std::vector<float> images(batch * InputSize(m)), logits(batch * OutputSize(m));
    uint32_t state = 1;
    for (float& x : images) {
      state = state * 1664525u + 1013904223u;
      x = static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
    }
    std::vector<double> times;
    double total = 0;
    for (int call = 0; call < 3 || (total < 1000 && call < 100000); ++call) {
      const auto begin = Clock::now();
      Check(xnor_run(m, images.data(), batch, logits.data(), options.threads));
      const std::chrono::duration<double, std::milli> time = Clock::now() - begin;
      total += time.count();
      if (call > 0) times.push_back(time.count());  // The first call allocates.
    }
    std::sort(times.begin(), times.end());
    const double median = times[times.size() / 2];
    std::printf("batch %4zu: %10.4f ms (least %.4f), %.0f images/s\n", batch, median,
                times[0], 1000 * static_cast<double>(batch) / median);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const Options options = Parse(count, arguments);
  const bool info = options.command == "info", run = options.command == "run";
  if (!info && !run && options.command != "bench")
    Fail(2, "unknown command " + options.command + "; expected info, run or bench");
  xnor_model* m = nullptr;
  Check(xnor_load(options.file.c_str(), &m));
  const std::unique_ptr<xnor_model, void (*)(xnor_model*)> model(m, &xnor_free);
  try {
    if (info)
      Info(m);
    else if (run)
      Run(m, options);
    else
      Bench(m, options);
  } catch (const std::bad_alloc&) {
    Fail(1, "out of memory");
  }
  Flush();
  return 0;
}
