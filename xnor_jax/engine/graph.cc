#include "graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace xnor {
namespace {

constexpr int64_t kAligned = 16;  // elements of a line of the cache

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

int64_t Member::memory() const {
  if (kind != kKernel) return Times(4, Product(shape));
  const int64_t c_in = shape[shape.size() - 2], each = shape.back() / groups;
  const int64_t taps = Product({shape.begin(), shape.end() - 2});
  return Times(4 * kPanel,
               Times(Times(groups, taps), Times(WordsFor(c_in), WordsFor(each))));
}

void Graph::Reserve(int64_t bytes) {
  Require(bytes <= memory_, "the network needs too much memory for its file's size");
  memory_ -= bytes;
}

int Graph::NewBuffer(int64_t size) {
  const int step = static_cast<int>(steps_.size());
  buffers_.push_back({size, step, step});
  return static_cast<int>(buffers_.size()) - 1;
}

int Graph::Add(std::unique_ptr<Operation> operation, std::vector<int> inputs, Spec spec) {
  Require(inputs.size() <= kMostInputs, "a node has too many inputs");
  Reserve(operation->memory);
  operation->Prepare();
  work_ += operation->work;
  for (int& input : inputs) input = values_[input].buffer;
  const int out = NewBuffer(operation->out.size());
  const int scratch = operation->scratch > 0 ? NewBuffer(operation->scratch) : -1;
  steps_.push_back({std::move(operation), std::move(inputs), out, scratch});
  values_.push_back({std::move(spec), out});
  return static_cast<int>(values_.size()) - 1;
}

int Graph::Alias(int value, Spec spec) {
  values_.push_back({std::move(spec), values_[value].buffer});
  return static_cast<int>(values_.size()) - 1;
}

int Graph::Floats(int value) {
  const Spec found = spec(value);
  if (found.dtype != DType::kBits) return value;
  const auto known = unpacked_.find(value);
  if (known != unpacked_.end()) return known->second;
  return unpacked_[value] =
             Add(MakeUnpack(found.positions(), found.channels()), {value}, {found.shape});
}

int Graph::Bits(int value) {
  const Spec found = spec(value);
  const Shape shape = {Type::kFloats, found.positions(), 1, found.channels()};
  return Add(MakePack(shape), {value}, {found.shape, DType::kBits});
}

const float* Graph::Keep(std::vector<float> array) {
  floats_.push_back(std::move(array));
  return floats_.back().data();
}

const int32_t* Graph::Keep(std::vector<int32_t> array) {
  integers_.push_back(std::move(array));
  return integers_.back().data();
}

const uint32_t* Graph::Keep(std::vector<uint32_t> array) {
  words_.push_back(std::move(array));
  return words_.back().data();
}

void Graph::Finish(int output) {
  const int end = static_cast<int>(steps_.size());
  output_ = values_[output].buffer;
  output_size_ = Product(spec(output).shape);
  input_size_ = Product(spec(0).shape);
  for (int at = 0; at < end; ++at)
    for (int buffer : steps_[at].inputs)
      if (buffer >= 0) buffers_[buffer].last = at;
  if (output_ >= 0) buffers_[output_].last = end;
  for (int at = 0; at < end; ++at) {
    const Operation& operation = *steps_[at].operation;
    largest_ = std::max(largest_, operation.scratch);
    if (steps_[at].out != output_) largest_ = std::max(largest_, operation.out.size());
  }
  // Each buffer lies in the first gap between those that are there at the same time.
  std::vector<const Buffer*> placed;
  for (Buffer& buffer : buffers_) {
    std::vector<const Buffer*> beside;
    for (const Buffer* other : placed)
      if (other->last >= buffer.first && other->first <= buffer.last)
        beside.push_back(other);
    std::sort(beside.begin(), beside.end(),
              [](const Buffer* a, const Buffer* b) { return a->offset < b->offset; });
    const auto taken = [](int64_t size) {
      return (size + kAligned - 1) / kAligned * kAligned;
    };
    for (const Buffer* other : beside) {
      if (buffer.offset + taken(buffer.size) <= other->offset) break;
      buffer.offset = std::max(buffer.offset, other->offset + taken(other->size));
    }
    arena_ = std::max(arena_, buffer.offset + taken(buffer.size));
    placed.push_back(&buffer);
    // Those that ended before this one begins can never be beside a later one.
    placed.erase(std::remove_if(placed.begin(), placed.end(),
                                [&](const Buffer* b) { return b->last < buffer.first; }),
                 placed.end());
  }
}

void Graph::Run(Team& team, int64_t images, const float* x, float* y,
                float* memory) const {
  const auto at = [&](int buffer) -> void* {
    return buffer < 0 ? nullptr : memory + buffers_[buffer].offset * images;
  };
  for (const Step& step : steps_) {
    const void* in[kMostInputs];
    for (size_t i = 0; i < step.inputs.size(); ++i)
      in[i] = step.inputs[i] < 0 ? x : at(step.inputs[i]);
    step.operation->Run({team, images, in, at(step.out), at(step.scratch)});
  }
  const void* from = output_ < 0 ? x : at(output_);
  std::memcpy(y, from, images * output_size_ * sizeof(float));
}

const std::pair<Member, const uint8_t*>& Arrays::Find(const char* name) const {
  for (const auto& array : arrays_)
    if (array.first.name == name) return array;
  throw Refusal(std::string("there is no array ") + name);
}

std::vector<float> Arrays::Floats(const char* name) const {
  const auto& [member, data] = Find(name);
  Require(LittleEndian(), "expected a little-endian processor");
  const int64_t count = Product(member.shape);
  graph_.Reserve(4 * count);
  std::vector<float> floats(count);
  std::memcpy(floats.data(), data, count * sizeof(float));
  const bool infinite = member.kind == Member::kReals;
  for (float x : floats)
    Require(std::isfinite(x) || (infinite && std::isinf(x)),
            std::string(name) + ": expected finite numbers");
  return floats;
}

const float* Arrays::KeptFloats(const char* name) const {
  return graph_.Keep(Floats(name));
}

const int32_t* Arrays::Integers(const char* name) const {
  const auto& [member, data] = Find(name);
  const int64_t count = Product(member.shape);
  const bool narrow = member.bound <= 32767;
  graph_.Reserve(4 * count);
  std::vector<int32_t> integers(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number =
        narrow ? Load<int16_t>(data + 2 * i) : Load<int32_t>(data + 4 * i);
    Require(std::abs(number) <= member.bound,
            std::string(name) + ": a threshold is out of range");
    // Below the smallest sum every threshold is the same: always +1, or -1.
    integers[i] = number == -member.bound ? std::numeric_limits<int32_t>::min()
                                          : static_cast<int32_t>(number);
  }
  return graph_.Keep(std::move(integers));
}

std::vector<int32_t> Arrays::Indices(const char* name) const {
  const auto& [member, data] = Find(name);
  const int64_t count = Product(member.shape);
  graph_.Reserve(4 * count);
  std::vector<int32_t> places(count);
  std::memcpy(places.data(), data, count * sizeof(int32_t));
  for (int32_t place : places)
    Require(place >= 0 && place < member.bound,
            std::string(name) + ": a place is out of range");
  return places;
}

namespace {

void RequireUnusedBits(const uint8_t* data, int64_t count) {
  Require(count % 8 == 0 || data[count / 8] >> (count % 8) == 0,
          "expected 0 in the unused bits");
}

}  // namespace

const uint32_t* Arrays::Flip(const char* name) const {
  const auto& [member, data] = Find(name);
  const int64_t count = Product(member.shape);
  RequireUnusedBits(data, count);
  graph_.Reserve(4 * WordsFor(count));
  std::vector<uint32_t> words(WordsFor(count));
  for (int64_t byte = 0; byte < (count + 7) / 8; ++byte)
    words[byte / 4] |= static_cast<uint32_t>(data[byte]) << 8 * (byte % 4);
  return graph_.Keep(std::move(words));
}

const uint32_t* Arrays::Kernel(const char* name) const {
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
