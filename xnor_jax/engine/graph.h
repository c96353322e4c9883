// A network's graph: the nodes of its description, and what they become, which runs.
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

// What a file may say, as in packing/checks.py.
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

// A value of one image; bits are along the last axis.
struct Spec {
  Sizes shape;
  DType dtype = DType::kFloat;

  int64_t channels() const { return shape.back(); }
  int64_t positions() const { return Product(shape) / channels(); }
};

// The operations that nodes become, in the order in which they run.
class Graph {
 public:
  // `memory`: how many bytes weights and tables may take.
  Graph(const Sizes& image_shape, int64_t memory) : memory_(memory) {
    values_.push_back({{image_shape}, -1});
  }

  const Spec& spec(int value) const { return values_[value].spec; }
  // Takes bytes off what there may be; refuses what is too much.
  void Reserve(int64_t bytes);
  // What an operation gives for these values.
  int Add(std::unique_ptr<Operation> operation, std::vector<int> inputs, Spec spec);
  // The same elements under another shape.
  int Alias(int value, Spec spec);
  // Signs as floats; floats as they are.
  int Floats(int value);
  // Floats as signs.
  int Bits(int value);
  // An array that lives as long as the graph.
  const float* Keep(std::vector<float> array);
  const int32_t* Keep(std::vector<int32_t> array);
  const uint32_t* Keep(std::vector<uint32_t> array);

  // Plans the memory of a run, which gives this value.
  void Finish(int output);

  double work() const { return work_; }
  // The most elements that an image has between two operations, or within one.
  int64_t largest() const { return largest_; }
  // Elements that a run takes for an image.
  int64_t memory() const { return arena_; }
  void Run(Team& team, int64_t images, const float* x, float* y, float* memory) const;

 private:
  struct Value {
    Spec spec;
    int buffer;  // -1: the input's
  };
  // Elements that a value's or an operation's own memory takes for an image, and while
  // which operations run it is there.
  struct Buffer {
    int64_t size;
    int first, last;
    int64_t offset = 0;
  };
  struct Step {
    std::unique_ptr<Operation> operation;
    std::vector<int> inputs;  // buffers
    int out, scratch;
  };
  static constexpr size_t kMostInputs = 8;

  int NewBuffer(int64_t size);

  int64_t memory_;
  std::vector<Value> values_;
  std::vector<Buffer> buffers_;
  std::vector<Step> steps_;
  std::map<int, int> unpacked_;  // bits that are wanted as floats, too
  std::deque<std::vector<float>> floats_;
  std::deque<std::vector<int32_t>> integers_;
  std::deque<std::vector<uint32_t>> words_;
  int output_ = -1;
  int64_t output_size_ = 0, input_size_ = 0, arena_ = 0, largest_ = 0;
  double work_ = 0;
};

// A node of a description, as in packing/graph.py: what is no array.
class Node {
 public:
  virtual ~Node() = default;
  // What it gives for what it gets; refuses what it cannot take.
  virtual Spec Out(const std::vector<Spec>& in) const = 0;
  virtual std::vector<Member> Members(const std::vector<Spec>& in) const;
  // Adds what it becomes to the graph, and gives that value.
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

  // Bytes of all arrays.
  int64_t stored() const;
  int64_t memory() const;
};

// Checks a list of nodes, and follows the shapes through them.
Described Describe(const Sizes& image_shape, const json::Value& nodes);
// Makes the operations, with the arrays of each node by its index.
void Build(const Described& described, Graph& graph,
           const std::function<std::unique_ptr<Arrays>(size_t)>& arrays);

// Checks of what a file says, each with the entry's name for the error.
int64_t ReadInteger(const json::Value& found, const char* name, int64_t least = 0,
                    int64_t largest = kLargestInteger);
Sizes ReadIntegers(const json::Value& found, const char* name, int64_t least = 0);
double ReadReal(const json::Value& found, const char* name);
std::string ReadString(const json::Value& found, const char* name);

}  // namespace xnor

#endif  // XNOR_GRAPH_H_
