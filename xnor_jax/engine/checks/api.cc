// Tests of the C API: a network against plain loops; threads; memory; errors.
#include "xnor.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "file_writer.h"

namespace {
std::atomic<long> allocations{0};
}

void* operator new(size_t size) {
  ++allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace {

void Expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s (%s)\n", what, xnor_error());
  std::exit(1);
}

using checks::Network;
constexpr int kImage = Network::kHeight * Network::kWidth * Network::kIn;

void CheckNetwork(uint32_t seed, int images) {
  const Network network(seed);
  const std::string file = network.File();
  xnor_model* m = nullptr;
  Expect(xnor_load_memory(file.data(), file.size(), &m) == XNOR_OK, "the file is read");
  Expect(xnor_input_rank(m) == 3 && xnor_input_shape(m)[1] == 6, "its shape is known");
  Expect(xnor_output_rank(m) == 1 && xnor_output_shape(m)[0] == 3, "3 logits come out");
  Expect(std::string(xnor_name(m)) == "small" && xnor_dataset(m) == nullptr, "its name");
  Expect(xnor_class_count(m) == 3 && std::string(xnor_class_name(m, 2)) == "c" &&
             xnor_class_name(m, 3) == nullptr,
         "its classes");
  Expect(xnor_node_count(m) == 6 && std::string(xnor_node_kind(m, 4)) == "reshape",
         "its nodes");
  xnor_preprocessing pixels;
  Expect(xnor_get_preprocessing(m, &pixels) && pixels.channels == 2 &&
             pixels.std[1] == 0.125f && pixels.resize == 0,
         "its preprocessing");

  checks::Numbers numbers(seed + 1);
  const std::vector<float> x = numbers.Floats(images * kImage);
  std::vector<float> wanted;
  for (int n = 0; n < images; ++n)
    for (float logit : network.Logits(x.data() + n * kImage)) wanted.push_back(logit);
  for (int threads : {1, 2, 5, 0}) {
    std::vector<float> got(wanted.size());
    Expect(xnor_run(m, x.data(), images, got.data(), threads) == XNOR_OK, "it runs");
    Expect(got == wanted, "the logits are the network's");
    const long before = allocations;
    for (int again = 0; again < 3; ++again)
      xnor_run(m, x.data(), images, got.data(), threads);
    Expect(allocations == before, "a second run allocates nothing");
  }

  // Several callers at a time, each with its own threads.
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&, caller] {
      std::vector<float> got(wanted.size());
      for (int again = 0; again < 5; ++again) {
        if (xnor_run(m, x.data(), images, got.data(), 1 + caller % 2) != XNOR_OK) ++wrong;
        if (got != wanted) ++wrong;
      }
    });
  for (std::thread& caller : callers) caller.join();
  Expect(wrong == 0, "many threads run one model");

  std::vector<uint8_t> bytes(images * kImage);
  std::vector<float> floats(bytes.size()), got(wanted.size()), other(wanted.size());
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<uint8_t>(numbers.Draw(0, 255));
    floats[i] = (static_cast<float>(bytes[i]) / 255.0f - (i % 2 ? 0.25f : 0.5f)) /
                (i % 2 ? 0.125f : 0.5f);
  }
  Expect(xnor_run_uint8(m, bytes.data(), images, got.data(), 2) == XNOR_OK, "of pixels");
  xnor_run(m, floats.data(), images, other.data(), 1);
  Expect(got == other, "pixels are preprocessed");
  xnor_free(m);
}

// A forked process has a model but none of the threads that ran it.
void CheckFork() {
  const int images = 700;
  const std::string file = Network(9).File();
  xnor_model* m = nullptr;
  Expect(xnor_load_memory(file.data(), file.size(), &m) == XNOR_OK, "the file is read");
  const std::vector<float> x = checks::Numbers(10).Floats(images * kImage);
  std::vector<float> wanted(images * 3);
  Expect(xnor_run(m, x.data(), images, wanted.data(), 3) == XNOR_OK, "it runs");
  for (const bool runs : {true, false}) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      std::vector<float> got(wanted.size());
      if (runs) {
        Expect(xnor_run(m, x.data(), images, got.data(), 3) == XNOR_OK, "a child runs");
        Expect(got == wanted, "a child's logits are the same");
      }
      xnor_free(m);
      _exit(0);
    }
    int status = -1;
    Expect(child > 0 && waitpid(child, &status, 0) == child, "a process forks");
    Expect(status == 0, "a child ends");
  }
  xnor_free(m);
}

void CheckErrors() {
  const std::string file = Network(7).File();
  xnor_model* m = nullptr;
  Expect(xnor_load("/nonexistent/file", &m) == XNOR_IO_ERROR && m == nullptr &&
             std::string(xnor_error()).find("/nonexistent/file") == 0,
         "a file that is not there");
  Expect(xnor_load("/", &m) == XNOR_INVALID_FILE, "a folder");
  Expect(xnor_load(nullptr, &m) == XNOR_INVALID_ARGUMENT, "no path");
  Expect(xnor_load_memory(file.data(), file.size() - 1, &m) == XNOR_INVALID_FILE &&
             m == nullptr && *xnor_error() != 0,
         "a file that is cut off");
  // Bytes at an odd address.
  const std::string odd = "x" + file;
  Expect(xnor_load_memory(odd.data() + 1, file.size(), &m) == XNOR_OK, "an odd place");
  float x[kImage] = {}, y[3];
  Expect(xnor_run(nullptr, x, 1, y, 1) == XNOR_INVALID_ARGUMENT, "no model");
  Expect(xnor_run(m, nullptr, 1, y, 1) == XNOR_INVALID_ARGUMENT, "no images");
  Expect(xnor_run(m, x, 1, nullptr, 1) == XNOR_INVALID_ARGUMENT, "no logits");
  Expect(xnor_run(m, x, 1, y, -1) == XNOR_INVALID_ARGUMENT, "no threads");
  Expect(xnor_run(m, nullptr, 0, nullptr, 1) == XNOR_OK, "no images at all");
  xnor_free(m);
  xnor_free(nullptr);
}

}  // namespace

int main() {
  for (uint32_t seed = 0; seed < 3; ++seed)
    for (int images : {1, 3, 130}) CheckNetwork(seed, images);
  CheckNetwork(9, 700);  // in chunks, on several threads
  CheckFork();
  CheckErrors();
  std::puts(xnor_instruction_set());
}
