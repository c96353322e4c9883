// Packs flags in bytes into words of signs, for backward passes.
#include <cstdint>
#include <cstring>
#include <memory>

#include "operation_numbers.h"

namespace xnor {
namespace {

// From bytes of flags to words: for each pixel, all words of flag 0, then of flag 1, ...
class PackFlags : public Operation {
 public:
  PackFlags(const Shape& in, int64_t flags)
      : Operation({Type::kWords, in.height, in.width, Times(WordsFor(in.depth), flags)}),
        channels_(in.depth), flags_(flags) {
    work = kOnce * static_cast<double>(in.size());
  }
  void Run(const Call& call) const override {
    InParts(call.team, call.images * out.pixels(), channels_, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel)
        Pixel(static_cast<const uint8_t*>(call.in[0]) + pixel * channels_,
              static_cast<uint32_t*>(call.out) + pixel * out.depth);
    });
  }

 private:
  void Pixel(const uint8_t* x, uint32_t* y) const {
    const int64_t words = WordsFor(channels_);
    for (int64_t word = 0; word < words; ++word) {
      const int64_t rest = channels_ - word * kPanel;
      uint64_t eights[kPanel / 8] = {};
      if (rest < kPanel)
        std::memcpy(eights, x + word * kPanel, rest);
      else
        std::memcpy(eights, x + word * kPanel, kPanel);  // Constant size: inlined.
      for (int64_t flag = 0; flag < flags_; ++flag) {
        uint32_t bits = 0;
        for (int i = 0; i < kPanel / 8; ++i)
          bits |= Gathered(eights[i] >> flag) << (8 * i);
        y[flag * words + word] = bits;
      }
    }
  }
  // The lowest bits of eight bytes.
  static uint32_t Gathered(uint64_t bytes) {
    return ((bytes & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
  }

  const int64_t channels_, flags_;
};

}  // namespace

std::unique_ptr<Operation> MakePackFlags(const Shape& in,
                                         const OperationNumbers& numbers) {
  Require(in.type == Type::kBytes, "expected bytes");
  Require(numbers.channels >= 1 && numbers.channels <= 8, "expected 1 to 8 flags");
  return std::make_unique<PackFlags>(in, numbers.channels);
}

}  // namespace xnor
