// The XLA custom call that runs the whole graph of a packed network.
//
// The nodes are an attribute, read when a program is compiled. The weights are ordinary
// arguments, so that programs may compute, stack or change them. The first call lays them
// out and keeps the result with a copy of the weights; a later call compares its weights
// with the copy, which takes far less time than laying them out. All of this lives in XLA's
// state of the call, which is freed with the program. The call is thread-safe.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.h"
#include "handler.h"
#include "model.h"
#include "select.h"
#include "xla/ffi/api/ffi.h"
#include "xnor.h"

namespace xnor {
namespace {

using Contents = std::vector<std::vector<uint32_t>>;  // per buffer

ffi::DataType TypeOf(Member::Kind kind) {
  switch (kind) {
    case Member::kFloats:
    case Member::kReals: return ffi::F32;
    case Member::kIntegers:
    case Member::kIndices: return ffi::S32;
    case Member::kFlip:
    case Member::kKernel: return ffi::U32;
  }
  throw Refusal("there is no such array");
}

// A node's buffers, whose contents live as long as the graph.
class GivenArrays : public Arrays {
 public:
  GivenArrays(Graph& graph, const std::vector<Member>& members,
              const std::vector<uint32_t>* contents)
      : Arrays(graph), members_(members), contents_(contents) {}

  std::vector<float> Floats(const std::string& name) const override {
    return Copied<float>(name);
  }
  std::vector<int32_t> Indices(const std::string& name) const override {
    const std::vector<int32_t> indices = Copied<int32_t>(name);
    CheckIndices(indices, members_[Find(name)].bound, name);
    return indices;
  }
  const int32_t* Integers(const std::string& name) const override {
    return reinterpret_cast<const int32_t*>(contents_[Find(name)].data());
  }
  const uint32_t* Flip(const std::string& name) const override {
    return contents_[Find(name)].data();
  }
  const uint32_t* Kernel(const std::string& name) const override {
    return contents_[Find(name)].data();
  }

 private:
  size_t Find(const std::string& name) const {
    for (size_t i = 0; i < members_.size(); ++i)
      if (members_[i].name == name) return i;
    throw Refusal("there is no array " + name);
  }
  template <class T>
  std::vector<T> Copied(const std::string& name) const {
    const std::vector<uint32_t>& from = contents_[Find(name)];
    std::vector<T> to(from.size());
    std::memcpy(to.data(), from.data(), from.size() * sizeof(T));
    return to;
  }

  const std::vector<Member>& members_;
  const std::vector<uint32_t>* const contents_;
};

// A network with its weights laid out for an instruction set.
struct Loaded {
  const Kernels& kernels = Chosen();
  Contents contents;
  Model model;

  Loaded(const Described& described, Contents given) : contents(std::move(given)) {
    model.image_shape = described.specs.front().shape;
    model.output_shape = described.specs.back().shape;
    // No limit: the budget is for networks that are read from files.
    model.graph = std::make_unique<Graph>(model.image_shape, INT64_MAX);
    size_t first = 0;
    Build(described, *model.graph, [&](size_t node) {
      const std::vector<Member>& members = described.members[node];
      const std::vector<uint32_t>* const own = contents.data() + first;
      first += members.size();
      return std::make_unique<GivenArrays>(*model.graph, members, own);
    });
  }

  bool Holds(PoolTeam& team, const ffi::RemainingArgs& args) const {
    std::atomic<bool> equal{true};
    team.For(static_cast<int64_t>(contents.size()), [&](int64_t i) {
      const void* given = args.get<ffi::AnyBuffer>(i)->untyped_data();
      const size_t bytes = contents[i].size() * sizeof(uint32_t);
      if (equal && std::memcmp(contents[i].data(), given, bytes) != 0) equal = false;
    });
    return equal;
  }
};

class Network {
 public:
  static ffi::TypeId id;
  static const ffi::TypeInfo info;

  Network(ffi::Span<const int64_t> image_shape, std::string_view nodes)
      : described_(Describe(Sizes(image_shape.begin(), image_shape.end()),
                            json::Document(nodes, "the nodes").root())) {
    for (const std::vector<Member>& own : described_.members)
      for (const Member& member : own)
        wanted_.push_back({"the array " + member.name + " has the wrong type or shape",
                           TypeOf(member.kind), member.laid_out()});
  }

  // The last network, if it is laid out for the chosen instruction set; else null.
  std::shared_ptr<const Loaded> Last() {
    std::lock_guard<std::mutex> lock(mutex_);
    return last_ != nullptr && &last_->kernels == &Chosen() ? last_ : nullptr;
  }

  // The network with these weights, which becomes the last one.
  std::shared_ptr<const Loaded> Load(const ffi::RemainingArgs& args) {
    Contents contents;
    for (size_t i = 0; i < args.size(); ++i) {
      const auto buffer = args.get<ffi::AnyBuffer>(i);
      const uint32_t* from = static_cast<const uint32_t*>(buffer->untyped_data());
      contents.emplace_back(from, from + buffer->element_count());
    }
    auto loaded = std::make_shared<const Loaded>(described_, std::move(contents));
    std::lock_guard<std::mutex> lock(mutex_);
    return last_ = std::move(loaded);
  }

  void Check(const ffi::RemainingArgs& args) const {
    Require(args.size() == wanted_.size(),
            "expected the arrays of the nodes, and no others");
    for (size_t i = 0; i < wanted_.size(); ++i) {
      const auto buffer = args.get<ffi::AnyBuffer>(i);
      Require(buffer.has_value() && buffer->element_type() == wanted_[i].type &&
                  buffer->dimensions().size() == wanted_[i].sizes.size() &&
                  std::equal(wanted_[i].sizes.begin(), wanted_[i].sizes.end(),
                             buffer->dimensions().begin()),
              wanted_[i].error);
    }
  }

 private:
  struct Wanted {
    std::string error;  // for any other buffer
    ffi::DataType type;
    Sizes sizes;
  };

  const Described described_;
  std::vector<Wanted> wanted_;  // the expected arguments
  std::mutex mutex_;
  std::shared_ptr<const Loaded> last_;
};

ffi::TypeId Network::id = {};
const ffi::TypeInfo Network::info = ffi::MakeTypeInfo<Network>();

using Floats = ffi::Buffer<ffi::F32>;

// Checks that the images have this shape; returns their number.
int64_t CheckBatch(const Floats& batch, const Sizes& shape, const char* message) {
  const auto d = batch.dimensions();
  Require(d.size() == shape.size() + 1 && d[0] >= 1 && d[0] <= kLargest &&
              std::equal(shape.begin(), shape.end(), d.begin() + 1),
          message);
  return d[0];
}

ffi::ErrorOr<std::unique_ptr<Network>> Instantiate(ffi::Span<const int64_t> image_shape,
                                                   std::string_view nodes) {
  std::unique_ptr<Network> network;
  const ffi::Error error =
      Answer([&] { network = std::make_unique<Network>(image_shape, nodes); });
  if (error.failure()) return ffi::Unexpected(error);
  return network;
}

ffi::Error Execute(ffi::ThreadPool pool, Network* network, Floats x,
                   ffi::RemainingArgs args, ffi::Result<Floats> y,
                   ffi::Span<const int64_t>, std::string_view) {
  return Answer([&] {
    network->Check(args);
    std::shared_ptr<const Loaded> loaded = network->Last();
    const bool known = loaded != nullptr;
    if (!known) loaded = network->Load(args);
    const int64_t count = CheckBatch(x, loaded->model.image_shape,
                                     "expected a batch of images of the input shape");
    Require(CheckBatch(*y, loaded->model.output_shape,
                       "the result has the wrong shape") == count,
            "expected a result for each image");
    PoolTeam team(pool, static_cast<double>(count) * loaded->model.graph->work());
    if (known && !loaded->Holds(team, args)) loaded = network->Load(args);
    loaded->model.Run(team, x.typed_data(), count, y->typed_data());
  });
}

}  // namespace
}  // namespace xnor

// Python registers the type of the state with these.
extern "C" XNOR_API void* xnor_jax_network_id() { return &xnor::Network::id; }
extern "C" XNOR_API const void* xnor_jax_network_info() { return &xnor::Network::info; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_network_instantiate, xnor::Instantiate,
                              ::xla::ffi::Ffi::BindInstantiate()
                                  .Attr<::xla::ffi::Span<const int64_t>>("image_shape")
                                  .Attr<std::string_view>("nodes"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xnor_jax_network, xnor::Execute,
                              ::xla::ffi::Ffi::Bind()
                                  .Ctx<::xla::ffi::ThreadPool>()
                                  .Ctx<::xla::ffi::State<::xnor::Network>>()
                                  .Arg<::xla::ffi::Buffer<::xla::ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<::xla::ffi::Buffer<::xla::ffi::F32>>()
                                  .Attr<::xla::ffi::Span<const int64_t>>("image_shape")
                                  .Attr<std::string_view>("nodes"));
