#pragma once

// CPU implementation of MUL_MAT_ID_GROUPED (ggml-mc.h) and of the routing ops (ggml-mc-routing.h).

#include "ggml.h"

#include <stddef.h>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Rows of weights are fetched into the second-level cache this many rows before a dot product reads them. A row of an
// expert is 0.5 to 8 KB that nothing has read before; what the hardware fetches ahead by itself ends with the page.
#define GGML_MC_ROWS_AHEAD 2

static inline void ggml_mc_prefetch(const char * row, size_t size) {
    for (size_t at = 0; at < size; at += 64) {
#if defined(__GNUC__) || defined(__clang__)
        __builtin_prefetch(row + at, 0, 2);
#elif defined(_M_X64) || defined(_M_IX86)
        _mm_prefetch(row + at, _MM_HINT_T1);
#else
        (void) row;
#endif
    }
}

// bytes of work buffer that the op needs with n_tasks threads
size_t ggml_mc_mul_mat_id_grouped_work_size(int n_tasks, const struct ggml_tensor * dst);

// whether the CPU can compute it: activations are F32, or of the type that every group's vec_dot wants; plain buffers
bool ggml_mc_mul_mat_id_grouped_supported(const struct ggml_tensor * dst);

void ggml_compute_forward_mul_mat_id_grouped(const struct ggml_compute_params * params, struct ggml_tensor * dst);

size_t ggml_mc_qk_received_work_size(int n_threads, const struct ggml_tensor * dst);

void ggml_compute_forward_mc_attn_received(const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mc_qk_received  (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mc_importance   (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mc_route        (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mc_mask_weights (const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
