// The nodes of a file, each declared once: its fields, its arrays, the shape that it
// gives and the operations that it becomes. The counterpart of packing/graph.py.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <set>

#include "graph.h"

namespace xnor {
namespace {

// A node's entries in the file: each is read once, and none is left.
class Fields {
 public:
  explicit Fields(const json::Value& found) : found_(found) {}

  int64_t Integer(const char* name, int64_t otherwise, int64_t least = 0,
                  int64_t largest = kLargestInteger) {
    return Has(name) ? ReadInteger(Take(name), name, least, largest) : otherwise;
  }
  Sizes Integers(const char* name, int64_t least) {
    return Has(name) ? ReadIntegers(Take(name), name, least) : Sizes();
  }
  // Pairs, one behind the other.
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
    for (const std::string& choice : choices)
      if (given == choice) return given;
    throw Refusal(std::string(name) + ": expected one of a few names");
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
      Require(seen_.count(std::string(value.string())) > 0, "unknown entry of a node");
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

const Spec& Single(const std::vector<Spec>& in) {
  Require(in.size() == 1, "expected one input");
  return in[0];
}

void RequireNumbers(const Spec& spec) {
  Require(spec.dtype != DType::kBool, "expected numbers, got bool");
}

void RequireChannels(const Spec& spec) {
  RequireNumbers(spec);
  Require(!spec.shape.empty(), "expected channels, got a number");
}

// The windows over an image `[*spatial, C]`, of one to three spatial axes.
Geometry Windows(const Sizes& shape, const Sizes& window, const Sizes& strides,
                 const Pads& padding, const Sizes& dilation) {
  const size_t rank = window.size();
  Require(rank >= 1 && rank <= 3 && shape.size() == rank + 1 && strides.size() == rank &&
              padding.size() == rank && dilation.size() == rank,
          "expected a window, strides, padding and dilation for each spatial axis");
  Geometry g;
  Axis* const axes[] = {&g.z, &g.y, &g.x};
  for (size_t i = 0; i < rank; ++i)
    *axes[3 - rank + i] = Axis(shape[i], window[i], strides[i], padding[i].first,
                               padding[i].second, dilation[i]);
  Require(g.padded_pixels() <= kLargestImage, "a padded image is too large");
  return g;
}

Sizes OutShape(const Geometry& g, size_t rank, int64_t channels) {
  const int64_t outs[] = {g.z.out, g.y.out, g.x.out};
  Sizes shape(outs + 3 - rank, outs + 3);
  shape.push_back(channels);
  return shape;
}

// Pixels in a row, each for itself.
Geometry Pixels(int64_t count) {
  Geometry g;
  g.y = Axis(count, 1, 1, 0, 0, 1);
  return g;
}

// A convolution, or without a window a dense layer of the last axis.
class AnyProduct : public Node {
 public:
  explicit AnyProduct(Fields& fields)
      : window_(fields.Integers("window", 1)), strides_(fields.Integers("strides", 1)),
        dilation_(fields.Integers("dilation", 1)),
        features_(fields.Integer("features", 1, 1)),
        groups_(fields.Integer("groups", 1, 1)), padding_(fields.Padding("padding")),
        epilogue_(fields.Choice("epilogue", "affine",
                                {"affine", "affine_relu", "threshold"})) {}

  Spec Out(const std::vector<Spec>& in) const override {
    const Spec& spec = Single(in);
    KernelShape(spec);
    Spec out{{}, threshold() ? DType::kBits : DType::kFloat};
    if (window_.empty()) {
      Require(strides_.empty() && padding_.empty() && dilation_.empty(),
              "expected no strides of a dense layer");
      out.shape = spec.shape;
      out.shape.back() = features_;
    } else {
      out.shape = OutShape(WindowsOf(spec), window_.size(), features_);
    }
    return out;
  }

 protected:
  bool threshold() const { return epilogue_ == "threshold"; }

  Sizes KernelShape(const Spec& spec) const {
    Require(!spec.shape.empty(), "expected channels, got a number");
    const int64_t each = spec.channels() / groups_;
    Require(spec.channels() % groups_ == 0 && each > 0 && features_ % groups_ == 0,
            "expected channels that divide into the groups");
    Require(window_.size() <= 3 && (groups_ == 1 || !window_.empty()),
            "expected at most 3 spatial axes, a dense layer ungrouped");
    Sizes shape = window_;
    shape.push_back(each), shape.push_back(features_);
    Require(Product(shape) <= kLargestKernel, "a kernel has too many weights");
    return shape;
  }

  Geometry WindowsOf(const Spec& spec) const {
    return window_.empty() ? Pixels(spec.positions())
                           : Windows(spec.shape, window_, strides_, padding_, dilation_);
  }

  // Whether thresholds make whole words of a group.
  bool whole_words() const { return groups_ == 1 || features_ / groups_ % kPanel == 0; }

  const Sizes window_, strides_, dilation_;
  const int64_t features_, groups_;
  const Pads padding_;
  const std::string epilogue_;
};

class BinaryConv : public AnyProduct {
 public:
  using AnyProduct::AnyProduct;

  std::vector<Member> Members(const std::vector<Spec>& in) const override {
    Require(Single(in).dtype == DType::kBits, "expected bits");
    const Sizes shape = KernelShape(in[0]);
    std::vector<Member> found = {{"kernel", Member::kKernel, shape, 0, groups_}};
    if (threshold()) {
      const int64_t bound = Product(shape) / features_;
      found.push_back({"threshold", Member::kIntegers, {features_}, bound});
      found.push_back({"flip", Member::kFlip, {features_}});
    } else {
      found.push_back({"scale", Member::kFloats, {features_}});
      found.push_back({"bias", Member::kFloats, {features_}});
    }
    return found;
  }

  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    const Spec spec = graph.spec(in[0]);
    const Geometry g = WindowsOf(spec);
    const int64_t channels = spec.channels() / groups_;
    int x = in[0];
    if (groups_ > 1 && channels % kPanel != 0)
      x = graph.Add(MakeRegroup(spec.positions(), spec.channels(), groups_), {x}, spec);
    Target<int32_t> target;
    std::vector<float> scale, bias;
    if (threshold()) {
      target.epilogue = Epilogue::kThreshold;
      target.threshold = arrays.Integers("threshold");
      target.flip = arrays.Flip("flip");
    } else {
      scale = arrays.Floats("scale"), bias = arrays.Floats("bias");
      target.epilogue = Epilogue::kAffine;
      target.scale = scale.data(), target.bias = bias.data();
      target.relu = epilogue_ == "affine_relu";
    }
    const Target<int32_t> now = threshold() && !whole_words() ? Target<int32_t>() : target;
    const int y = graph.Add(
        MakeConv(g, groups_, channels, features_, now, arrays.Kernel("kernel")), {x}, out);
    if (!threshold() || whole_words()) return y;
    return graph.Add(MakeThreshold(out.positions(), features_, target), {y}, out);
  }
};

class RealConv : public AnyProduct {
 public:
  using AnyProduct::AnyProduct;

  std::vector<Member> Members(const std::vector<Spec>& in) const override {
    RequireNumbers(Single(in));
    std::vector<Member> found = {{"kernel", Member::kFloats, KernelShape(in[0])}};
    if (threshold()) {
      found.push_back({"threshold", Member::kReals, {features_}});
      found.push_back({"flip", Member::kFlip, {features_}});
    } else {
      found.push_back({"bias", Member::kFloats, {features_}});
    }
    return found;
  }

  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    const Spec spec = graph.spec(in[0]);
    const std::vector<float> kernel = arrays.Floats("kernel");
    const std::vector<float> ones(features_, 1.0f);
    std::vector<float> bias;
    Target<float> target;
    if (threshold()) {
      target.epilogue = Epilogue::kThreshold;
      target.threshold = arrays.KeptFloats("threshold");
      target.flip = arrays.Flip("flip");
    } else {
      bias = arrays.Floats("bias");
      target.epilogue = Epilogue::kAffine;
      target.scale = ones.data(), target.bias = bias.data();
      target.relu = epilogue_ == "affine_relu";
    }
    const Target<float> now = threshold() && !whole_words() ? Target<float>() : target;
    const int y = graph.Add(MakeRealConv(WindowsOf(spec), groups_,
                                         spec.channels() / groups_, features_, now,
                                         kernel.data()),
                            {graph.Floats(in[0])}, out);
    if (!threshold() || whole_words()) return y;
    return graph.Add(MakeThreshold(out.positions(), features_, target), {y}, out);
  }
};

std::vector<Member> ThresholdMembers(const Spec& out) {
  return {{"threshold", Member::kReals, {out.channels()}},
          {"flip", Member::kFlip, {out.channels()}}};
}

class Sign : public Node {
 public:
  explicit Sign(Fields&) {}
  std::vector<Member> Members(const std::vector<Spec>& in) const override {
    return ThresholdMembers(Out(in));
  }
  Spec Out(const std::vector<Spec>& in) const override {
    RequireChannels(Single(in));
    return {in[0].shape, DType::kBits};
  }
  // As the sums of windows of one number.
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    const std::vector<float> threshold = arrays.Floats("threshold");
    return graph.Add(MakeSumPool(Pixels(out.positions()), out.channels(),
                                 threshold.data(), arrays.Flip("flip")),
                     {graph.Floats(in[0])}, out);
  }
};

class AnyPool : public Node {
 public:
  explicit AnyPool(Fields& fields)
      : window_(fields.Integers("window", 1)), strides_(fields.Integers("strides", 1)),
        padding_(fields.Padding("padding")) {}

 protected:
  Sizes Pooled(const Spec& spec) const {
    return OutShape(WindowsOf(spec), window_.size(), spec.channels());
  }
  Geometry WindowsOf(const Spec& spec) const {
    Require(spec.shape.size() >= 2 && spec.shape.size() <= 4,
            "expected 1 to 3 spatial axes");
    const Geometry g =
        Windows(spec.shape, window_, strides_, padding_, Sizes(window_.size(), 1));
    for (const Axis* axis : {&g.z, &g.y, &g.x})
      Require(axis->before < axis->window && axis->after < axis->window,
              "expected a padding smaller than the window");
    return g;
  }

  const Sizes window_, strides_;
  const Pads padding_;
};

class MaxPoolBits : public AnyPool {
 public:
  using AnyPool::AnyPool;
  std::vector<Member> Members(const std::vector<Spec>& in) const override {
    return {{"flip", Member::kFlip, {Out(in).channels()}}};
  }
  Spec Out(const std::vector<Spec>& in) const override {
    Require(Single(in).dtype == DType::kBits, "expected bits");
    return {Pooled(in[0]), DType::kBits};
  }
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    return graph.Add(MakePoolBits(WindowsOf(graph.spec(in[0])), WordsFor(out.channels()),
                                  arrays.Flip("flip")),
                     {in[0]}, out);
  }
};

class SumPoolBits : public AnyPool {
 public:
  using AnyPool::AnyPool;
  std::vector<Member> Members(const std::vector<Spec>& in) const override {
    return ThresholdMembers(Out(in));
  }
  Spec Out(const std::vector<Spec>& in) const override {
    RequireNumbers(Single(in));
    Require(in[0].shape.size() == 3, "expected 2 spatial axes");
    return {Pooled(in[0]), DType::kBits};
  }
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    const std::vector<float> threshold = arrays.Floats("threshold");
    return graph.Add(MakeSumPool(WindowsOf(graph.spec(in[0])), out.channels(),
                                 threshold.data(), arrays.Flip("flip")),
                     {graph.Floats(in[0])}, out);
  }
};

Reduction ReductionOf(const std::string& name) {
  return name == "sum"   ? Reduction::kSum
         : name == "max" ? Reduction::kMax
                         : Reduction::kMin;
}

class FloatPool : public AnyPool {
 public:
  explicit FloatPool(Fields& fields)
      : AnyPool(fields),
        function_(ReductionOf(fields.Choice("function", "max", {"max", "min", "sum"}))) {}
  Spec Out(const std::vector<Spec>& in) const override {
    RequireNumbers(Single(in));
    return {Pooled(in[0]), DType::kFloat};
  }
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays&) const override {
    const Geometry g = WindowsOf(graph.spec(in[0]));
    return graph.Add(MakePool(g, out.channels(), function_), {graph.Floats(in[0])}, out);
  }

 private:
  const Reduction function_;
};

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

// The shape that shapes broadcast to.
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
    Require(Arity(function_) > 0, "unknown function");
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
            "expected as many operands as the function has");
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
              "expected every input among the operands");
      const bool truth = logical || (function_ == "select" && i == 0) ||
                         function_ == "to_float";
      if (operand < 0) {
        Require(!truth, "expected bool, got a constant");
        Require(shapes_[i].size() <= rank, "expected a constant of no more axes");
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
            arrays.KeptFloats(("constant" + std::to_string(i)).c_str());
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
              "expected axes of the input, each once");
      over[axis - 1] = true;
    }
    return over;
  }
  const Reduction function_;
  const Sizes axes_;
};

// What only moves values: signs stay bits.
class AnyMove : public Node {
 public:
  Spec Out(const std::vector<Spec>& in) const override {
    Require(!in.empty(), "expected an input");
    bool bits = KeepsSigns(), truth = false, numbers = false;
    std::vector<Sizes> shapes;
    for (const Spec& spec : in) {
      bits &= spec.dtype == DType::kBits;
      (spec.dtype == DType::kBool ? truth : numbers) = true;
      shapes.push_back(spec.shape);
    }
    Require(!truth || !numbers, "expected all inputs of one kind, got bool among them");
    const Sizes shape = OutOf(shapes);
    Require(!bits || !shape.empty(), "expected bits with channels");
    return {shape, bits ? DType::kBits : truth ? DType::kBool : DType::kFloat};
  }

  // On whole words where these stay as they are, or else on floats.
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    std::vector<Sizes> shapes;
    for (int value : in) shapes.push_back(graph.spec(value).shape);
    const bool bits = out.dtype == DType::kBits;
    if (bits && MovesWords(shapes, out.shape)) {
      for (Sizes& shape : shapes) shape.back() = WordsFor(shape.back());
      Sizes to = out.shape;
      to.back() = WordsFor(to.back());
      return Moved(graph, in, shapes, to, out, arrays, kPanel);
    }
    std::vector<int> inputs;
    for (int value : in) inputs.push_back(graph.Floats(value));
    const Spec numbers{out.shape, bits ? DType::kFloat : out.dtype};
    const int y = Moved(graph, inputs, shapes, out.shape, numbers, arrays, 1);
    return bits ? graph.Bits(y) : y;
  }

 protected:
  virtual bool KeepsSigns() const { return true; }
  virtual Sizes OutOf(const std::vector<Sizes>& in) const = 0;
  // Whether words of signs move as a whole.
  virtual bool MovesWords(const std::vector<Sizes>& in, const Sizes& out) const = 0;
  // The moves between arrays of these shapes, whose last axis is counted in words of
  // `word` numbers.
  virtual std::vector<Move> Moves(const std::vector<Sizes>& in, const Sizes& out,
                                  int64_t word) const = 0;
  virtual int Moved(Graph& graph, const std::vector<int>& inputs,
                    const std::vector<Sizes>& in, const Sizes& to, const Spec& out,
                    const Arrays&, int64_t word) const {
    return graph.Add(MakeMoves(Product(to), Moves(in, to, word)), inputs, out);
  }

  static const Sizes& OneShape(const std::vector<Sizes>& in) {
    Require(in.size() == 1, "expected one input");
    return in[0];
  }
};

class Reshape : public AnyMove {
 public:
  explicit Reshape(Fields& fields) : shape_(fields.Integers("shape", 1)) {}

 protected:
  Sizes OutOf(const std::vector<Sizes>& in) const override {
    Require(Product(OneShape(in)) == Product(shape_), "expected as many numbers");
    return shape_;
  }
  bool MovesWords(const std::vector<Sizes>& in, const Sizes& out) const override {
    return in[0].back() == out.back() ||
           (in[0].back() % kPanel == 0 && out.back() % kPanel == 0);
  }
  std::vector<Move> Moves(const std::vector<Sizes>&, const Sizes&,
                          int64_t) const override {
    return {};
  }
  int Moved(Graph& graph, const std::vector<int>& inputs, const std::vector<Sizes>&,
            const Sizes&, const Spec& out, const Arrays&, int64_t) const override {
    return graph.Alias(inputs[0], out);
  }

 private:
  const Sizes shape_;
};

class Transpose : public AnyMove {
 public:
  explicit Transpose(Fields& fields) : order_(fields.Integers("order", 1)) {}

 protected:
  Sizes OutOf(const std::vector<Sizes>& in) const override {
    const Sizes& shape = OneShape(in);
    std::vector<bool> seen(shape.size());
    Sizes out;
    for (int64_t axis : order_) {
      Require(axis <= static_cast<int64_t>(shape.size()) && !seen[axis - 1],
              "expected an order of all axes");
      seen[axis - 1] = true;
      out.push_back(shape[axis - 1]);
    }
    Require(out.size() == shape.size(), "expected an order of all axes");
    return out;
  }
  bool MovesWords(const std::vector<Sizes>& in, const Sizes&) const override {
    return order_.back() == static_cast<int64_t>(in[0].size());
  }
  std::vector<Move> Moves(const std::vector<Sizes>& in, const Sizes& out,
                          int64_t) const override {
    const Sizes strides = Strides(in[0]);
    Sizes from;
    for (int64_t axis : order_) from.push_back(strides[axis - 1]);
    return {{0, Product(in[0]), out, from, Strides(out), 0, 0}};
  }

 private:
  const Sizes order_;
};

class Broadcast : public AnyMove {
 public:
  explicit Broadcast(Fields& fields) : shape_(fields.Integers("shape", 1)) {}

 protected:
  Sizes OutOf(const std::vector<Sizes>& in) const override {
    const Sizes& shape = OneShape(in);
    Require(shape.size() == shape_.size(), "expected as many axes");
    for (size_t i = 0; i < shape.size(); ++i)
      Require(shape[i] == 1 || shape[i] == shape_[i], "the shape does not broadcast");
    return shape_;
  }
  bool MovesWords(const std::vector<Sizes>& in, const Sizes& out) const override {
    return in[0].back() == out.back();
  }
  std::vector<Move> Moves(const std::vector<Sizes>& in, const Sizes& out,
                          int64_t) const override {
    Sizes from = Strides(in[0]);
    for (size_t i = 0; i < from.size(); ++i)
      if (in[0][i] == 1) from[i] = 0;
    return {{0, Product(in[0]), out, from, Strides(out), 0, 0}};
  }

 private:
  const Sizes shape_;
};

class Slice : public AnyMove {
 public:
  explicit Slice(Fields& fields)
      : start_(fields.Integers("start", 0)), stop_(fields.Integers("stop", 1)),
        strides_(fields.Integers("strides", 1)) {}

 protected:
  Sizes OutOf(const std::vector<Sizes>& in) const override {
    const Sizes& shape = OneShape(in);
    Require(shape.size() == start_.size() && shape.size() == stop_.size() &&
                shape.size() == strides_.size(),
            "expected a slice of all axes");
    Sizes out;
    for (size_t i = 0; i < shape.size(); ++i) {
      Require(start_[i] < stop_[i] && stop_[i] <= shape[i], "expected a slice inside");
      out.push_back((stop_[i] - start_[i] - 1) / strides_[i] + 1);
    }
    return out;
  }
  bool MovesWords(const std::vector<Sizes>& in, const Sizes&) const override {
    return strides_.back() == 1 && start_.back() % kPanel == 0 &&
           (stop_.back() % kPanel == 0 || stop_.back() == in[0].back());
  }
  std::vector<Move> Moves(const std::vector<Sizes>& in, const Sizes& out,
                          int64_t word) const override {
    Sizes from = Strides(in[0]);
    int64_t offset = 0;
    for (size_t i = 0; i < from.size(); ++i) {
      const bool last = i + 1 == from.size();
      offset += (last ? start_[i] / word : start_[i]) * from[i];
      from[i] *= strides_[i];
    }
    return {{0, Product(in[0]), out, from, Strides(out), offset, 0}};
  }

 private:
  const Sizes start_, stop_, strides_;
};

class Pad : public AnyMove {
 public:
  explicit Pad(Fields& fields) : padding_(fields.Padding("padding")) {
    if (!fields.Has("value")) return;
    const json::Value value = fields.Take("value");
    value_ = value.is(json::Kind::kNull) ? -std::numeric_limits<float>::infinity()
                                         : static_cast<float>(ReadReal(value, "value"));
    whole_ = value.is(json::Kind::kNull) ? value_ : ReadReal(value, "value");
  }

 protected:
  bool KeepsSigns() const override { return std::fabs(whole_) == 1; }
  Sizes OutOf(const std::vector<Sizes>& in) const override {
    const Sizes& shape = OneShape(in);
    Require(shape.size() == padding_.size(), "expected a padding for each axis");
    Sizes out;
    for (size_t i = 0; i < shape.size(); ++i)
      out.push_back(shape[i] + padding_[i].first + padding_[i].second);
    return out;
  }
  bool MovesWords(const std::vector<Sizes>&, const Sizes&) const override { return false; }
  std::vector<Move> Moves(const std::vector<Sizes>& in, const Sizes& out,
                          int64_t) const override {
    const Sizes to = Strides(out);
    int64_t offset = 0;
    for (size_t i = 0; i < to.size(); ++i) offset += padding_[i].first * to[i];
    return {{0, Product(in[0]), in[0], Strides(in[0]), to, 0, offset}};
  }
  int Moved(Graph& graph, const std::vector<int>& inputs, const std::vector<Sizes>& in,
            const Sizes& to, const Spec& out, const Arrays&, int64_t) const override {
    const float fill = out.dtype == DType::kBool ? value_ != 0 : value_;
    return graph.Add(MakeMoves(Product(to), Moves(in, to, 1), &fill), inputs, out);
  }

 private:
  const Pads padding_;
  float value_ = 0;
  double whole_ = 0;
};

class Concatenate : public AnyMove {
 public:
  explicit Concatenate(Fields& fields) : axis_(fields.Integer("axis", 1, 1, 8) - 1) {}

 protected:
  Sizes OutOf(const std::vector<Sizes>& in) const override {
    Sizes out = in[0];
    Require(axis_ < static_cast<int64_t>(out.size()), "expected more axes");
    for (size_t i = 1; i < in.size(); ++i) {
      Require(in[i].size() == out.size(), "expected as many axes of all");
      for (size_t axis = 0; axis < out.size(); ++axis)
        Require(static_cast<int64_t>(axis) == axis_ || in[i][axis] == out[axis],
                "the shapes do not fit each other");
      out[axis_] += in[i][axis_];
    }
    return out;
  }
  bool MovesWords(const std::vector<Sizes>& in, const Sizes& out) const override {
    if (axis_ + 1 < static_cast<int64_t>(out.size())) return true;
    for (size_t i = 0; i + 1 < in.size(); ++i)
      if (in[i].back() % kPanel != 0) return false;
    return true;
  }
  std::vector<Move> Moves(const std::vector<Sizes>& in, const Sizes& out,
                          int64_t) const override {
    const Sizes to = Strides(out);
    std::vector<Move> moves;
    int64_t offset = 0;
    for (size_t i = 0; i < in.size(); ++i) {
      moves.push_back(
          {static_cast<int>(i), Product(in[i]), in[i], Strides(in[i]), to, 0, offset});
      offset += in[i][axis_] * to[axis_];
    }
    return moves;
  }

 private:
  const int64_t axis_;
};

class Take : public AnyMove {
 public:
  explicit Take(Fields& fields) : shape_(fields.Integers("shape", 1)) {}
  std::vector<Member> Members(const std::vector<Spec>& in) const override {
    Out(in);
    return {{"places", Member::kIndices, shape_, Product(in[0].shape)}};
  }

 protected:
  Sizes OutOf(const std::vector<Sizes>& in) const override {
    OneShape(in);
    return shape_;
  }
  bool MovesWords(const std::vector<Sizes>&, const Sizes&) const override { return false; }
  std::vector<Move> Moves(const std::vector<Sizes>&, const Sizes&,
                          int64_t) const override {
    return {};
  }
  int Moved(Graph& graph, const std::vector<int>& inputs, const std::vector<Sizes>& in,
            const Sizes&, const Spec& out, const Arrays& arrays, int64_t) const override {
    return graph.Add(MakeTake(Product(in[0]), arrays.Indices("places")), inputs, out);
  }

 private:
  const Sizes shape_;
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

template <class Type>
std::unique_ptr<Node> Read(Fields& fields) {
  return std::make_unique<Type>(fields);
}

// As NODES in packing/graph.py.
constexpr struct {
  const char* kind;
  std::unique_ptr<Node> (*read)(Fields&);
} kNodes[] = {
    {"binary_conv", Read<BinaryConv>},
    {"conv", Read<RealConv>},
    {"matmul", Read<MatMul>},
    {"sign", Read<Sign>},
    {"max_pool_bits", Read<MaxPoolBits>},
    {"sum_pool_bits", Read<SumPoolBits>},
    {"pool", Read<FloatPool>},
    {"norm", Read<Norm>},
    {"mean", Read<Mean>},
    {"elementwise", Read<Elementwise>},
    {"reduce", Read<Reduce>},
    {"reshape", Read<Reshape>},
    {"transpose", Read<Transpose>},
    {"broadcast", Read<Broadcast>},
    {"slice", Read<Slice>},
    {"pad", Read<Pad>},
    {"concatenate", Read<Concatenate>},
    {"take", Read<Take>},
    {"constant", Read<Constant>},
};

}  // namespace

std::vector<Member> Node::Members(const std::vector<Spec>&) const { return {}; }

std::unique_ptr<Node> ReadNode(const json::Value& found) {
  Require(found.is(json::Kind::kObject), "expected an object");
  Fields fields(found);
  const std::string kind = fields.String("kind");
  for (const auto& entry : kNodes)
    if (kind == entry.kind) {
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
