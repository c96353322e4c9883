#include "arrays.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "graph.h"

namespace xnor {
namespace {

template <class T>
T Load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

bool LittleEndian() { return Load<uint8_t>(reinterpret_cast<const uint8_t*>("\1\0")) == 1; }
static_assert(sizeof(float) == 4);

}  // namespace

const char* Member::stored_dtype() const {
  if (signs()) return "U8";
  if (kind == kIntegers) return bound <= 32767 ? "I16" : "I32";
  return kind == kIndices ? "I32" : "F32";
}

Sizes Member::stored_shape() const {
  if (signs()) return {(Product(shape) + 7) / 8};
  return shape;
}

int64_t Member::stored_bytes() const {
  const std::string dtype = stored_dtype();
  return Times(Product(stored_shape()), dtype == "U8" ? 1 : dtype == "I16" ? 2 : 4);
}

Sizes Member::laid_out() const {
  if (kind == kFlip) return {WordsFor(Product(shape))};
  if (kind != kKernel) return shape;
  const int64_t c_in = shape[shape.size() - 2], each = shape.back() / groups;
  Sizes sizes = {groups, WordsFor(each)};
  sizes.insert(sizes.end(), shape.begin(), shape.end() - 2);
  sizes.push_back(WordsFor(c_in)), sizes.push_back(kPanel);
  return sizes;
}

int64_t Member::memory() const {
  return Times(4, Product(kind == kKernel ? laid_out() : shape));
}

void CheckIndices(const std::vector<int32_t>& indices, int64_t count,
                  const std::string& name) {
  for (int32_t index : indices)
    Require(index >= 0 && index < count, name + ": an index is out of range");
}

const float* Arrays::KeptFloats(const std::string& name) const {
  return graph_.Keep(Floats(name));
}

const std::pair<Member, const uint8_t*>& StoredArrays::Find(const std::string& name) const {
  for (const auto& array : arrays_)
    if (array.first.name == name) return array;
  throw Refusal("there is no array " + name);
}

std::vector<float> StoredArrays::Floats(const std::string& name) const {
  const auto& [member, data] = Find(name);
  Require(LittleEndian(), "expected a little-endian processor");
  const int64_t count = Product(member.shape);
  graph_.Reserve(4 * count);
  std::vector<float> floats(count);
  std::memcpy(floats.data(), data, count * sizeof(float));
  const bool infinite = member.kind == Member::kReals;
  for (float x : floats)
    Require(std::isfinite(x) || (infinite && std::isinf(x)),
            name + ": expected finite numbers");
  return floats;
}

const int32_t* StoredArrays::Integers(const std::string& name) const {
  const auto& [member, data] = Find(name);
  const int64_t count = Product(member.shape);
  const bool narrow = member.bound <= 32767;
  graph_.Reserve(4 * count);
  std::vector<int32_t> integers(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number =
        narrow ? Load<int16_t>(data + 2 * i) : Load<int32_t>(data + 4 * i);
    Require(std::abs(number) <= member.bound,
            name + ": a threshold is out of range");
    // -bound stands for the least int32: a channel whose sign is constant.
    integers[i] = number == -member.bound ? std::numeric_limits<int32_t>::min()
                                          : static_cast<int32_t>(number);
  }
  return graph_.Keep(std::move(integers));
}

std::vector<int32_t> StoredArrays::Indices(const std::string& name) const {
  const auto& [member, data] = Find(name);
  const int64_t count = Product(member.shape);
  graph_.Reserve(4 * count);
  std::vector<int32_t> indices(count);
  std::memcpy(indices.data(), data, count * sizeof(int32_t));
  CheckIndices(indices, member.bound, name);
  return indices;
}

namespace {

void RequireUnusedBits(const uint8_t* data, int64_t count) {
  Require(count % 8 == 0 || data[count / 8] >> (count % 8) == 0,
          "expected 0 in the unused bits");
}

}  // namespace

const uint32_t* StoredArrays::Flip(const std::string& name) const {
  const auto& [member, data] = Find(name);
  const int64_t count = Product(member.shape);
  RequireUnusedBits(data, count);
  graph_.Reserve(4 * WordsFor(count));
  std::vector<uint32_t> words(WordsFor(count));
  for (int64_t byte = 0; byte < (count + 7) / 8; ++byte)
    words[byte / 4] |= static_cast<uint32_t>(data[byte]) << 8 * (byte % 4);
  return graph_.Keep(std::move(words));
}

const uint32_t* StoredArrays::Kernel(const std::string& name) const {
  const auto& [member, data] = Find(name);
  const Sizes& shape = member.shape;
  RequireUnusedBits(data, Product(shape));
  const int64_t c_in = shape[shape.size() - 2], c_out = shape.back();
  const int64_t taps = Product(shape) / (c_in * c_out), each = c_out / member.groups;
  const int64_t words = WordsFor(c_in), panels = WordsFor(each);
  graph_.Reserve(member.memory());
  std::vector<uint32_t> kernel(member.memory() / 4);
  int64_t bit = 0;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < c_in; ++c)
      for (int64_t group = 0; group < member.groups; ++group)
        for (int64_t panel = 0; panel < panels; ++panel) {
          uint32_t* to = kernel.data() +
                         (((group * panels + panel) * taps + tap) * words + c / kPanel) *
                             kPanel;
          const int64_t columns = std::min<int64_t>(each - panel * kPanel, kPanel);
          for (int64_t n = 0; n < columns; ++n, ++bit)
            to[n] |= static_cast<uint32_t>(data[bit / 8] >> bit % 8 & 1) << c % kPanel;
        }
  return graph_.Keep(std::move(kernel));
}

}  // namespace xnor
