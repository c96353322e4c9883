// A libFuzzer target for the reader, and for runs of what it reads. Build with clang and
// -DXNOR_FUZZ=ON; `fuzz_reader CORPUS -runs=1000000 -timeout=30`, where CORPUS is a folder.
//
// An input is a file's description, a zero byte, the header's entries of the arrays, a zero
// byte, and the data section. The target adds the header around them and the checksum,
// which no fuzzer would find.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "damage.h"
#include "xnor.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

struct Parts {
  std::string description, entries, data;

  static Parts Of(const std::string& input) {
    const size_t first = std::min(input.find('\0'), input.size());
    const size_t second = std::min(input.find('\0', first + 1), input.size());
    const auto between = [&](size_t from, size_t to) {
      return from < to ? input.substr(from, to - from) : std::string();
    };
    return {input.substr(0, first), between(first + 1, second),
            between(second + 1, input.size())};
  }
  std::string Joined() const { return description + '\0' + entries + '\0' + data; }
};

int64_t Product(size_t rank, const int64_t* shape) {
  int64_t size = 1;
  for (size_t i = 0; i < rank; ++i) size *= shape[i];
  return size;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  const Parts parts = Parts::Of({reinterpret_cast<const char*>(bytes), size});
  const std::string file = checks::File(parts.description, parts.entries, parts.data);
  xnor_model* m = nullptr;
  const xnor_status status = xnor_load_memory(file.data(), file.size(), &m);
  if (status != XNOR_OK) {
    if (status != XNOR_INVALID_FILE || m != nullptr || *xnor_error() == 0) std::abort();
    return 0;
  }
  const int64_t in = Product(xnor_input_rank(m), xnor_input_shape(m));
  const int64_t out = Product(xnor_output_rank(m), xnor_output_shape(m));
  constexpr int64_t kMost = 1 << 12;  // numbers, so that a run takes little time
  if (in <= kMost && out <= kMost) {
    std::vector<float> images(2 * in, 0.5f), logits(2 * out);
    if (xnor_run(m, images.data(), 2, logits.data(), 1) != XNOR_OK) std::abort();
  }
  xnor_free(m);
  return 0;
}

// Half of the mutations know the format; they start from a whole network.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* bytes, size_t size, size_t max_size,
                                          unsigned seed) {
  checks::Numbers numbers(seed);
  Parts parts = Parts::Of({reinterpret_cast<const char*>(bytes), size});
  if (parts.description.size() < 16) {
    const checks::Network network(numbers.Draw(0, 7));
    parts = {checks::Network::Description(), network.Entries(), network.Data()};
  } else if (numbers.Draw(0, 1) == 0) {
    return LLVMFuzzerMutate(bytes, size, max_size);
  } else if (numbers.Draw(0, 3) == 0) {
    parts.entries = checks::Changed(parts.entries, numbers);
  } else {
    parts.description = checks::Changed(parts.description, numbers);
  }
  const std::string joined = parts.Joined().substr(0, max_size);
  std::memcpy(bytes, joined.data(), joined.size());
  return joined.size();
}
