// Helpers for the declarations of nodes, and the lists of their kinds.
#ifndef XNOR_NODES_H_
#define XNOR_NODES_H_

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "graph.h"

namespace xnor {

// A reader of a node's entries in the file; `Done` throws a Refusal if any is unknown.
class Fields {
 public:
  explicit Fields(const json::Value& found) : found_(found) {}

  int64_t Integer(const char* name, int64_t otherwise, int64_t least = 0,
                  int64_t largest = kLargestInteger) {
    return Has(name) ? ReadInteger(Take(name), name, least, largest) : otherwise;
  }
  bool Boolean(const char* name) {
    if (!Has(name)) return false;
    const json::Value value = Take(name);
    Require(value.is(json::Kind::kBool), std::string(name) + ": expected true or false");
    return value.truth();
  }
  Sizes Integers(const char* name, int64_t least) {
    return Has(name) ? ReadIntegers(Take(name), name, least) : Sizes();
  }
  // A list of pairs, (before, after).
  std::vector<std::pair<int64_t, int64_t>> Padding(const char* name) {
    std::vector<std::pair<int64_t, int64_t>> pads;
    if (!Has(name)) return pads;
    const json::Value value = Take(name);
    Require(value.is(json::Kind::kList) && value.count() <= 8,
            std::string(name) + ": expected a list of pairs");
    for (const json::Value& entry : value.entries()) {
      const Sizes pair = ReadIntegers(entry, name);
      Require(pair.size() == 2, std::string(name) + ": expected pairs of whole numbers");
      pads.push_back({pair[0], pair[1]});
    }
    return pads;
  }
  std::vector<Sizes> Shapes(const char* name) {
    std::vector<Sizes> shapes;
    if (!Has(name)) return shapes;
    const json::Value value = Take(name);
    Require(value.is(json::Kind::kList) && value.count() <= 3,
            std::string(name) + ": expected a list of at most 3 shapes");
    for (const json::Value& entry : value.entries())
      shapes.push_back(ReadIntegers(entry, name, 1));
    return shapes;
  }
  std::string Choice(const char* name, const char* otherwise,
                     const std::vector<std::string>& choices) {
    const std::string given = Has(name) ? ReadString(Take(name), name) : otherwise;
    std::string expected;
    for (const std::string& choice : choices) {
      if (given == choice) return given;
      expected += (expected.empty() ? "" : ", ") + choice;
    }
    throw Refusal(std::string(name) + ": expected one of " + expected);
  }
  std::string String(const char* name) {
    return Has(name) ? ReadString(Take(name), name) : std::string();
  }
  bool Has(const char* name) {
    seen_.insert(name);
    for (const json::Value& value : Names())
      if (value.string() == name) return true;
    return false;
  }
  json::Value Take(const char* name) {
    seen_.insert(name);
    return found_[name];
  }
  void Done() {
    for (const json::Value& value : Names())
      Require(seen_.count(std::string(value.string())) > 0, "unknown entry");
  }

 private:
  std::vector<json::Value> Names() const {
    std::vector<json::Value> names;
    const std::vector<json::Value> entries = found_.entries();
    for (size_t i = 0; i < entries.size(); i += 2) names.push_back(entries[i]);
    return names;
  }
  const json::Value found_;
  std::set<std::string> seen_;
};

using Pads = std::vector<std::pair<int64_t, int64_t>>;

inline const Spec& Single(const std::vector<Spec>& in) {
  Require(in.size() == 1, "expected one input");
  return in[0];
}

inline void RequireNumbers(const Spec& spec) {
  Require(spec.dtype != DType::kBool, "expected numbers, got bool");
}

inline void RequireChannels(const Spec& spec) {
  RequireNumbers(spec);
  Require(!spec.shape.empty(), "expected channels, got a scalar");
}

inline Reduction ReductionOf(const std::string& name) {
  return name == "sum"   ? Reduction::kSum
         : name == "max" ? Reduction::kMax
                         : Reduction::kMin;
}

struct NodeKind {
  const char* name;
  std::unique_ptr<Node> (*read)(Fields&);
};

template <class Type>
std::unique_ptr<Node> Read(Fields& fields) {
  return std::make_unique<Type>(fields);
}

// Products, signs and pools; nodes that only move values. The others are in nodes.cc.
std::vector<NodeKind> WindowNodes();
std::vector<NodeKind> MoveNodes();

}  // namespace xnor

#endif  // XNOR_NODES_H_
