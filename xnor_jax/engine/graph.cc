#include "graph.h"

#include <algorithm>
#include <cstring>

namespace xnor {
namespace {

constexpr int64_t kAligned = 16;  // elements per cache line

void CheckSize(const Sizes& shape) {
  Require(shape.size() <= kMostAxes, "a value has too many axes");
  Require(Product(shape) <= kLargestImage, "a value has too many numbers");
}

}  // namespace

void Graph::Reserve(int64_t bytes) {
  Require(bytes <= memory_, "the network needs too much memory for its file's size");
  memory_ -= bytes;
}

int Graph::NewBuffer(int64_t size) {
  const int next = static_cast<int>(operations_.size());
  buffers_.push_back({size, next, next});
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
  operations_.push_back({std::move(operation), std::move(inputs), out, scratch});
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

void Graph::MakeSteps() {
  for (size_t at = 0; at < operations_.size(); ++at) {
    const Operation& operation = *operations_[at].operation;
    const bool long_pixel = operation.pixels == 1 && operation.out.size() > kElements;
    const bool joins = operation.pixelwise && !long_pixel && !steps_.empty() &&
                       operations_[steps_.back().first].operation->pixels ==
                           operation.pixels;
    if (!joins) steps_.push_back({at, 0, 0});
    Step& step = steps_.back();
    ++step.count;
    if (operation.pixels == 0) continue;
    step.elements = std::max(step.elements, operation.out.size() / operation.pixels);
    if (!operation.pixelwise) continue;
    for (int input : operations_[at].inputs) {
      const int64_t size = input < 0 ? input_size_ : buffers_[input].size;
      step.elements = std::max(step.elements, size / operation.pixels);
    }
  }
}

void Graph::ShareBuffers() {
  std::vector<int> shared(buffers_.size());  // the buffer in whose place each one is
  for (size_t i = 0; i < shared.size(); ++i) shared[i] = static_cast<int>(i);
  for (const Step& step : steps_) {
    const BoundOperation& first = operations_[step.first];
    for (size_t at = step.first; at < step.first + step.count; ++at) {
      BoundOperation& bound = operations_[at];
      for (int& input : bound.inputs)
        if (input >= 0) input = shared[input];
      Buffer& out = buffers_[bound.out];
      for (int input : bound.inputs) {
        if (!bound.operation->in_place || input < 0) continue;
        // The first operation may still read it, at other pixels.
        if (at > step.first && !first.operation->pixelwise &&
            std::count(first.inputs.begin(), first.inputs.end(), input) > 0)
          continue;
        Buffer& in = buffers_[input];
        if (in.last != static_cast<int>(at) || in.size != out.size) continue;
        in.last = out.last;
        out.size = 0;
        shared[bound.out] = input;
        bound.out = input;
        break;
      }
    }
  }
  if (output_ >= 0) output_ = shared[output_];
}

void Graph::Finish(int output) {
  const int end = static_cast<int>(operations_.size());
  output_ = values_[output].buffer;
  output_size_ = Product(spec(output).shape);
  input_size_ = Product(spec(0).shape);
  for (int at = 0; at < end; ++at)
    for (int buffer : operations_[at].inputs)
      if (buffer >= 0) buffers_[buffer].last = at;
  if (output_ >= 0) buffers_[output_].last = end;
  for (int at = 0; at < end; ++at) {
    const Operation& operation = *operations_[at].operation;
    largest_ = std::max(largest_, operation.scratch);
    if (operations_[at].out != output_) largest_ = std::max(largest_, operation.out.size());
  }
  MakeSteps();
  ShareBuffers();
  std::vector<int> step_of;
  for (size_t i = 0; i < steps_.size(); ++i)
    step_of.resize(step_of.size() + steps_[i].count, static_cast<int>(i));
  step_of.push_back(static_cast<int>(steps_.size()));
  for (Buffer& buffer : buffers_)
    buffer.first = step_of[buffer.first], buffer.last = step_of[buffer.last];
  // First fit: each buffer goes into the first gap between those live at the same time.
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
    // Buffers that ended before this one begins cannot overlap with a later one.
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
    const BoundOperation* const bound = &operations_[step.first];
    // Each thread computes the addresses on its own stack: reading them from the caller's
    // would take longer.
    const auto call = [&](size_t i, const void** in) -> Call {
      for (size_t k = 0; k < bound[i].inputs.size(); ++k)
        in[k] = bound[i].inputs[k] < 0 ? x : at(bound[i].inputs[k]);
      return {team, images, in, at(bound[i].out), at(bound[i].scratch)};
    };
    const auto rest = [&](int64_t begin, int64_t end) {
      const void* in[kMostInputs];
      for (size_t i = 1; i < step.count; ++i)
        bound[i].operation->RunPixels(call(i, in), begin, end);
    };
    const void* in[kMostInputs];
    Call first = call(0, in);
    if (step.count > 1) first.tail = Tail(rest, step.elements);
    bound->operation->Run(first);
  }
  const void* from = output_ < 0 ? x : at(output_);
  std::memcpy(y, from, images * output_size_ * sizeof(float));
}

int64_t Described::stored() const {
  int64_t bytes = 0;
  for (const std::vector<Member>& own : members)
    for (const Member& member : own) bytes += member.stored_bytes();
  return bytes;
}

int64_t Described::memory() const {
  int64_t bytes = 0;
  for (const std::vector<Member>& own : members)
    for (const Member& member : own) bytes += member.memory();
  return bytes;
}

Described Describe(const Sizes& image_shape, const json::Value& nodes) {
  Require(nodes.is(json::Kind::kList) && nodes.count() >= 1 && nodes.count() <= kMostNodes,
          "nodes: expected a list of 1 to 4096 nodes");
  Described described;
  for (int64_t size : image_shape)
    Require(size >= 1 && size <= kLargestInteger, "image_shape: a size is out of range");
  CheckSize(image_shape);
  described.specs.push_back({image_shape});
  for (const json::Value& entry : nodes.entries()) {
    const size_t index = described.nodes.size();
    try {
      std::unique_ptr<Node> node = ReadNode(entry);
      std::vector<Spec> in;
      for (int64_t input : node->inputs) {
        Require(input < static_cast<int64_t>(described.specs.size()),
                "expected inputs from earlier nodes");
        in.push_back(described.specs[input]);
      }
      Spec out = node->Out(in);
      std::vector<Member> members = node->Members(in);
      CheckSize(out.shape);
      described.specs.push_back(std::move(out));
      described.members.push_back(std::move(members));
      described.nodes.push_back(std::move(node));
    } catch (const Refusal& refusal) {
      throw Refusal("node " + std::to_string(index) + ": " + refusal.message);
    }
  }
  const Spec& last = described.specs.back();
  Require(last.dtype == DType::kFloat && !last.shape.empty(),
          "expected a network that ends in floats");
  return described;
}

void Build(const Described& described, Graph& graph,
           const std::function<std::unique_ptr<Arrays>(size_t)>& arrays) {
  std::vector<int> values = {0};
  for (size_t i = 0; i < described.nodes.size(); ++i) {
    const Node& node = *described.nodes[i];
    std::vector<int> in;
    for (int64_t input : node.inputs) in.push_back(values[input]);
    try {
      values.push_back(node.Lower(graph, in, described.specs[i + 1], *arrays(i)));
    } catch (const Refusal& refusal) {
      throw Refusal("node " + std::to_string(i) + ": " + refusal.message);
    }
  }
  graph.Finish(values.back());
}

}  // namespace xnor
