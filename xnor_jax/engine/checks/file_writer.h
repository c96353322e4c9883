// Writes a packed network's file with random weights, without Python.
#ifndef XNOR_CHECKS_FILE_WRITER_H_
#define XNOR_CHECKS_FILE_WRITER_H_

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

namespace checks {

inline std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

// zlib's CRC-32.
inline uint32_t Crc32(const std::string& bytes) {
  static const std::vector<uint32_t> table = [] {
    std::vector<uint32_t> sums(256);
    for (uint32_t byte = 0; byte < 256; ++byte) {
      sums[byte] = byte;
      for (int bit = 0; bit < 8; ++bit)
        sums[byte] = sums[byte] >> 1 ^ (sums[byte] & 1 ? 0xedb88320u : 0);
    }
    return sums;
  }();
  uint32_t sum = ~0u;
  for (char byte : bytes) sum = sum >> 8 ^ table[(sum ^ static_cast<uint8_t>(byte)) & 255];
  return ~sum;
}

struct Array {
  std::string name, dtype, shape, bytes;
};

// safetensors: the length of the header, the header, the contiguous arrays.
inline std::string Joined(std::string header, const std::string& data) {
  while (header.size() % 8 != 0) header += " ";
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> 8 * i);
  return length + header + data;
}

// `entries`: the header's entries of all arrays.
inline std::string File(const std::string& description, const std::string& entries,
                        const std::string& data) {
  char sum[9];
  std::snprintf(sum, sizeof(sum), "%08x", Crc32(description + data));
  return Joined("{\"__metadata__\":{\"xnor_jax\":" + Quoted(description) +
                    ",\"crc32\":\"" + sum + "\"}" + entries + "}",
                data);
}

class Numbers {
 public:
  explicit Numbers(uint32_t seed) : generator_(seed) {}

  int Draw(int least, int most) {
    return std::uniform_int_distribution<int>(least, most)(generator_);
  }
  // Multiples of 1/4, so that sums of their products are exact in any order.
  std::vector<float> Floats(int count) {
    std::vector<float> floats(count);
    for (float& x : floats) x = static_cast<float>(Draw(-8, 8)) / 4;
    return floats;
  }
  std::vector<int> Signs(int count) {
    std::vector<int> signs(count);
    for (int& s : signs) s = Draw(0, 1) ? 1 : -1;
    return signs;
  }

 private:
  std::mt19937 generator_;
};

template <class T>
std::string Bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

inline std::string Bits(const std::vector<int>& signs) {
  std::string bytes((signs.size() + 7) / 8, '\0');
  for (size_t i = 0; i < signs.size(); ++i)
    if (signs[i] < 0) bytes[i / 8] = static_cast<char>(bytes[i / 8] | 1 << i % 8);
  return bytes;
}

constexpr char kLayout[] =
    "bit 1 is -1; least significant bit first; C order of [*window, in, out]";

// Images 5 x 6 x 2; a real convolution to 35 channels with a threshold; a padded binary one
// of five groups to 20 channels with ReLU; its product with 0.5, summed over all pixels; a
// dense layer to three classes. `Logits` computes the same in plain loops.
struct Network {
  static constexpr int kHeight = 5, kWidth = 6, kIn = 2, kInner = 35, kOut = 20,
                       kClasses = 3, kGroups = 5;
  std::vector<float> kernel0, threshold0, scale1, bias1, kernel5, bias5;
  std::vector<int> flip0, kernel1;

  explicit Network(uint32_t seed) {
    Numbers numbers(seed);
    kernel0 = numbers.Floats(9 * kIn * kInner), threshold0 = numbers.Floats(kInner);
    flip0 = numbers.Signs(kInner), kernel1 = numbers.Signs(4 * kInner / kGroups * kOut);
    scale1 = numbers.Floats(kOut), bias1 = numbers.Floats(kOut);
    kernel5 = numbers.Floats(kOut * kClasses), bias5 = numbers.Floats(kClasses);
  }

  static std::string Description() {
    return std::string("{\"format\":\"xnor_jax packed network\",\"version\":3,\"layout\":\"") +
           kLayout +
           "\",\"image_shape\":[5,6,2],\"name\":\"small\",\"class_names\":[\"a\",\"b\","
           "\"c\"],\"preprocessing\":{\"mean\":[0.5,0.25],\"std\":[0.5,0.125]},\"nodes\":["
           "{\"kind\":\"conv\",\"inputs\":[0],\"window\":[3,3],\"features\":35,\"strides\":"
           "[1,1],\"padding\":[[1,1],[1,1]],\"dilation\":[1,1],\"epilogue\":\"threshold\"},"
           "{\"kind\":\"binary_conv\",\"inputs\":[1],\"window\":[2,2],\"features\":20,"
           "\"strides\":[2,1],\"padding\":[[0,1],[1,0]],\"dilation\":[1,1],\"groups\":5,"
           "\"epilogue\":\"affine_relu\"},"
           "{\"kind\":\"elementwise\",\"inputs\":[2],\"function\":\"mul\",\"operands\":"
           "[0,-1],\"shapes\":[[],[1]]},"
           "{\"kind\":\"reduce\",\"inputs\":[3],\"function\":\"sum\",\"axes\":[1,2]},"
           "{\"kind\":\"reshape\",\"inputs\":[4],\"shape\":[20]},"
           "{\"kind\":\"conv\",\"inputs\":[5],\"features\":3}]}";
  }

  std::vector<Array> Arrays() const {
    const auto list = [](std::initializer_list<int> sizes) {
      std::string text;
      for (int size : sizes) text += (text.empty() ? "[" : ",") + std::to_string(size);
      return text + "]";
    };
    return {{"0.kernel", "F32", list({3, 3, kIn, kInner}), Bytes(kernel0)},
            {"0.threshold", "F32", list({kInner}), Bytes(threshold0)},
            {"1.scale", "F32", list({kOut}), Bytes(scale1)},
            {"1.bias", "F32", list({kOut}), Bytes(bias1)},
            {"2.constant1", "F32", "[1]", Bytes(std::vector<float>{0.5f})},
            {"5.kernel", "F32", list({kOut, kClasses}), Bytes(kernel5)},
            {"5.bias", "F32", list({kClasses}), Bytes(bias5)},
            {"0.flip", "U8", list({(kInner + 7) / 8}), Bits(flip0)},
            {"1.kernel", "U8", list({static_cast<int>(kernel1.size() + 7) / 8}),
             Bits(kernel1)}};
  }

  // The header's entries, each after a comma.
  std::string Entries() const {
    std::string entries;
    size_t at = 0;
    for (const Array& array : Arrays()) {
      entries += "," + Quoted(array.name) + ":{\"dtype\":\"" + array.dtype +
                 "\",\"shape\":" + array.shape + ",\"data_offsets\":[" +
                 std::to_string(at) + "," + std::to_string(at + array.bytes.size()) + "]}";
      at += array.bytes.size();
    }
    return entries;
  }

  std::string Data() const {
    std::string data;
    for (const Array& array : Arrays()) data += array.bytes;
    return data;
  }

  std::string File() const { return checks::File(Description(), Entries(), Data()); }

  std::vector<float> Logits(const float* image) const {
    constexpr int kEach = kInner / kGroups, kColumns = kOut / kGroups;
    const auto outside = [](int y, int x) {
      return y < 0 || y >= kHeight || x < 0 || x >= kWidth;
    };
    std::vector<int> signs(kHeight * kWidth * kInner);
    for (int y = 0; y < kHeight; ++y)
      for (int x = 0; x < kWidth; ++x)
        for (int o = 0; o < kInner; ++o) {
          float sum = 0;
          for (int tap = 0; tap < 9; ++tap)
            for (int c = 0; c < kIn && !outside(y + tap / 3 - 1, x + tap % 3 - 1); ++c)
              sum += image[((y + tap / 3 - 1) * kWidth + x + tap % 3 - 1) * kIn + c] *
                     kernel0[(tap * kIn + c) * kInner + o];
          signs[(y * kWidth + x) * kInner + o] = (sum < threshold0[o] ? -1 : 1) * flip0[o];
        }
    std::vector<float> total(kOut);
    for (int y = 0; y < 3; ++y)
      for (int x = 0; x < kWidth; ++x)
        for (int o = 0; o < kOut; ++o) {
          int sum = 0;
          for (int tap = 0; tap < 4; ++tap) {
            const int at_y = 2 * y + tap / 2, at_x = x + tap % 2 - 1;
            for (int c = 0; c < kEach && !outside(at_y, at_x); ++c)
              sum += signs[(at_y * kWidth + at_x) * kInner + o / kColumns * kEach + c] *
                     kernel1[(tap * kEach + c) * kOut + o];
          }
          const float value = scale1[o] * static_cast<float>(sum) + bias1[o];
          total[o] += (value < 0 ? 0 : value) * 0.5f;
        }
    std::vector<float> logits = bias5;
    for (int k = 0; k < kClasses; ++k)
      for (int o = 0; o < kOut; ++o) logits[k] += total[o] * kernel5[o * kClasses + k];
    return logits;
  }
};

}  // namespace checks

#endif  // XNOR_CHECKS_FILE_WRITER_H_
