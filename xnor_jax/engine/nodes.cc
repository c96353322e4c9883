// The nodes of a description, each declared once: its fields, its arrays, its result's
// shape and its lowering to operations. The counterpart of packing/graph.py.
#include "nodes.h"

#include <algorithm>
#include <initializer_list>

namespace xnor {
namespace {

class Norm : public Node {
 public:
  explicit Norm(Fields&) {}
  std::vector<Member> Members(const std::vector<Spec>& in) const override {
    const int64_t channels = Out(in).channels();
    return {{"mean", Member::kFloats, {channels}},
            {"scale", Member::kFloats, {channels}},
            {"bias", Member::kFloats, {channels}}};
  }
  Spec Out(const std::vector<Spec>& in) const override {
    RequireChannels(Single(in));
    return {in[0].shape, DType::kFloat};
  }
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    const Shape shape = {Type::kFloats, out.positions(), 1, out.channels()};
    return graph.Add(MakeNorm(shape, arrays.KeptFloats("mean"), arrays.KeptFloats("scale"),
                              arrays.KeptFloats("bias")),
                     {graph.Floats(in[0])}, out);
  }
};

class Mean : public Node {
 public:
  explicit Mean(Fields&) {}
  Spec Out(const std::vector<Spec>& in) const override {
    RequireNumbers(Single(in));
    Require(in[0].shape.size() >= 2 && in[0].shape.size() <= 4,
            "expected 1 to 3 spatial axes");
    return {{in[0].channels()}, DType::kFloat};
  }
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays&) const override {
    const Shape shape = {Type::kFloats, graph.spec(in[0]).positions(), 1, out.channels()};
    return graph.Add(MakeMean(shape), {graph.Floats(in[0])}, out);
  }
};

// The shape that all of these shapes broadcast to.
Sizes Broadcasted(const std::vector<Sizes>& shapes) {
  Sizes out;
  for (const Sizes& shape : shapes)
    if (shape.size() > out.size()) out.resize(shape.size(), 1);
  std::fill(out.begin(), out.end(), 1);
  for (const Sizes& shape : shapes)
    for (size_t i = 0; i < shape.size(); ++i) {
      int64_t& size = out[out.size() - shape.size() + i];
      Require(size == 1 || shape[i] == 1 || shape[i] == size,
              "the shapes do not broadcast");
      if (size == 1) size = shape[i];
    }
  return out;
}

bool OneOf(const std::string& name, std::initializer_list<const char*> names) {
  for (const char* one : names)
    if (name == one) return true;
  return false;
}

class Elementwise : public Node {
 public:
  explicit Elementwise(Fields& fields)
      : function_(fields.Has("function") ? fields.String("function") : "add"),
        operands_(fields.Integers("operands", -1)), shapes_(fields.Shapes("shapes")),
        exponent_(fields.Integer("exponent", 0, -64, 64)) {
    Require(Arity(function_) > 0,
            "unknown function; pack the network again, or update xnor_jax");
  }

  std::vector<Member> Members(const std::vector<Spec>& in) const override {
    Out(in);
    std::vector<Member> found;
    for (size_t i = 0; i < operands_.size(); ++i)
      if (operands_[i] < 0)
        found.push_back({"constant" + std::to_string(i), Member::kReals, shapes_[i]});
    return found;
  }

  Spec Out(const std::vector<Spec>& in) const override {
    const size_t count = Arity(function_);
    Require(operands_.size() == count && shapes_.size() == count,
            "expected an operand for each argument of the function");
    Require(!in.empty(), "expected an input");
    std::vector<bool> read(in.size());
    const size_t rank = in[0].shape.size();
    for (const Spec& spec : in)
      Require(spec.shape.size() == rank, "expected inputs of the same rank");
    const bool logical = OneOf(function_, {"not", "and", "or", "xor"});
    std::vector<Sizes> shapes;
    for (size_t i = 0; i < count; ++i) {
      const int64_t operand = operands_[i];
      Require(operand < static_cast<int64_t>(in.size()),
              "an operand is out of range");
      const bool truth = logical || (function_ == "select" && i == 0) ||
                         function_ == "to_float";
      if (operand < 0) {
        Require(!truth, "expected bool, got a constant");
        Require(shapes_[i].size() <= rank,
                "expected a constant of at most the inputs' rank");
        shapes.push_back(shapes_[i]);
        continue;
      }
      read[operand] = true;
      Require((in[operand].dtype == DType::kBool) == truth,
              truth ? "expected bool, got numbers" : "expected numbers, got bool");
      shapes.push_back(in[operand].shape);
    }
    for (bool found : read) Require(found, "expected every input among the operands");
    const bool predicate =
        logical || OneOf(function_, {"ge", "gt", "le", "lt", "eq", "ne", "is_finite"});
    return {Broadcasted(shapes), predicate ? DType::kBool : DType::kFloat};
  }

  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    std::vector<int> inputs;
    for (int value : in) inputs.push_back(graph.Floats(value));
    std::vector<Operand> operands;
    for (size_t i = 0; i < operands_.size(); ++i) {
      Operand operand;
      if (operands_[i] < 0) {
        operand.shape = shapes_[i];
        operand.constant =
            arrays.KeptFloats("constant" + std::to_string(i));
      } else {
        operand.input = static_cast<int>(operands_[i]);
        operand.shape = graph.spec(inputs[operand.input]).shape;
      }
      operands.push_back(operand);
    }
    return graph.Add(MakeElementwise(function_, out.shape, operands, exponent_), inputs,
                     out);
  }

 private:
  const std::string function_;
  const Sizes operands_;
  const std::vector<Sizes> shapes_;
  const int64_t exponent_;
};

class Reduce : public Node {
 public:
  explicit Reduce(Fields& fields)
      : function_(ReductionOf(fields.Choice("function", "sum", {"sum", "max", "min"}))),
        axes_(fields.Integers("axes", 1)) {}
  Spec Out(const std::vector<Spec>& in) const override {
    RequireNumbers(Single(in));
    const std::vector<bool> over = Over(in[0]);
    Spec out;
    for (size_t i = 0; i < over.size(); ++i)
      if (!over[i]) out.shape.push_back(in[0].shape[i]);
    return out;
  }
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays&) const override {
    const Spec spec = graph.spec(in[0]);
    return graph.Add(MakeReduce(spec.shape, Over(spec), function_), {graph.Floats(in[0])},
                     out);
  }

 private:
  std::vector<bool> Over(const Spec& spec) const {
    std::vector<bool> over(spec.shape.size());
    for (int64_t axis : axes_) {
      Require(axis <= static_cast<int64_t>(over.size()) && !over[axis - 1],
              "expected distinct axes of the input");
      over[axis - 1] = true;
    }
    return over;
  }
  const Reduction function_;
  const Sizes axes_;
};

class Constant : public Node {
 public:
  explicit Constant(Fields& fields) : shape_(fields.Integers("shape", 1)) {}
  std::vector<Member> Members(const std::vector<Spec>&) const override {
    return {{"value", Member::kReals, shape_}};
  }
  Spec Out(const std::vector<Spec>& in) const override {
    Single(in);
    return {shape_, DType::kFloat};
  }
  int Lower(Graph& graph, const std::vector<int>&, const Spec& out,
            const Arrays& arrays) const override {
    return graph.Add(MakeConstant(arrays.Floats("value")), {}, out);
  }

 private:
  const Sizes shape_;
};

class MatMul : public Node {
 public:
  explicit MatMul(Fields&) {}
  Spec Out(const std::vector<Spec>& in) const override {
    Require(in.size() == 2, "expected two inputs");
    const Sizes &a = in[0].shape, &b = in[1].shape;
    RequireNumbers(in[0]), RequireNumbers(in[1]);
    Require(a.size() >= 2 && a.size() == b.size() && a.back() == b[b.size() - 2] &&
                std::equal(a.begin(), a.end() - 2, b.begin()),
            "the shapes cannot be multiplied");
    Spec out{a, DType::kFloat};
    out.shape.back() = b.back();
    return out;
  }
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays&) const override {
    const int64_t inner = graph.spec(in[0]).channels(), columns = out.channels();
    const int64_t rows = out.shape[out.shape.size() - 2];
    return graph.Add(MakeMatMul(out.positions() / rows, rows, inner, columns),
                     {graph.Floats(in[0]), graph.Floats(in[1])}, out);
  }
};

// The counterpart of NODES in packing/graph.py.
const std::vector<NodeKind>& Nodes() {
  static const std::vector<NodeKind> all = [] {
    std::vector<NodeKind> kinds = {{"norm", Read<Norm>},
                                   {"mean", Read<Mean>},
                                   {"elementwise", Read<Elementwise>},
                                   {"reduce", Read<Reduce>},
                                   {"constant", Read<Constant>},
                                   {"matmul", Read<MatMul>}};
    for (const auto& more : {WindowNodes(), MoveNodes()})
      kinds.insert(kinds.end(), more.begin(), more.end());
    return kinds;
  }();
  return all;
}

}  // namespace

std::vector<Member> Node::Members(const std::vector<Spec>&) const { return {}; }

std::unique_ptr<Node> ReadNode(const json::Value& found) {
  Require(found.is(json::Kind::kObject), "expected an object");
  Fields fields(found);
  const std::string kind = fields.String("kind");
  for (const NodeKind& entry : Nodes())
    if (kind == entry.name) {
      std::unique_ptr<Node> node = entry.read(fields);
      node->kind = kind;
      node->name = fields.String("name");
      node->inputs = fields.Integers("inputs", 0);
      fields.Integer("parameters", 0, 0, int64_t{1} << 40);
      fields.Done();
      return node;
    }
  throw Refusal("unknown kind of node");
}

}  // namespace xnor
