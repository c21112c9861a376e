#pragma once

// CPU implementation of MUL_MAT_ID_GROUPED (ggml-mc.h) and of the routing ops (ggml-mc-routing.h).

#include "ggml.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// bytes of work buffer that the op needs with n_tasks threads
size_t ggml_mc_mul_mat_id_grouped_work_size(int n_tasks, const struct ggml_tensor * dst);

// whether the CPU backend can compute it: activations must be F32 or of the type that the vec_dot of every group takes, and the
// groups must not be repacked
bool ggml_mc_mul_mat_id_grouped_supported(const struct ggml_tensor * dst);

void ggml_compute_forward_mul_mat_id_grouped(const struct ggml_compute_params * params, struct ggml_tensor * dst);

size_t ggml_mc_qk_received_work_size(int n_tasks, const struct ggml_tensor * dst);

void ggml_compute_forward_mc_attn_received(const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mc_qk_received  (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mc_importance   (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mc_route        (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mc_count        (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_mc_mask_weights (const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
