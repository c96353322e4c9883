// Structure-aware damage to packed networks' files.
#ifndef XNOR_CHECKS_DAMAGE_H_
#define XNOR_CHECKS_DAMAGE_H_

#include <algorithm>
#include <iterator>
#include <string>

#include "file_writer.h"

namespace checks {

// Mutations that the parser does not reject at once: numbers and words of the description.
inline std::string Changed(std::string text, Numbers& numbers) {
  static const char* const kWords[] = {
      "0", "-1", "1", "2", "7", "31", "33", "64", "4096", "65536", "16777216", "16777217",
      "268435456", "2147483647", "4294967296", "9223372036854775807", "1e9", "1.5", "null",
      "true", "[]", "{}", "[1]", "[1,1]", "[1,1,1]", "[[0,0]]", "[[1,1],[1,1]]", "\"\"",
      "\"conv\"", "\"threshold\"", "\"affine\"", "\"sum\"", "\"max\"", "[16777216,16777216]",
      "[268435456]", "[8,8,8,8,8,8,8,8]", "[4096,1,4096]", "99999999999999999999999"};
  static const char* const kKinds[] = {
      "binary_conv", "conv", "matmul", "sign", "max_pool_bits", "sum_pool_bits", "pool",
      "norm", "mean", "elementwise", "reduce", "reshape", "transpose", "broadcast", "slice",
      "pad", "concatenate", "take", "constant"};
  static const char* const kNames[] = {
      "window", "features", "strides", "padding", "dilation", "groups", "epilogue",
      "function", "operands", "shapes", "exponent", "axes", "shape", "order", "start",
      "stop", "value", "axis", "inputs", "name", "parameters"};
  const auto pick = [&](const auto& from) {
    return std::string(from[numbers.Draw(0, static_cast<int>(std::size(from)) - 1)]);
  };
  const int changes = numbers.Draw(1, 3);
  for (int change = 0; change < changes && !text.empty(); ++change) {
    const int at = numbers.Draw(0, static_cast<int>(text.size()) - 1);
    switch (numbers.Draw(0, 4)) {
      case 0: {  // a number
        const size_t first = text.find_first_of("0123456789", at);
        if (first == std::string::npos) break;
        const size_t last = std::min(text.find_first_not_of("0123456789", first), text.size());
        text.replace(first, last - first, pick(kWords));
        break;
      }
      case 1: {  // a list
        const size_t first = text.find('[', at), last = text.find(']', first);
        if (last == std::string::npos) break;
        text.replace(first, last + 1 - first, pick(kWords));
        break;
      }
      case 2: {  // a node's kind
        const size_t first = text.find("\"kind\":\"", at);
        if (first == std::string::npos) break;
        const size_t last = text.find('"', first + 8);
        text.replace(first + 8, last - first - 8, pick(kKinds));
        break;
      }
      case 3: {  // an extra entry
        const size_t first = text.find("{\"kind\"", at);
        if (first == std::string::npos) break;
        text.insert(first + 1, "\"" + pick(kNames) + "\":" + pick(kWords) + ",");
        break;
      }
      default: text[at] = static_cast<char>(numbers.Draw(0, 255));
    }
  }
  return text;
}

inline std::string Damaged(const Network& network, Numbers& numbers) {
  const std::string description = Network::Description();
  std::string data = network.Data(), file = network.File();
  const int size = static_cast<int>(data.size()), all = static_cast<int>(file.size());
  switch (numbers.Draw(0, 7)) {
    case 0:  // bytes anywhere
      for (int i = numbers.Draw(1, 4); i > 0; --i)
        file[numbers.Draw(0, all - 1)] = static_cast<char>(numbers.Draw(0, 255));
      return file;
    case 1: return file.substr(0, numbers.Draw(0, all));
    case 2:  // numbers
      for (int i = numbers.Draw(1, 4); i > 0; --i)
        data[numbers.Draw(0, size - 1)] = static_cast<char>(numbers.Draw(0, 255));
      return File(description, network.Entries(), data);
    case 3:
      data.resize(numbers.Draw(0, 2 * size));
      return File(description, network.Entries(), data);
    case 4: return File(description, Changed(network.Entries(), numbers), data);
    default:
      return File(Changed(description, numbers), network.Entries(), data);
  }
}

}  // namespace checks

#endif  // XNOR_CHECKS_DAMAGE_H_
