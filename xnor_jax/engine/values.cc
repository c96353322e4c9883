#include "values.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "select.h"

namespace xnor {
namespace {

Shape Flat(Type type, int64_t size) { return {type, 1, 1, size}; }

class Unpack : public Operation {
 public:
  Unpack(int64_t pixels, int64_t channels)
      : Operation({Type::kFloats, pixels, 1, channels}) {
    work = kOnce * static_cast<double>(out.size());
  }
  void Run(const Call& call) const override {
    const int64_t channels = out.depth, words = WordsFor(channels);
    const int64_t pixels = call.images * out.height;
    InParts(call.team, pixels, channels, [&](int64_t begin, int64_t end) {
      const uint32_t* x = call.words() + begin * words;
      Chosen().unpack(x, x, channels, end - begin,
                      static_cast<float*>(call.out) + begin * channels);
    });
  }
};

class Regroup : public Operation {
 public:
  Regroup(int64_t pixels, int64_t channels, int64_t groups)
      : Operation({Type::kWords, pixels, groups, WordsFor(channels / groups)}),
        each_(channels / groups), words_(WordsFor(channels)) {
    work = kOnce * static_cast<double>(out.size());
  }
  void Run(const Call& call) const override {
    const int64_t groups = out.width, words = out.depth, pixels = call.images * out.height;
    InParts(call.team, pixels, groups * words, [&](int64_t begin, int64_t end) {
      uint32_t* y = static_cast<uint32_t*>(call.out) + begin * groups * words;
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const uint32_t* x = call.words() + pixel * words_;
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t word = 0; word < words; ++word, ++y) {
            const int64_t first = group * each_ + word * kPanel;
            const int64_t low = first / kPanel, high = std::min(low + 1, words_ - 1);
            const int shift = static_cast<int>(first % kPanel);
            const int64_t used = std::min<int64_t>(each_ - word * kPanel, kPanel);
            const uint64_t both = static_cast<uint64_t>(x[high]) << kPanel | x[low];
            *y = static_cast<uint32_t>(both >> shift) & (~0u >> (kPanel - used));
          }
      }
    });
  }

 private:
  const int64_t each_, words_;
};

template <class Sum>
class Threshold : public Operation {
 public:
  Threshold(int64_t pixels, int64_t channels, const Target<Sum>& target)
      : Operation({Type::kWords, pixels, 1, WordsFor(channels)}), channels_(channels),
        target_(target) {
    work = kOnce * static_cast<double>(pixels) * static_cast<double>(channels);
  }
  void Run(const Call& call) const override {
    const int64_t words = out.depth;
    InParts(call.team, call.images * out.height, channels_, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const Sum* x = static_cast<const Sum*>(call.in[0]) + pixel * channels_;
        uint32_t* y = static_cast<uint32_t*>(call.out) + pixel * words;
        for (int64_t word = 0; word < words; ++word) {
          uint32_t bits = target_.flip[word];
          const int64_t last = std::min((word + 1) * kPanel, channels_);
          for (int64_t c = word * kPanel; c < last; ++c)
            bits ^= static_cast<uint32_t>(!(x[c] >= target_.threshold[c])) << c % kPanel;
          y[word] = bits;
        }
      }
    });
  }

 private:
  const int64_t channels_;
  const Target<Sum> target_;
};

// As XLA has them: NaN is larger and smaller than anything.
inline float Largest(float a, float b) { return a > b || a != a ? a : b; }
inline float Smallest(float a, float b) { return a < b || a != a ? a : b; }

float Start(Reduction function) {
  constexpr float kInfinite = std::numeric_limits<float>::infinity();
  return function == Reduction::kSum   ? 0.0f
         : function == Reduction::kMax ? -kInfinite
                                       : kInfinite;
}

// y[i] and x[i] become y[i].
inline void Combine(Reduction function, const float* __restrict x, float* __restrict y,
                    int64_t count) {
  const auto all = [&](auto combine) {
    for (int64_t i = 0; i < count; ++i) y[i] = combine(y[i], x[i]);
  };
  switch (function) {
    case Reduction::kSum: return all([](float a, float b) { return a + b; });
    case Reduction::kMax: return all(Largest);
    case Reduction::kMin: return all(Smallest);
  }
}

class Pool : public Operation {
 public:
  Pool(const Geometry& g, int64_t channels, Reduction function)
      : Operation({Type::kFloats, Times(g.z.out, g.y.out), g.x.out, channels}), g_(g),
        function_(function) {
    reads_ = static_cast<double>(channels);
    for (const Axis* axis : {&g.z, &g.y, &g.x})
      reads_ *= static_cast<double>(std::min(axis->window, axis->size));
    work = kOnce * reads_ * g.pixels();
  }
  void Run(const Call& call) const override {
    InParts(call.team, call.images * out.pixels(), reads_, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel) Pixel(call, pixel);
    });
  }

 private:
  // One number after another, row by row: the order of the additions is part of what a
  // network computes.
  void Pixel(const Call& call, int64_t pixel) const {
    const Geometry& g = g_;
    const int64_t channels = out.depth;
    float* y = static_cast<float*>(call.out) + pixel * channels;
    std::fill(y, y + channels, Start(function_));
    const int64_t at_x = pixel % g.x.out, at_y = pixel / g.x.out % g.y.out;
    const int64_t at_z = pixel / (g.x.out * g.y.out) % g.z.out;
    const float* image = call.floats() + pixel / (g.x.out * g.y.out * g.z.out) *
                                             (g.z.size * g.y.size * g.x.size * channels);
    const auto [front, back] = g.z.Inside(at_z);
    const auto [top, bottom] = g.y.Inside(at_y);
    const auto [left, right] = g.x.Inside(at_x);
    for (int64_t k = front; k < back; ++k)
      for (int64_t i = top; i < bottom; ++i) {
        const int64_t z = at_z * g.z.stride - g.z.before + k;
        const int64_t row = z * g.y.size + at_y * g.y.stride - g.y.before + i;
        for (int64_t j = left; j < right; ++j) {
          const int64_t x = row * g.x.size + at_x * g.x.stride - g.x.before + j;
          Combine(function_, image + x * channels, y, channels);
        }
      }
  }

  const Geometry g_;
  const Reduction function_;
  double reads_;
};

// Axes that are walked together by several operands, merged where all allow it.
struct Walk {
  Sizes sizes;
  std::vector<Sizes> strides;  // [axis][operand]

  void Add(int64_t size, const Sizes& strides_of_axis) {
    if (size == 1 && !sizes.empty()) return;
    if (!sizes.empty()) {
      bool merges = true;
      for (size_t i = 0; i < strides_of_axis.size(); ++i)
        merges &= strides.back()[i] == strides_of_axis[i] * size;
      if (merges || sizes.back() == 1) {
        sizes.back() *= size;
        strides.back() = strides_of_axis;
        return;
      }
    }
    sizes.push_back(size);
    strides.push_back(strides_of_axis);
  }
  int64_t axes() const { return static_cast<int64_t>(sizes.size()); }
  // How far operand i is at place `index` of the first `count` axes.
  int64_t Offset(int64_t index, int64_t count, size_t i) const {
    int64_t offset = 0;
    for (int64_t axis = count - 1; axis >= 0; --axis) {
      offset += index % sizes[axis] * strides[axis][i];
      index /= sizes[axis];
    }
    return offset;
  }
};

class Reduce : public Operation {
 public:
  Reduce(const Sizes& shape, const std::vector<bool>& over, Reduction function)
      : Operation(Flat(Type::kFloats, Kept(shape, over))), function_(function),
        in_size_(Product(shape)) {
    const Sizes strides = Strides(shape);
    for (size_t axis = 0; axis < shape.size(); ++axis)
      (over[axis] ? reduced_ : kept_).Add(shape[axis], {strides[axis]});
    kept_.Add(1, {1}), reduced_.Add(1, {1});  // At least one axis each.
    work = kOnce * static_cast<double>(in_size_);
  }
  void Run(const Call& call) const override {
    const int64_t row = kept_.sizes.back();
    const bool side_by_side = kept_.strides.back()[0] == 1;
    if (!side_by_side) return Alone(call);
    const int64_t rows = out.depth / row, count = Product(reduced_.sizes);
    const double reads = static_cast<double>(row) * count;
    InParts(call.team, call.images * rows, reads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const float* x = call.floats() + r / rows * in_size_ +
                         kept_.Offset(r % rows, kept_.axes() - 1, 0);
        float* y = static_cast<float*>(call.out) + r * row;
        std::fill(y, y + row, Start(function_));
        for (int64_t i = 0; i < count; ++i)
          Combine(function_, x + reduced_.Offset(i, reduced_.axes(), 0), y, row);
      }
    });
  }

 private:
  // Each number for itself, where those to be added up lie closer than the results.
  void Alone(const Call& call) const {
    const int64_t last = reduced_.axes() - 1, row = reduced_.sizes[last];
    const int64_t stride = reduced_.strides[last][0], rows = Product(reduced_.sizes) / row;
    const double reads = static_cast<double>(row) * rows;
    InParts(call.team, call.images * out.depth, reads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const float* x = call.floats() + n / out.depth * in_size_ +
                         kept_.Offset(n % out.depth, kept_.axes(), 0);
        float y = Start(function_);
        for (int64_t r = 0; r < rows; ++r) {
          const float* from = x + reduced_.Offset(r, last, 0);
          for (int64_t i = 0; i < row; ++i) Combine(function_, from + i * stride, &y, 1);
        }
        static_cast<float*>(call.out)[n] = y;
      }
    });
  }

  static int64_t Kept(const Sizes& shape, const std::vector<bool>& over) {
    int64_t size = 1;
    for (size_t axis = 0; axis < shape.size(); ++axis)
      if (!over[axis]) size = Times(size, shape[axis]);
    return size;
  }

  const Reduction function_;
  const int64_t in_size_;
  Walk kept_, reduced_;
};

// Functions of one to three numbers, over `count` of them so far apart.
using Function = void (*)(const float* const* in, const int64_t* strides, float* out,
                          int64_t count, int64_t exponent);

template <class F>
void One(const float* const* in, const int64_t* strides, float* __restrict out,
         int64_t count, int64_t) {
  const float* __restrict a = in[0];
  if (strides[0] == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i * strides[0]]);
}

template <class F>
void Two(const float* const* in, const int64_t* strides, float* __restrict out,
         int64_t count, int64_t) {
  const float *__restrict a = in[0], *__restrict b = in[1];
  const int64_t s = strides[0], t = strides[1];
  if (s == 1 && t == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i], b[i]);
  else if (s == 1 && t == 0)
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i], b[0]);
  else if (s == 0 && t == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[0], b[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i * s], b[i * t]);
}

template <class F>
void Three(const float* const* in, const int64_t* strides, float* __restrict out,
           int64_t count, int64_t) {
  const float *__restrict a = in[0], *__restrict b = in[1], *__restrict c = in[2];
  const int64_t s = strides[0], t = strides[1], u = strides[2];
  if (s == 1 && t == 1 && u == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i], b[i], c[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i * s], b[i * t], c[i * u]);
}

void IntegerPower(const float* const* in, const int64_t* strides, float* out,
                  int64_t count, int64_t exponent) {
  for (int64_t i = 0; i < count; ++i) {
    float x = in[0][i * strides[0]], y = 1.0f;
    for (int64_t rest = std::abs(exponent); rest > 0; rest >>= 1, x *= x)
      if (rest & 1) y *= x;
    out[i] = exponent < 0 ? 1.0f / y : y;
  }
}

struct Entry {
  const char* name;
  int arity;
  Function run;
};

// What a lambda cannot be in C++17: a type of its own that a template takes.
#define XNOR_DEFINE_ONE(type, expression) \
  struct type {                           \
    float operator()(float x) const { return expression; } \
  };
#define XNOR_DEFINE_TWO(type, expression) \
  struct type {                           \
    float operator()(float x, float y) const { return expression; } \
  };

XNOR_DEFINE_TWO(Add, x + y)
XNOR_DEFINE_TWO(Sub, x - y)
XNOR_DEFINE_TWO(Mul, x* y)
XNOR_DEFINE_TWO(Div, x / y)
XNOR_DEFINE_TWO(Max, Largest(x, y))
XNOR_DEFINE_TWO(Min, Smallest(x, y))
XNOR_DEFINE_TWO(Rem, std::fmod(x, y))
XNOR_DEFINE_TWO(Pow, std::pow(x, y))
XNOR_DEFINE_TWO(Atan2, std::atan2(x, y))
XNOR_DEFINE_TWO(Ge, x >= y)
XNOR_DEFINE_TWO(Gt, x > y)
XNOR_DEFINE_TWO(Le, x <= y)
XNOR_DEFINE_TWO(Lt, x < y)
XNOR_DEFINE_TWO(Eq, x == y)
XNOR_DEFINE_TWO(Ne, x != y)
XNOR_DEFINE_TWO(And, x != 0 && y != 0)
XNOR_DEFINE_TWO(Or, x != 0 || y != 0)
XNOR_DEFINE_TWO(Xor, (x != 0) != (y != 0))
XNOR_DEFINE_ONE(Neg, -x)
XNOR_DEFINE_ONE(Abs, std::fabs(x))
XNOR_DEFINE_ONE(SignOf, x > 0 ? 1.0f : x < 0 ? -1.0f : x)
XNOR_DEFINE_ONE(Floor, std::floor(x))
XNOR_DEFINE_ONE(Ceil, std::ceil(x))
XNOR_DEFINE_ONE(Round, std::nearbyint(x))
XNOR_DEFINE_ONE(Exp, std::exp(x))
XNOR_DEFINE_ONE(Exp2, std::exp2(x))
XNOR_DEFINE_ONE(Expm1, std::expm1(x))
XNOR_DEFINE_ONE(Log, std::log(x))
XNOR_DEFINE_ONE(Log1p, std::log1p(x))
XNOR_DEFINE_ONE(Tanh, std::tanh(x))
XNOR_DEFINE_ONE(Logistic, 1.0f / (1.0f + std::exp(-x)))
XNOR_DEFINE_ONE(Sin, std::sin(x))
XNOR_DEFINE_ONE(Cos, std::cos(x))
XNOR_DEFINE_ONE(Tan, std::tan(x))
XNOR_DEFINE_ONE(Sqrt, std::sqrt(x))
XNOR_DEFINE_ONE(Rsqrt, 1.0f / std::sqrt(x))
XNOR_DEFINE_ONE(Cbrt, std::cbrt(x))
XNOR_DEFINE_ONE(Erf, std::erf(x))
XNOR_DEFINE_ONE(Erfc, std::erfc(x))
XNOR_DEFINE_ONE(Square, x* x)
XNOR_DEFINE_ONE(ToFloat, x)
XNOR_DEFINE_ONE(IsFinite, std::isfinite(x))
XNOR_DEFINE_ONE(Not, x == 0)

struct Clamp {
  float operator()(float low, float x, float high) const {
    return Largest(low, Smallest(x, high));
  }
};
struct Select {
  float operator()(float which, float if_false, float if_true) const {
    return which != 0 ? if_true : if_false;
  }
};

// As FUNCTIONS in packing/functions.py.
constexpr Entry kFunctions[] = {
    {"add", 2, Two<Add>},       {"sub", 2, Two<Sub>},
    {"mul", 2, Two<Mul>},       {"div", 2, Two<Div>},
    {"max", 2, Two<Max>},       {"min", 2, Two<Min>},
    {"rem", 2, Two<Rem>},       {"pow", 2, Two<Pow>},
    {"atan2", 2, Two<Atan2>},   {"neg", 1, One<Neg>},
    {"abs", 1, One<Abs>},       {"sign", 1, One<SignOf>},
    {"floor", 1, One<Floor>},   {"ceil", 1, One<Ceil>},
    {"round", 1, One<Round>},   {"exp", 1, One<Exp>},
    {"exp2", 1, One<Exp2>},     {"expm1", 1, One<Expm1>},
    {"log", 1, One<Log>},       {"log1p", 1, One<Log1p>},
    {"tanh", 1, One<Tanh>},     {"logistic", 1, One<Logistic>},
    {"sin", 1, One<Sin>},       {"cos", 1, One<Cos>},
    {"tan", 1, One<Tan>},       {"sqrt", 1, One<Sqrt>},
    {"rsqrt", 1, One<Rsqrt>},   {"cbrt", 1, One<Cbrt>},
    {"erf", 1, One<Erf>},       {"erfc", 1, One<Erfc>},
    {"square", 1, One<Square>}, {"integer_pow", 1, IntegerPower},
    {"clamp", 3, Three<Clamp>}, {"to_float", 1, One<ToFloat>},
    {"ge", 2, Two<Ge>},         {"gt", 2, Two<Gt>},
    {"le", 2, Two<Le>},         {"lt", 2, Two<Lt>},
    {"eq", 2, Two<Eq>},         {"ne", 2, Two<Ne>},
    {"is_finite", 1, One<IsFinite>},
    {"not", 1, One<Not>},       {"and", 2, Two<And>},
    {"or", 2, Two<Or>},         {"xor", 2, Two<Xor>},
    {"select", 3, Three<Select>},
};

const Entry* Find(const std::string& name) {
  for (const Entry& entry : kFunctions)
    if (name == entry.name) return &entry;
  return nullptr;
}

class Elementwise : public Operation {
 public:
  Elementwise(Function run, const Sizes& shape, const std::vector<Operand>& operands,
              int64_t exponent)
      : Operation(Flat(Type::kFloats, Product(shape))), run_(run), exponent_(exponent),
        operands_(operands) {
    std::vector<Sizes> strides(shape.size(), Sizes(operands.size()));
    Sizes batch;
    for (size_t i = 0; i < operands.size(); ++i) {
      const Sizes& own = operands[i].shape;
      const Sizes steps = Strides(own);
      const size_t missing = shape.size() - own.size();
      for (size_t axis = 0; axis < own.size(); ++axis)
        strides[missing + axis][i] = own[axis] == 1 ? 0 : steps[axis];
      batch.push_back(operands[i].constant != nullptr ? 0 : Product(own));
    }
    // The batch's axis is the first, of size 1 here.
    walk_.sizes.push_back(1), walk_.strides.push_back(batch);
    bool first = true;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis] == 1) continue;
      if (first && !Continues(batch, strides[axis], shape[axis])) {
        walk_.sizes.push_back(shape[axis]), walk_.strides.push_back(strides[axis]);
      } else if (first) {
        walk_.sizes[0] = shape[axis], walk_.strides[0] = strides[axis];
      } else {
        walk_.Add(shape[axis], strides[axis]);
      }
      first = false;
    }
    work = kOnce * static_cast<double>(out.depth);
  }

  void Run(const Call& call) const override {
    const float* base[3] = {};
    for (size_t i = 0; i < operands_.size(); ++i)
      base[i] = operands_[i].constant != nullptr ? operands_[i].constant
                                                 : call.floats(operands_[i].input);
    float* const y = static_cast<float*>(call.out);
    const int64_t last = walk_.axes() - 1, row = walk_.sizes[last];
    const int64_t* strides = walk_.strides[last].data();
    const auto run = [&](int64_t place, int64_t count, const auto& offset) {
      const float* in[3] = {};
      for (size_t i = 0; i < operands_.size(); ++i) in[i] = base[i] + offset(i);
      run_(in, strides, y + place, count, exponent_);
    };
    if (last == 0) {
      InParts(call.team, call.images * row, 1, [&](int64_t begin, int64_t end) {
        run(begin, end - begin, [&](size_t i) { return begin * strides[i]; });
      });
      return;
    }
    const int64_t rows = call.images * (out.depth / row);
    InParts(call.team, rows, row, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        run(r * row, row, [&](size_t i) { return Offset(r, last, i); });
    });
  }

 private:
  static bool Continues(const Sizes& outer, const Sizes& inner, int64_t size) {
    for (size_t i = 0; i < outer.size(); ++i)
      if (outer[i] != inner[i] * size) return false;
    return true;
  }
  // As the walk's, but for the first axis, which goes on through all images.
  int64_t Offset(int64_t index, int64_t count, size_t i) const {
    int64_t offset = 0;
    for (int64_t axis = count - 1; axis > 0; --axis) {
      offset += index % walk_.sizes[axis] * walk_.strides[axis][i];
      index /= walk_.sizes[axis];
    }
    return offset + index * walk_.strides[0][i];
  }

  const Function run_;
  const int64_t exponent_;
  const std::vector<Operand> operands_;
  Walk walk_;
};

class Moves : public Operation {
 public:
  Moves(int64_t size, std::vector<Move> moves, const float* fill)
      : Operation(Flat(Type::kFloats, size)), filled_(fill != nullptr),
        fill_(fill != nullptr ? *fill : 0) {
    for (Move& move : moves) {
      Walk walk;
      for (size_t axis = 0; axis < move.sizes.size(); ++axis)
        walk.Add(move.sizes[axis], {move.from[axis], move.to[axis]});
      walk.Add(1, {1, 1});
      moves_.push_back({std::move(move), std::move(walk)});
    }
    work = kOnce * static_cast<double>(size);
  }
  void Run(const Call& call) const override {
    uint32_t* const y = static_cast<uint32_t*>(call.out);
    if (filled_)
      InParts(call.team, call.images * out.depth, 1, [&](int64_t begin, int64_t end) {
        std::fill(static_cast<float*>(call.out) + begin,
                  static_cast<float*>(call.out) + end, fill_);
      });
    for (const auto& [move, walk] : moves_) {
      const uint32_t* const x = call.words(move.input);
      const int64_t last = walk.axes() - 1, row = walk.sizes[last];
      const int64_t from = walk.strides[last][0], to = walk.strides[last][1];
      const int64_t rows = Product(walk.sizes) / row;
      InParts(call.team, call.images * rows, row, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const uint32_t* source = x + r / rows * move.input_size + move.from_offset +
                                   walk.Offset(r % rows, last, 0);
          uint32_t* target = y + r / rows * out.depth + move.to_offset +
                             walk.Offset(r % rows, last, 1);
          if (from == 1 && to == 1)
            std::copy(source, source + row, target);
          else
            for (int64_t i = 0; i < row; ++i) target[i * to] = source[i * from];
        }
      });
    }
  }

 private:
  const bool filled_;
  const float fill_;
  std::vector<std::pair<Move, Walk>> moves_;
};

class Take : public Operation {
 public:
  Take(int64_t in_size, std::vector<int32_t> places)
      : Operation(Flat(Type::kFloats, static_cast<int64_t>(places.size()))),
        in_size_(in_size), places_(std::move(places)) {
    work = kOnce * static_cast<double>(out.depth);
  }
  void Run(const Call& call) const override {
    InParts(call.team, call.images, out.depth, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t i = 0; i < out.depth; ++i)
          static_cast<float*>(call.out)[n * out.depth + i] =
              call.floats()[n * in_size_ + places_[i]];
    });
  }

 private:
  const int64_t in_size_;
  const std::vector<int32_t> places_;
};

class Constant : public Operation {
 public:
  explicit Constant(std::vector<float> value)
      : Operation(Flat(Type::kFloats, static_cast<int64_t>(value.size()))),
        value_(std::move(value)) {}
  void Run(const Call& call) const override {
    for (int64_t n = 0; n < call.images; ++n)
      std::copy(value_.begin(), value_.end(), static_cast<float*>(call.out) + n * out.depth);
  }

 private:
  const std::vector<float> value_;
};

class MatMul : public Operation {
 public:
  MatMul(int64_t batch, int64_t rows, int64_t inner, int64_t columns)
      : Operation({Type::kFloats, batch, rows, columns}), inner_(inner) {
    work = static_cast<double>(out.size()) * static_cast<double>(inner);
  }
  void Run(const Call& call) const override {
    const int64_t rows = out.width, columns = out.depth, count = call.images * out.pixels();
    InParts(call.team, count, static_cast<double>(inner_) * columns,
            [&](int64_t begin, int64_t end) {
              for (int64_t r = begin; r < end; ++r) {
                const float* a = call.floats(0) + r * inner_;
                const float* b = call.floats(1) + r / rows * inner_ * columns;
                float* __restrict y = static_cast<float*>(call.out) + r * columns;
                std::fill(y, y + columns, 0.0f);
                for (int64_t k = 0; k < inner_; ++k, b += columns)
                  for (int64_t c = 0; c < columns; ++c) y[c] += a[k] * b[c];
              }
            });
  }

 private:
  const int64_t inner_;
};

}  // namespace

int64_t Product(const Sizes& sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) product = Times(product, size);
  return product;
}

Sizes Strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0; stride = Times(stride, sizes[axis]))
    strides[axis] = stride;
  return strides;
}

std::unique_ptr<Operation> MakeUnpack(int64_t pixels, int64_t channels) {
  return std::make_unique<Unpack>(pixels, channels);
}

std::unique_ptr<Operation> MakeRegroup(int64_t pixels, int64_t channels, int64_t groups) {
  return std::make_unique<Regroup>(pixels, channels, groups);
}

std::unique_ptr<Operation> MakeThreshold(int64_t pixels, int64_t channels,
                                         const Target<int32_t>& target) {
  return std::make_unique<Threshold<int32_t>>(pixels, channels, target);
}

std::unique_ptr<Operation> MakeThreshold(int64_t pixels, int64_t channels,
                                         const Target<float>& target) {
  return std::make_unique<Threshold<float>>(pixels, channels, target);
}

std::unique_ptr<Operation> MakePool(const Geometry& g, int64_t channels,
                                    Reduction function) {
  return std::make_unique<Pool>(g, channels, function);
}

std::unique_ptr<Operation> MakeReduce(const Sizes& shape, const std::vector<bool>& over,
                                      Reduction function) {
  return std::make_unique<Reduce>(shape, over, function);
}

int Arity(const std::string& function) {
  const Entry* entry = Find(function);
  return entry != nullptr ? entry->arity : 0;
}

std::unique_ptr<Operation> MakeElementwise(const std::string& function,
                                           const Sizes& shape,
                                           const std::vector<Operand>& operands,
                                           int64_t exponent) {
  return std::make_unique<Elementwise>(Find(function)->run, shape, operands, exponent);
}

std::unique_ptr<Operation> MakeMoves(int64_t size, std::vector<Move> moves,
                                     const float* fill) {
  return std::make_unique<Moves>(size, std::move(moves), fill);
}

std::unique_ptr<Operation> MakeTake(int64_t in_size, std::vector<int32_t> places) {
  return std::make_unique<Take>(in_size, std::move(places));
}

std::unique_ptr<Operation> MakeConstant(std::vector<float> value) {
  return std::make_unique<Constant>(std::move(value));
}

std::unique_ptr<Operation> MakeMatMul(int64_t batch, int64_t rows, int64_t inner,
                                      int64_t columns) {
  return std::make_unique<MatMul>(batch, rows, inner, columns);
}

}  // namespace xnor
