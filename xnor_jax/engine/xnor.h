/* Packed networks of xnor_jax, run from C: one header, one library, nothing else.
 *
 *   xnor_model* model;
 *   if (xnor_load("lenet5.safetensors", &model) != XNOR_OK) puts(xnor_error());
 *   float logits[10];
 *   xnor_run(model, image, 1, logits, 1);
 *   xnor_free(model);
 *
 * A model does not change after it has been loaded: any number of threads may run it at
 * the same time. A run allocates only where no run before it had as many images. */
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
  XNOR_INVALID_FILE = 2, /* damaged, no packed network, or of another version */
  XNOR_IO_ERROR = 3,     /* the file cannot be read */
  XNOR_OUT_OF_MEMORY = 4,
  XNOR_INTERNAL_ERROR = 5
} xnor_status;

/* What the last call in this thread that failed says of it: one line, valid until the
 * thread's next call. */
XNOR_API const char* xnor_error(void);

/* Reads a network from a file, or from the bytes of one, which may be freed afterwards. */
XNOR_API xnor_status xnor_load(const char* path, xnor_model** model);
XNOR_API xnor_status xnor_load_memory(const void* data, size_t size, xnor_model** model);
/* NULL is let be. */
XNOR_API void xnor_free(xnor_model* model);

/* The shape of one image, such as height, width and channels, and of its result. What
 * these point to lives as long as the model. */
XNOR_API size_t xnor_input_rank(const xnor_model* model);
XNOR_API const int64_t* xnor_input_shape(const xnor_model* model);
XNOR_API size_t xnor_output_rank(const xnor_model* model);
XNOR_API const int64_t* xnor_output_shape(const xnor_model* model);

/* What the file says of the network; NULL, 0 or below 0 where it does not. */
XNOR_API const char* xnor_name(const xnor_model* model);
XNOR_API const char* xnor_dataset(const xnor_model* model);
XNOR_API double xnor_test_accuracy(const xnor_model* model);
XNOR_API size_t xnor_class_count(const xnor_model* model);
XNOR_API const char* xnor_class_name(const xnor_model* model, size_t index);

/* Pixels become what the network was trained on by (x / 255 - mean) / std, channel by
 * channel. `resize`: what the shorter side of a picture becomes before the centre is cut;
 * 0 where it is stretched to the images' size. */
typedef struct xnor_preprocessing {
  size_t channels;
  const float* mean;
  const float* std;
  size_t resize;
} xnor_preprocessing;

/* 0 where the file does not say. */
XNOR_API int xnor_get_preprocessing(const xnor_model* model, xnor_preprocessing* found);

/* The nodes that run, by kind and by the layer's path in the model. */
XNOR_API size_t xnor_node_count(const xnor_model* model);
XNOR_API const char* xnor_node_kind(const xnor_model* model, size_t index);
XNOR_API const char* xnor_node_name(const xnor_model* model, size_t index);

/* Runs `count` images, behind each other in C order, on up to so many threads; 0: one for
 * each processor. The same logits on any number of threads. */
XNOR_API xnor_status xnor_run(const xnor_model* model, const float* images, size_t count,
                              float* logits, int threads);
/* The same of pixels, which are preprocessed as the file says. */
XNOR_API xnor_status xnor_run_uint8(const xnor_model* model, const uint8_t* pixels,
                                    size_t count, float* logits, int threads);

/* The instruction set that runs: "avx512", "avx2", "neon" or "portable". The environment
 * variable XNOR_INSTRUCTION_SET forces a lower one. */
XNOR_API const char* xnor_instruction_set(void);

#ifdef __cplusplus
}
#endif

#endif /* XNOR_H_ */
