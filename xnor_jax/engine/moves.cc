// Nodes that only move values; signs stay packed.
#include <cmath>
#include <limits>

#include "nodes.h"

namespace xnor {
namespace {

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
    Require(!truth || !numbers, "expected bool in all inputs or in none");
    const Sizes shape = OutOf(shapes);
    Require(!bits || !shape.empty(), "expected bits with channels");
    return {shape, bits ? DType::kBits : truth ? DType::kBool : DType::kFloat};
  }

  // Moves whole words where they stay intact, else floats.
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
  // Whether words of signs stay intact.
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
    Require(Product(OneShape(in)) == Product(shape_),
            "expected a shape of the input's size");
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
              "expected a permutation of all axes");
      seen[axis - 1] = true;
      out.push_back(shape[axis - 1]);
    }
    Require(out.size() == shape.size(), "expected a permutation of all axes");
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
    Require(shape.size() == shape_.size(), "expected a shape of the input's rank");
    for (size_t i = 0; i < shape.size(); ++i)
      Require(shape[i] == 1 || shape[i] == shape_[i], "the input does not broadcast");
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
            "expected a start, a stop and a stride for each axis");
    Sizes out;
    for (size_t i = 0; i < shape.size(); ++i) {
      Require(start_[i] < stop_[i] && stop_[i] <= shape[i],
              "expected start < stop <= size on each axis");
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
    // A subnormal number is 0, in whatever mode this runs.
    const bool truth = std::fabs(whole_) >= std::numeric_limits<float>::min();
    const float fill = out.dtype == DType::kBool ? truth : value_;
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
    Require(axis_ < static_cast<int64_t>(out.size()), "the axis is out of range");
    for (size_t i = 1; i < in.size(); ++i) {
      Require(in[i].size() == out.size(), "expected inputs of the same rank");
      for (size_t axis = 0; axis < out.size(); ++axis)
        Require(static_cast<int64_t>(axis) == axis_ || in[i][axis] == out[axis],
                "expected shapes that are equal on the other axes");
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

}  // namespace

std::vector<NodeKind> MoveNodes() {
  return {{"reshape", Read<Reshape>}, {"transpose", Read<Transpose>},
          {"broadcast", Read<Broadcast>}, {"slice", Read<Slice>},
          {"pad", Read<Pad>}, {"concatenate", Read<Concatenate>},
          {"take", Read<Take>}};
}

}  // namespace xnor
