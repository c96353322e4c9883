// Sources of a network's weights: a file, or the buffers of a call.
#ifndef XNOR_ARRAYS_H_
#define XNOR_ARRAYS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "values.h"

namespace xnor {

class Graph;

// An array of a node, the counterpart of `Member` in packing/graph.py.
struct Member {
  enum Kind { kFloats, kReals, kIntegers, kIndices, kFlip, kKernel };
  std::string name;
  Kind kind;
  Sizes shape;
  int64_t bound = 0;
  int64_t groups = 1;

  bool signs() const { return kind == kFlip || kind == kKernel; }
  // The array in the file.
  const char* stored_dtype() const;
  Sizes stored_shape() const;
  int64_t stored_bytes() const;
  // The array in memory, as the methods of `Arrays` return it: elements of four bytes,
  // signs padded to words of 32 channels. `memory` is an upper bound, in bytes.
  Sizes laid_out() const;
  int64_t memory() const;
};

// A node's arrays. Values that could make a run unsafe are checked on access.
class Arrays {
 public:
  explicit Arrays(Graph& graph) : graph_(graph) {}
  virtual ~Arrays() = default;

  virtual std::vector<float> Floats(const std::string& name) const = 0;
  virtual std::vector<int32_t> Indices(const std::string& name) const = 0;
  // The returned pointers are valid for the lifetime of the graph.
  const float* KeptFloats(const std::string& name) const;
  virtual const int32_t* Integers(const std::string& name) const = 0;
  virtual const uint32_t* Flip(const std::string& name) const = 0;
  // [groups][panels][*window][words][32], the layout of `PackedKernel` in ops/kernel.py.
  virtual const uint32_t* Kernel(const std::string& name) const = 0;

 protected:
  Graph& graph_;
};

// The arrays of a file, whose bytes may be freed once the graph is built.
class StoredArrays : public Arrays {
 public:
  StoredArrays(Graph& graph, std::vector<std::pair<Member, const uint8_t*>> arrays)
      : Arrays(graph), arrays_(std::move(arrays)) {}

  std::vector<float> Floats(const std::string& name) const override;
  std::vector<int32_t> Indices(const std::string& name) const override;
  const int32_t* Integers(const std::string& name) const override;
  const uint32_t* Flip(const std::string& name) const override;
  const uint32_t* Kernel(const std::string& name) const override;

 private:
  const std::pair<Member, const uint8_t*>& Find(const std::string& name) const;
  const std::vector<std::pair<Member, const uint8_t*>> arrays_;
};

// Throws a Refusal unless every index is in [0, count).
void CheckIndices(const std::vector<int32_t>& indices, int64_t count,
                  const std::string& name);

}  // namespace xnor

#endif  // XNOR_ARRAYS_H_
