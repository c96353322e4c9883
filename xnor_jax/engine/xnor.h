/* C API for xnor_jax's packed networks: one header, one library, nothing else.
 *
 *   xnor_model* model;
 *   if (xnor_load("lenet5.safetensors", &model) != XNOR_OK) puts(xnor_error());
 *   float logits[10];
 *   xnor_run(model, image, 1, logits, 1);
 *   xnor_free(model);
 *
 * A loaded model is immutable: any number of threads may run it at the same time. A run
 * allocates only if it needs more memory or threads than earlier ones or overlaps one. A
 * process forked between runs may go on with its copy of the model. */
#ifndef XNOR_H_
#define XNOR_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define XNOR_API __attribute__((visibility("default")))
#else
#define XNOR_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct xnor_model xnor_model;

typedef enum xnor_status {
  XNOR_OK = 0,
  XNOR_INVALID_ARGUMENT = 1,
  XNOR_INVALID_FILE = 2, /* damaged, not a packed network, or of another version */
  XNOR_IO_ERROR = 3,     /* the file cannot be read */
  XNOR_OUT_OF_MEMORY = 4,
  XNOR_INTERNAL_ERROR = 5
} xnor_status;

/* The error message of this thread's last failed call: one line, valid until the thread's
 * next call. */
XNOR_API const char* xnor_error(void);

/* Loads a network from a file, or from a file's bytes, which may be freed afterwards. */
XNOR_API xnor_status xnor_load(const char* path, xnor_model** model);
XNOR_API xnor_status xnor_load_memory(const void* data, size_t size, xnor_model** model);
/* Frees a model; NULL is ignored. */
XNOR_API void xnor_free(xnor_model* model);

/* The shape of one image, such as height, width and channels, and of its output. Here and
 * below, returned pointers are valid for the lifetime of the model. */
XNOR_API size_t xnor_input_rank(const xnor_model* model);
XNOR_API const int64_t* xnor_input_shape(const xnor_model* model);
XNOR_API size_t xnor_output_rank(const xnor_model* model);
XNOR_API const int64_t* xnor_output_shape(const xnor_model* model);

/* Metadata from the file. If it is absent, the text is NULL, the accuracy (a fraction)
 * negative and the count 0. */
XNOR_API const char* xnor_name(const xnor_model* model);
XNOR_API const char* xnor_dataset(const xnor_model* model);
XNOR_API double xnor_test_accuracy(const xnor_model* model);
XNOR_API size_t xnor_class_count(const xnor_model* model);
XNOR_API const char* xnor_class_name(const xnor_model* model, size_t index);

/* Preprocessing of pixels, per channel: (x / 255 - mean) / std. `resize`: the length to
 * which a picture's shorter side is resized before the centre crop; 0: the picture is
 * stretched to the image size. */
typedef struct xnor_preprocessing {
  size_t channels;
  const float* mean;
  const float* std;
  size_t resize;
} xnor_preprocessing;

/* Fills `found` and returns 1, or returns 0 if the file has no preprocessing. */
XNOR_API int xnor_get_preprocessing(const xnor_model* model, xnor_preprocessing* found);

/* The nodes of the network: each node's kind and its layer's path in the model. */
XNOR_API size_t xnor_node_count(const xnor_model* model);
XNOR_API const char* xnor_node_kind(const xnor_model* model, size_t index);
XNOR_API const char* xnor_node_name(const xnor_model* model, size_t index);

/* Runs `count` contiguous images in C order on up to `threads` threads, 0 to 1024; 0: one
 * per processor. The logits do not depend on the number of threads. */
XNOR_API xnor_status xnor_run(const xnor_model* model, const float* images, size_t count,
                              float* logits, int threads);
/* As `xnor_run`, for pixels, which are preprocessed as the file specifies. */
XNOR_API xnor_status xnor_run_uint8(const xnor_model* model, const uint8_t* pixels,
                                    size_t count, float* logits, int threads);

/* The instruction set in use: "avx512", "avx2", "neon" or "portable". The environment
 * variable XNOR_INSTRUCTION_SET selects a lower one. */
XNOR_API const char* xnor_instruction_set(void);

#ifdef __cplusplus
}
#endif

#endif /* XNOR_H_ */
