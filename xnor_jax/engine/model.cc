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

std::unique_ptr<Model::Workspace> Model::TakeWorkspace() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) {
    free_.reserve(free_.capacity() + 1);  // Room for its return.
    return std::make_unique<Workspace>();
  }
  std::unique_ptr<Workspace> found = std::move(free_.back());
  free_.pop_back();
  return found;
}

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

void Model::Run(const float* images, const uint8_t* pixels, int64_t count, float* out,
                int64_t threads) const {
  if (count == 0) return;
  const FlushSubnormals flush;
  const int64_t helpers = Helpers(threads, static_cast<double>(count) * graph->work());
  const int64_t chunk = ChunkOf(count, graph->largest(), helpers + 1);
  const int64_t own = pixels != nullptr ? image_size() : 0;
  const int64_t size = Times(Times(chunk, graph->memory() + own), 1);
  Times(Times(count, std::max(image_size(), output_size())), 4);

  // Given back however the run ends.
  struct Lease {
    const Model& model;
    std::unique_ptr<Workspace> workspace;
    ~Lease() {
      workspace->crew.Rest();
      std::lock_guard<std::mutex> lock(model.mutex_);
      model.free_.push_back(std::move(workspace));
    }
  } lease{*this, TakeWorkspace()};
  Workspace& workspace = *lease.workspace;

  const int64_t chunks = (count + chunk - 1) / chunk;
  const int64_t workers = chunks > 1 ? std::min(chunks, helpers + 1) : 1;
  for (int64_t worker = workers; worker-- > 0;) workspace.Memory(worker, size);
  Team team(helpers > 0 ? workspace.crew.Wake(helpers) : nullptr, helpers);
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

}  // namespace xnor
