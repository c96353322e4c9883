// Elementwise functions of floats.
#include <algorithm>
#include <cmath>

#include "select.h"
#include "values.h"
#include "walk.h"

namespace xnor {
namespace {

// Says that a loop may be vectorized: `out` is none of the inputs, or exactly one of them.
#if defined(__clang__)
#define XNOR_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define XNOR_INDEPENDENT _Pragma("GCC ivdep")
#else
#define XNOR_INDEPENDENT
#endif

// A function of one to three arguments, applied to `count` numbers at a stride each.
using Function = void (*)(const float* const* in, const int64_t* strides, float* out,
                          int64_t count, int64_t exponent);

template <class F>
void One(const float* const* in, const int64_t* strides, float* out, int64_t count,
         int64_t) {
  const float* a = in[0];
  if (strides[0] == 1)
    XNOR_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i * strides[0]]);
}

template <class F>
void Two(const float* const* in, const int64_t* strides, float* out, int64_t count,
         int64_t) {
  const float *a = in[0], *b = in[1];
  const int64_t s = strides[0], t = strides[1];
  const float first_a = a[0], first_b = b[0];
  if (s == 1 && t == 1)
    XNOR_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i], b[i]);
  else if (s == 1 && t == 0)
    XNOR_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i], first_b);
  else if (s == 0 && t == 1)
    XNOR_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) out[i] = F()(first_a, b[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = F()(a[i * s], b[i * t]);
}

// The same for a function that has a kernel.
template <class F, Combination function>
void Combined(const float* const* in, const int64_t* strides, float* out, int64_t count,
              int64_t exponent) {
  const auto combine = Chosen().combine;
  int64_t done = 0;
  if (combine != nullptr && strides[0] == 1 && strides[1] <= 1)
    done = combine(function, in[0], in[1], strides[1], count, out);
  const float* const rest[] = {in[0] + done * strides[0], in[1] + done * strides[1]};
  if (done < count) Two<F>(rest, strides, out + done, count - done, exponent);
}

// The same with the arguments exchanged.
template <class F>
void Swapped(const float* const* in, const int64_t* strides, float* out, int64_t count,
             int64_t exponent) {
  const float* const turned[] = {in[1], in[0]};
  const int64_t apart[] = {strides[1], strides[0]};
  Two<F>(turned, apart, out, count, exponent);
}

template <class F>
void Three(const float* const* in, const int64_t* strides, float* out, int64_t count,
           int64_t) {
  const float *a = in[0], *b = in[1], *c = in[2];
  const int64_t s = strides[0], t = strides[1], u = strides[2];
  if (s == 1 && t == 1 && u == 1)
    XNOR_INDEPENDENT
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

// Not lambdas: the templates above default-construct F, which C++17 lambdas do not allow.
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
XNOR_DEFINE_TWO(Eq, x == y)
XNOR_DEFINE_TWO(Ne, x != y)
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
    return Smallest(Largest(x, low), high);
  }
};
struct Select {
  float operator()(float which, float if_false, float if_true) const {
    return which != 0 ? if_true : if_false;
  }
};

// The counterpart of FUNCTIONS in packing/functions.py.
constexpr Entry kFunctions[] = {
    {"add", 2, Combined<Add, Combination::kSum>},
    {"mul", 2, Combined<Mul, Combination::kProduct>},
    {"max", 2, Combined<Max, Combination::kMax>},
    {"sub", 2, Two<Sub>},       {"min", 2, Two<Min>},
    {"div", 2, Two<Div>},       {"rem", 2, Two<Rem>},
    {"pow", 2, Two<Pow>},       {"atan2", 2, Two<Atan2>},
    {"neg", 1, One<Neg>},       {"abs", 1, One<Abs>},
    {"sign", 1, One<SignOf>},
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
    {"le", 2, Swapped<Ge>},     {"lt", 2, Swapped<Gt>},
    {"eq", 2, Two<Eq>},         {"ne", 2, Two<Ne>},
    {"is_finite", 1, One<IsFinite>},
    // Bools are 0 or 1.
    {"not", 1, One<Not>},       {"and", 2, Two<Min>},
    {"or", 2, Two<Max>},        {"xor", 2, Two<Ne>},
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
    // The first axis is the batch, of size 1 here.
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
    channels_ = shape.empty() ? 1 : shape.back();
    pixelwise = in_place = IsPixelwise();
    if (pixelwise) pixels = out.depth / channels_;
    if (Repeats()) memory = 4 * kRow * static_cast<int64_t>(operands.size());
  }

  void Prepare() override {
    if (!Repeats()) return;
    const int64_t row = walk_.sizes[1];
    at_once_ = kRow / row;
    for (size_t i = 0; i < operands_.size(); ++i) {
      if (operands_[i].constant == nullptr || walk_.strides[1][i] == 0) continue;
      repeated_[i].reserve(at_once_ * row);
      for (int64_t r = 0; r < at_once_; ++r)
        repeated_[i].insert(repeated_[i].end(), operands_[i].constant,
                            operands_[i].constant + row);
    }
  }

  void Run(const Call& call) const override {
    if (!call.tail.empty()) {
      InParts(call, call.images * pixels, channels_,
              [&](int64_t begin, int64_t end) { RunPixels(call, begin, end); });
      return;
    }
    const int64_t row = OneAxis() ? 1 : walk_.sizes.back();
    InParts(call.team, call.images * (out.depth / row), row,
            [&](int64_t begin, int64_t end) { RunRows(call, begin, end); });
  }
  void RunPixels(const Call& call, int64_t begin, int64_t end) const override {
    const int64_t rows = OneAxis() ? channels_ : 1;  // per pixel
    RunRows(call, begin * rows, end * rows);
  }

 private:
  bool OneAxis() const { return walk_.axes() == 1; }

  bool IsPixelwise() const {
    if (OneAxis()) return true;
    if (walk_.axes() != 2 || walk_.sizes[1] != channels_) return false;
    for (size_t i = 0; i < operands_.size(); ++i) {
      const int64_t step = walk_.strides[0][i], count = out.depth / channels_;
      const bool constant = operands_[i].constant != nullptr;
      if (step * count != (constant ? 0 : Product(operands_[i].shape))) return false;
    }
    return true;
  }

  // Whether several short rows run at once, over constants that repeat.
  bool Repeats() const {
    if (walk_.axes() != 2 || walk_.sizes[1] > kRow / 2) return false;
    for (size_t i = 0; i < operands_.size(); ++i) {
      const int64_t across = walk_.strides[0][i], along = walk_.strides[1][i];
      const bool contiguous = across == walk_.sizes[1] && along == 1;
      if (!contiguous && operands_[i].constant == nullptr) return false;
      if (!contiguous && across != 0) return false;
    }
    return true;
  }

  // Rows [begin, end) along the last axis of the walk; if that is the only one, elements.
  void RunRows(const Call& call, int64_t begin, int64_t end) const {
    const float* base[3] = {};
    for (size_t i = 0; i < operands_.size(); ++i)
      base[i] = !repeated_[i].empty()              ? repeated_[i].data()
                : operands_[i].constant != nullptr ? operands_[i].constant
                                                   : call.floats(operands_[i].input);
    float* const y = static_cast<float*>(call.out);
    const int64_t last = walk_.axes() - 1, row = walk_.sizes[last];
    const int64_t* strides = walk_.strides[last].data();
    const auto run = [&](int64_t place, int64_t count, const auto& offset) {
      const float* in[3] = {};
      for (size_t i = 0; i < operands_.size(); ++i) in[i] = base[i] + offset(i);
      run_(in, strides, y + place, count, exponent_);
    };
    if (last == 0)
      return run(begin, end - begin, [&](size_t i) { return begin * strides[i]; });
    for (int64_t r = begin; r < end; r += at_once_)
      run(r * row, std::min(at_once_, end - r) * row,
          [&](size_t i) { return Offset(r, last, i); });
  }

  static bool Continues(const Sizes& outer, const Sizes& inner, int64_t size) {
    for (size_t i = 0; i < outer.size(); ++i)
      if (outer[i] != inner[i] * size) return false;
    return true;
  }
  // As `Walk::Offset`, except that the first axis continues through all images.
  int64_t Offset(int64_t index, int64_t count, size_t i) const {
    int64_t offset = 0;
    for (int64_t axis = count - 1; axis > 0; --axis) {
      offset += index % walk_.sizes[axis] * walk_.strides[axis][i];
      index /= walk_.sizes[axis];
    }
    return offset + index * walk_.strides[0][i];
  }

  static constexpr int64_t kRow = 256;  // numbers
  const Function run_;
  const int64_t exponent_;
  const std::vector<Operand> operands_;
  int64_t channels_, at_once_ = 1;
  std::vector<float> repeated_[3];  // per operand
  Walk walk_;
};

}  // namespace

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

}  // namespace xnor
