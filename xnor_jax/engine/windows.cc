// Nodes that read windows of a value, possibly of one number: products, signs, pools.
#include "nodes.h"

namespace xnor {
namespace {

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

// A row of `count` pixels, with windows of one pixel.
Geometry Pixels(int64_t count) {
  Geometry g;
  g.y = Axis(count, 1, 1, 0, 0, 1);
  return g;
}

// A convolution, or without a window a dense layer on the last axis.
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
              "expected no strides, padding or dilation for a dense layer");
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
    Require(!spec.shape.empty(), "expected channels, got a scalar");
    const int64_t each = spec.channels() / groups_;
    Require(spec.channels() % groups_ == 0 && each > 0 && features_ % groups_ == 0,
            "expected channels that divide into the groups");
    Require(window_.size() <= 3 && (groups_ == 1 || !window_.empty()),
            "expected at most 3 spatial axes, and groups=1 for a dense layer");
    Sizes shape = window_;
    shape.push_back(each), shape.push_back(features_);
    Require(Product(shape) <= kLargestKernel, "a kernel has too many weights");
    return shape;
  }

  Geometry WindowsOf(const Spec& spec) const {
    return window_.empty() ? Pixels(spec.positions())
                           : Windows(spec.shape, window_, strides_, padding_, dilation_);
  }

  // Whether every group of thresholded outputs begins at a whole word.
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
  explicit RealConv(Fields& fields)
      : AnyProduct(fields), scaled_(fields.Boolean("scaled")) {}

  std::vector<Member> Members(const std::vector<Spec>& in) const override {
    RequireNumbers(Single(in));
    std::vector<Member> found = {{"kernel", Member::kFloats, KernelShape(in[0])}};
    if (threshold()) {
      Require(!scaled_, "expected no scale with a threshold");
      found.push_back({"threshold", Member::kReals, {features_}});
      found.push_back({"flip", Member::kFlip, {features_}});
    } else {
      found.push_back({"bias", Member::kFloats, {features_}});
      if (scaled_) {
        found.push_back({"scale", Member::kFloats, {features_}});
        found.push_back({"shift", Member::kFloats, {features_}});
      }
    }
    return found;
  }

  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    const Spec spec = graph.spec(in[0]);
    const std::vector<float> kernel = arrays.Floats("kernel");
    std::vector<float> scale(features_, 1.0f), bias, shift;
    Target<float> target;
    if (threshold()) {
      target.epilogue = Epilogue::kThreshold;
      target.threshold = arrays.KeptFloats("threshold");
      target.flip = arrays.Flip("flip");
    } else {
      bias = arrays.Floats("bias");
      if (scaled_) {
        scale = arrays.Floats("scale"), shift = arrays.Floats("shift");
        target.shift = shift.data();
      }
      target.epilogue = Epilogue::kAffine;
      target.scale = scale.data(), target.bias = bias.data();
      target.relu = epilogue_ == "affine_relu";
    }
    const Target<float> now = threshold() && !whole_words() ? Target<float>() : target;
    const int y = graph.Add(MakeRealConv(WindowsOf(spec), groups_,
                                         spec.channels() / groups_, features_, now,
                                         kernel.data()),
                            {graph.Floats(in[0])}, out);
    if (!threshold() || whole_words()) return y;
    return graph.Add(
        MakeSign(out.positions(), features_, target.threshold, target.flip), {y}, out);
  }

 private:
  const bool scaled_;
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
  int Lower(Graph& graph, const std::vector<int>& in, const Spec& out,
            const Arrays& arrays) const override {
    const std::vector<float> threshold = arrays.Floats("threshold");
    return graph.Add(MakeSign(out.positions(), out.channels(), threshold.data(),
                              arrays.Flip("flip")),
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

}  // namespace

std::vector<NodeKind> WindowNodes() {
  return {{"binary_conv", Read<BinaryConv>},     {"conv", Read<RealConv>},
          {"sign", Read<Sign>},                  {"max_pool_bits", Read<MaxPoolBits>},
          {"sum_pool_bits", Read<SumPoolBits>},  {"pool", Read<FloatPool>}};
}

}  // namespace xnor
