#include "model.h"

#include <algorithm>
#include <atomic>
#include <utility>

namespace xnor {

float* Model::Workspace::Memory(size_t worker, int64_t size) {
  if (memory.size() <= worker) memory.resize(worker + 1), sizes.resize(worker + 1);
  if (sizes[worker] < size) {
    memory[worker].reset();
    memory[worker].reset(new float[size]);
    sizes[worker] = size;
  }
  return memory[worker].get();
}

class Model::Lease {
 public:
  explicit Lease(const Model& model) : model_(model) {
    std::lock_guard<std::mutex> lock(model.mutex_);
    if (model.free_.empty()) {
      model.free_.reserve(model.free_.capacity() + 1);  // The return cannot throw.
      workspace_ = std::make_unique<Workspace>();
    } else {
      workspace_ = std::move(model.free_.back());
      model.free_.pop_back();
    }
  }
  ~Lease() {
    workspace_->crew.Rest();
    std::lock_guard<std::mutex> lock(model_.mutex_);
    model_.free_.push_back(std::move(workspace_));
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  Workspace& workspace() { return *workspace_; }

 private:
  const Model& model_;
  std::unique_ptr<Workspace> workspace_;
};

void Model::RunChunk(Team& team, const float* images, const uint8_t* pixels,
                     int64_t count, float* out, float* memory) const {
  if (pixels != nullptr) {
    float* const floats = memory + count * graph->memory();
    const int64_t channels = image_shape.back();
    InParts(team, count * image_size() / channels, channels,
            [&](int64_t begin, int64_t end) {
              for (int64_t i = begin * channels; i < end * channels; i += channels)
                for (int64_t c = 0; c < channels; ++c)
                  floats[i + c] = pixel_values[c * 256 + pixels[i + c]];
            });
    images = floats;
  }
  graph->Run(team, count, images, out, memory);
}

void Model::RunBatch(Team& team, Workspace& workspace, const float* images,
                     const uint8_t* pixels, int64_t count, float* out) const {
  const FlushSubnormals flush;
  const int64_t chunk = ChunkOf(count, graph->largest(), team.threads());
  const int64_t own = pixels != nullptr ? image_size() : 0;
  const int64_t size = Times(chunk, graph->memory() + own);
  Times(Times(count, std::max(image_size(), output_size())), 4);  // Throws on overflow.

  const int64_t chunks = (count + chunk - 1) / chunk;
  const int64_t workers = std::min(chunks, chunks > 1 ? team.threads() : 1);
  for (int64_t worker = workers; worker-- > 0;) workspace.Memory(worker, size);
  const auto run = [&](Team& with, int64_t first, int64_t images_now, int64_t worker) {
    RunChunk(with, images == nullptr ? nullptr : images + first * image_size(),
             pixels == nullptr ? nullptr : pixels + first * image_size(), images_now,
             out + first * output_size(), workspace.memory[worker].get());
  };
  if (chunks == 1) {
    run(team, 0, count, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  team.For(workers, [&](int64_t worker) {
    Team alone;
    for (int64_t at; (at = next.fetch_add(1)) < chunks;)
      run(alone, at * chunk, std::min(chunk, count - at * chunk), worker);
  });
}

void Model::Run(const float* images, const uint8_t* pixels, int64_t count, float* out,
                int64_t threads) const {
  if (count == 0) return;
  Lease lease(*this);
  const int64_t helpers = Helpers(threads, static_cast<double>(count) * graph->work());
  Team team(helpers > 0 ? lease.workspace().crew.Wake(helpers) : nullptr, helpers);
  RunBatch(team, lease.workspace(), images, pixels, count, out);
}

void Model::Run(Team& team, const float* images, int64_t count, float* out) const {
  Lease lease(*this);
  RunBatch(team, lease.workspace(), images, nullptr, count, out);
}

}  // namespace xnor
