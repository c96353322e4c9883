// The C API: exceptions become a status and a one-line message.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "model.h"
#include "select.h"
#include "xnor.h"

struct xnor_model {
  std::unique_ptr<xnor::Model> model;
};

namespace {

thread_local std::string error;

xnor_status Failed(xnor_status status, const char* text) {
  try {
    error = text;
    // A path may have line breaks, and a terminal would interpret its escape sequences.
    std::replace_if(
        error.begin(), error.end(),
        [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
  } catch (...) {  // No memory even for the message.
    error.clear();
  }
  return status;
}

template <class Call>
xnor_status Answer(xnor_status refused, const Call& call) {
  try {
    return call();
  } catch (const xnor::Refusal& refusal) {
    return Failed(refused, refusal.message.c_str());
  } catch (const std::bad_alloc&) {
    return Failed(XNOR_OUT_OF_MEMORY, "out of memory");
  } catch (const std::length_error&) {
    return Failed(XNOR_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& failure) {
    return Failed(XNOR_INTERNAL_ERROR, failure.what());
  }
}

xnor_status Load(const void* data, size_t size, xnor_model** model) {
  auto loaded = std::make_unique<xnor_model>();
  loaded->model = xnor::ReadModel(static_cast<const uint8_t*>(data), size);
  *model = loaded.release();
  return XNOR_OK;
}

xnor_status Unreadable(const char* path) {
  return Failed(XNOR_IO_ERROR, (std::string(path) + ": " + std::strerror(errno)).c_str());
}

xnor_status Run(const xnor_model* model, const float* images, const uint8_t* pixels,
                size_t count, float* logits, int threads) {
  return Answer(XNOR_INVALID_ARGUMENT, [&] {
    xnor::Require(model != nullptr, "expected a model, got NULL");
    const bool given = images != nullptr || pixels != nullptr;
    xnor::Require(count == 0 || (given && logits != nullptr),
                  "expected images and room for logits, got NULL");
    xnor::Require(pixels == nullptr || model->model->preprocessing != nullptr,
                  "the file has no preprocessing; pass float32 images instead");
    xnor::Require(threads >= 0 && threads <= 1024, "expected 0 to 1024 threads");
    xnor::Require(count <= static_cast<size_t>(xnor::kLargest), "there are too many images");
    // Asked once: the answer takes several microseconds.
    static const int all = static_cast<int>(std::thread::hardware_concurrency());
    model->model->Run(images, pixels, static_cast<int64_t>(count), logits,
                      threads > 0 ? threads : std::max(1, all));
    return XNOR_OK;
  });
}

const char* Text(const std::string& text) {
  return text.empty() ? nullptr : text.c_str();
}

const char* Entry(const std::vector<std::string>& texts, size_t index) {
  return index < texts.size() ? texts[index].c_str() : nullptr;
}

}  // namespace

const char* xnor_error(void) { return error.c_str(); }

xnor_status xnor_load(const char* path, xnor_model** model) {
  return Answer(XNOR_INVALID_FILE, [&]() -> xnor_status {
    if (path == nullptr || model == nullptr)
      return Failed(XNOR_INVALID_ARGUMENT, "expected a path and room for a model, got NULL");
    *model = nullptr;
    struct stat found;
    // Checked before opening: opening a pipe would wait for a writer.
    if (stat(path, &found) != 0) return Unreadable(path);
    const auto refuse = [&](const std::string& text) {
      throw xnor::Refusal(std::string(path) + ": " + text);
    };
    if (!S_ISREG(found.st_mode)) refuse("expected a regular file");
    if (found.st_size > xnor::kLargestFile) refuse("expected a file of at most 1 GiB");
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"),
                                                               &std::fclose);
    if (file == nullptr) return Unreadable(path);
    const size_t size = static_cast<size_t>(found.st_size);
    const std::unique_ptr<char[]> data(new char[size + 1]);
    if (std::fread(data.get(), 1, size, file.get()) != size) {
      if (std::ferror(file.get())) return Unreadable(path);
      refuse("the file became shorter while it was read");
    }
    try {
      return Load(data.get(), size, model);
    } catch (const xnor::Refusal& refusal) {
      refuse(refusal.message);
    }
    return XNOR_INTERNAL_ERROR;
  });
}

xnor_status xnor_load_memory(const void* data, size_t size, xnor_model** model) {
  return Answer(XNOR_INVALID_FILE, [&]() -> xnor_status {
    if (data == nullptr || model == nullptr)
      return Failed(XNOR_INVALID_ARGUMENT, "expected bytes and room for a model, got NULL");
    *model = nullptr;
    return Load(data, size, model);
  });
}

void xnor_free(xnor_model* model) { delete model; }

size_t xnor_input_rank(const xnor_model* m) { return m->model->image_shape.size(); }
const int64_t* xnor_input_shape(const xnor_model* m) {
  return m->model->image_shape.data();
}
size_t xnor_output_rank(const xnor_model* m) { return m->model->output_shape.size(); }
const int64_t* xnor_output_shape(const xnor_model* m) {
  return m->model->output_shape.data();
}

const char* xnor_name(const xnor_model* m) { return Text(m->model->name); }
const char* xnor_dataset(const xnor_model* m) { return Text(m->model->dataset); }
double xnor_test_accuracy(const xnor_model* m) { return m->model->test_accuracy; }
size_t xnor_class_count(const xnor_model* m) { return m->model->class_names.size(); }
const char* xnor_class_name(const xnor_model* m, size_t index) {
  return Entry(m->model->class_names, index);
}

int xnor_get_preprocessing(const xnor_model* m, xnor_preprocessing* found) {
  const xnor::Preprocessing* own = m->model->preprocessing.get();
  if (own == nullptr) return 0;
  *found = {own->mean.size(), own->mean.data(), own->std.data(),
            static_cast<size_t>(own->resize)};
  return 1;
}

size_t xnor_node_count(const xnor_model* m) { return m->model->kinds.size(); }
const char* xnor_node_kind(const xnor_model* m, size_t index) {
  return Entry(m->model->kinds, index);
}
const char* xnor_node_name(const xnor_model* m, size_t index) {
  return Entry(m->model->names, index);
}

xnor_status xnor_run(const xnor_model* model, const float* images, size_t count,
                     float* logits, int threads) {
  return Run(model, images, nullptr, count, logits, threads);
}

xnor_status xnor_run_uint8(const xnor_model* model, const uint8_t* pixels, size_t count,
                           float* logits, int threads) {
  return Run(model, nullptr, pixels, count, logits, threads);
}

const char* xnor_instruction_set(void) { return xnor::Chosen().name; }
