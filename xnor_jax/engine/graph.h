// A network's graph: the nodes of its description, lowered to operations.
#ifndef XNOR_GRAPH_H_
#define XNOR_GRAPH_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "json.h"
#include "operation.h"
#include "values.h"

namespace xnor {

// Limits on a file's contents, as in packing/checks.py.
constexpr int64_t kLargestInteger = 1 << 24;
constexpr int64_t kLargestImage = 1 << 28;
constexpr int64_t kLargestKernel = 1 << 27;
constexpr int64_t kLargestPacked = 1 << 25;
constexpr int64_t kLargestNetwork = 1 << 30;
constexpr int64_t kLargestFile = 1 << 30;
constexpr int64_t kLargestHeader = 1 << 20;
constexpr size_t kMostNodes = 4096;
constexpr size_t kMostAxes = 8;
constexpr size_t kMostClasses = 1 << 16;
constexpr size_t kLongestString = 200;

enum class DType { kFloat, kBits, kBool };

// The shape and dtype of a value, for one image; bits are packed along the last axis.
struct Spec {
  Sizes shape;
  DType dtype = DType::kFloat;

  int64_t channels() const { return shape.back(); }
  int64_t positions() const { return Product(shape) / channels(); }
};

// The operations of a network, in execution order.
class Graph {
 public:
  // `memory`: the budget for weights and tables, in bytes.
  Graph(const Sizes& image_shape, int64_t memory) : memory_(memory) {
    values_.push_back({{image_shape}, -1});
  }

  const Spec& spec(int value) const { return values_[value].spec; }
  // Takes bytes from the budget; throws a Refusal if too few are left.
  void Reserve(int64_t bytes);
  // Adds an operation on these values; returns the index of its result.
  int Add(std::unique_ptr<Operation> operation, std::vector<int> inputs, Spec spec);
  // A value with the same elements and another shape.
  int Alias(int value, Spec spec);
  // Unpacks signs to floats; returns other values unchanged.
  int Floats(int value);
  // Packs the signs of floats.
  int Bits(int value);
  // Stores an array for the lifetime of the graph.
  const float* Keep(std::vector<float> array);
  const int32_t* Keep(std::vector<int32_t> array);
  const uint32_t* Keep(std::vector<uint32_t> array);

  // Plans the memory of a run that returns this value.
  void Finish(int output);

  double work() const { return work_; }
  // The largest buffer between two operations or within one, in elements per image.
  int64_t largest() const { return largest_; }
  // The memory of a run, in elements per image.
  int64_t memory() const { return arena_; }
  void Run(Team& team, int64_t images, const float* x, float* y, float* memory) const;

 private:
  struct Value {
    Spec spec;
    int buffer;  // -1: the input
  };
  // The memory of a value or of an operation's scratch: its elements per image, and the
  // first and last operation during which it is live; `Finish` counts in steps instead.
  struct Buffer {
    int64_t size;
    int first, last;
    int64_t offset = 0;
  };
  // An operation and the buffers that it reads and writes.
  struct BoundOperation {
    std::unique_ptr<Operation> operation;
    std::vector<int> inputs;  // buffers
    int out, scratch;
  };
  static constexpr size_t kMostInputs = 8;
  // Operations that run together, part by part: pixelwise ones behind the first.
  struct Step {
    size_t first, count;
    int64_t elements;  // the most that one of the operations reads or writes per pixel
  };

  int NewBuffer(int64_t size);
  void MakeSteps();
  // Lets results overwrite an input that nothing reads afterwards.
  void ShareBuffers();

  int64_t memory_;
  std::vector<Value> values_;
  std::vector<Buffer> buffers_;
  std::vector<BoundOperation> operations_;
  std::vector<Step> steps_;
  std::map<int, int> unpacked_;  // bits to the same value as floats
  std::deque<std::vector<float>> floats_;
  std::deque<std::vector<int32_t>> integers_;
  std::deque<std::vector<uint32_t>> words_;
  int output_ = -1;
  int64_t output_size_ = 0, input_size_ = 0, arena_ = 0, largest_ = 0;
  double work_ = 0;
};

// A node of a description without its arrays, as in packing/graph.py.
class Node {
 public:
  virtual ~Node() = default;
  // The shape and dtype of the result; throws a Refusal on inputs that it cannot take.
  virtual Spec Out(const std::vector<Spec>& in) const = 0;
  virtual std::vector<Member> Members(const std::vector<Spec>& in) const;
  // Adds the node's operations to the graph; returns the index of the result.
  virtual int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
                    const Arrays& arrays) const = 0;

  std::vector<int64_t> inputs;
  std::string kind, name;
};

std::unique_ptr<Node> ReadNode(const json::Value& found);

// A network without its arrays.
struct Described {
  std::vector<std::unique_ptr<Node>> nodes;
  std::vector<Spec> specs;  // the input's, then the nodes'
  std::vector<std::vector<Member>> members;

  // Bytes of all arrays, in the file and in memory.
  int64_t stored() const;
  int64_t memory() const;
};

// Checks a list of nodes and infers the shapes of their results.
Described Describe(const Sizes& image_shape, const json::Value& nodes);
// Lowers the nodes to operations; `arrays` returns a node's arrays by its index.
void Build(const Described& described, Graph& graph,
           const std::function<std::unique_ptr<Arrays>(size_t)>& arrays);

// Checked reads of a file's entries; `name` is the entry's, for the error.
int64_t ReadInteger(const json::Value& found, const char* name, int64_t least = 0,
                    int64_t largest = kLargestInteger);
Sizes ReadIntegers(const json::Value& found, const char* name, int64_t least = 0);
double ReadReal(const json::Value& found, const char* name);
std::string ReadString(const json::Value& found, const char* name);

}  // namespace xnor

#endif  // XNOR_GRAPH_H_
