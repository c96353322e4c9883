// A loaded network: its graph, its metadata and the memory of its runs.
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

// The preprocessing of pixels, per channel: (x / 255 - mean) / std.
struct Preprocessing {
  std::vector<float> mean, std;
  int64_t resize = 0;  // a picture's shorter side before the crop; 0: stretched
};

struct Model {
  Sizes image_shape, output_shape;
  std::vector<std::string> class_names, kinds, names;  // of classes; of nodes
  std::string name, dataset;
  double test_accuracy = -1;  // a fraction; negative if unknown
  std::unique_ptr<Preprocessing> preprocessing;
  std::unique_ptr<Graph> graph;

  int64_t image_size() const { return Product(image_shape); }
  int64_t output_size() const { return Product(output_shape); }

  // Runs `images`, or `pixels` if not null, on up to `threads` threads: the caller's and
  // the model's own. May be called from any number of threads at a time.
  void Run(const float* images, const uint8_t* pixels, int64_t count, float* out,
           int64_t threads) const;
  // Runs floats on the caller's team.
  void Run(Team& team, const float* images, int64_t count, float* out) const;

  std::vector<float> pixel_values;  // [channels][256]

 private:
  // The threads and memory of a run, kept for the next one.
  struct Workspace {
    Crew crew;
    std::vector<std::unique_ptr<float[]>> memory;  // of each worker
    std::vector<int64_t> sizes;

    float* Memory(size_t worker, int64_t size);
  };
  // Takes a workspace for one run, and returns it when the run ends or throws.
  class Lease;

  void RunBatch(Team& team, Workspace& workspace, const float* images,
                const uint8_t* pixels, int64_t count, float* out) const;
  void RunChunk(Team& team, const float* images, const uint8_t* pixels, int64_t count,
                float* out, float* memory) const;

  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> free_;
};

// Reads a network from a file's bytes; throws a Refusal if they are not a valid one. Checks
// the description and the sizes before it allocates memory for the arrays.
std::unique_ptr<Model> ReadModel(const uint8_t* data, size_t size);

}  // namespace xnor

#endif  // XNOR_MODEL_H_
