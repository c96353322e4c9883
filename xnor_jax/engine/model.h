// A loaded network: its graph, what is known of it, and the memory of its runs.
#ifndef XNOR_MODEL_H_
#define XNOR_MODEL_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "crew.h"
#include "graph.h"

namespace xnor {

// How pixels become what the network was trained on: (x / 255 - mean) / std.
struct Preprocessing {
  std::vector<float> mean, std;
  int64_t resize = 0;  // what a picture's shorter side becomes; 0 stretches it
};

struct Model {
  Sizes image_shape, output_shape;
  std::vector<std::string> class_names, kinds, names;  // of classes; of nodes
  std::string name, dataset;
  double test_accuracy = -1;  // of 1; below 0 where it is not known
  std::unique_ptr<Preprocessing> preprocessing;
  std::unique_ptr<Graph> graph;

  int64_t image_size() const { return Product(image_shape); }
  int64_t output_size() const { return Product(output_shape); }

  // Floats, or where `pixels` is not null those, on so many threads of its own: any number
  // of callers at a time.
  void Run(const float* images, const uint8_t* pixels, int64_t count, float* out,
           int64_t threads) const;
  // The same of floats with the caller's threads.
  void Run(Team& team, const float* images, int64_t count, float* out) const;

  std::vector<float> pixel_values;  // [channels][256]

 private:
  // What a run needs besides the graph: kept from one to the next.
  struct Workspace {
    Crew crew;
    std::vector<std::unique_ptr<float[]>> memory;  // of each thread that runs alone
    std::vector<int64_t> sizes;

    float* Memory(size_t worker, int64_t size);
  };
  // A workspace, given back however the run ends.
  class Lease;

  void RunBatch(Team& team, Workspace& workspace, const float* images,
                const uint8_t* pixels, int64_t count, float* out) const;
  void RunChunk(Team& team, const float* images, const uint8_t* pixels, int64_t count,
                float* out, float* memory) const;

  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> free_;
};

// The network in the bytes of a file; refuses what is none before it takes memory.
std::unique_ptr<Model> ReadModel(const uint8_t* data, size_t size);

}  // namespace xnor

#endif  // XNOR_MODEL_H_
