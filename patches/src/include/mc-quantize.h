// Rounding with error compensation into ggml's block formats, implemented in quantize/. A C API for ctypes.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define MC_QUANTIZE_API __declspec(dllexport)
#else
#define MC_QUANTIZE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The metric of up to 256 columns, prepared for one type; shared by threads, never changed after creation.
typedef struct mc_metric mc_metric;

// Whether the type can be compensated.
MC_QUANTIZE_API int mc_quantize_supports(int type);

// s [n, n]: the quadratic form of the columns' error, symmetric and positive definite. n is a whole number of the
// type's blocks, at most 256. NULL when the type or n is not supported or s is not positive definite.
MC_QUANTIZE_API mc_metric * mc_metric_create(int type, int n, const float * s);
MC_QUANTIZE_API void        mc_metric_free(mc_metric * metric);

// Quantize rows of n columns, minimising (w - q) s (w - q)' of every row by itself.
//   w      [rows, n], stride ldw      the weights to approximate
//   blocks [rows, block bytes of n], stride in bytes; in: a quantization to start from; out: the result
//   q      [rows, n], stride ldq      out: the weights that the blocks stand for
//   greedy 1: new codes, column by column with feedback, from the scales of `blocks`; 0: improve the codes of `blocks`
//   passes coordinate descent passes over codes and scales; the first pass that gains nothing is the last
MC_QUANTIZE_API void mc_quantize_rows(
        const mc_metric * metric, int64_t rows, const float * w, int64_t ldw, uint8_t * blocks, int64_t stride, float * q,
        int64_t ldq, int greedy, int passes);

// Multiply the scales (and mins) of every block of row i by factor[i]; blocks [rows, block bytes of n], stride in bytes.
MC_QUANTIZE_API void mc_scale_rows(int type, int64_t rows, int64_t n, uint8_t * blocks, int64_t stride, const float * factor);

#ifdef __cplusplus
}
#endif
