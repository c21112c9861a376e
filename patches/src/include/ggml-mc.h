#pragma once

// MUL_MAT_ID for experts that are spread over several groups of different types (mc_gguf).

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// sources of the op: group 0, b, ids, map, then groups 1.. in the slots that are left
#define GGML_MC_MAX_GROUPS (GGML_MAX_SRC - 3)

/*
    c = ggml_mul_mat_id_grouped(ctx, groups, n_groups, map, b, ids);

    groups[g] -> [cols, rows, n_g]                   any type, the experts of one type; sum of n_g >= n_expert
    map       -> [2, n_expert] (i32)                 (group, position in it) of each expert; NULL: one group, in order
    b         -> [cols, n_expert_used, n_tokens]     n_expert_used can be broadcast as in ggml_mul_mat_id
    ids       -> [n_expert_used, n_tokens] (i32)     an id outside [0, n_expert) marks a skipped slot
    c         -> [rows, n_expert_used, n_tokens]     zeros for skipped slots, whose weights are not read

    With one group and no skipped slot: the result of ggml_mul_mat_id, bit for bit.
*/
GGML_API struct ggml_tensor * ggml_mul_mat_id_grouped(
        struct ggml_context * ctx,
        struct ggml_tensor ** groups,
        int                   n_groups,
        struct ggml_tensor  * map,
        struct ggml_tensor  * b,
        struct ggml_tensor  * ids);

// number of groups of such an op, and one of them
GGML_API int                         ggml_mc_n_groups(const struct ggml_tensor * op);
GGML_API const struct ggml_tensor  * ggml_mc_group   (const struct ggml_tensor * op, int g);

#ifdef __cplusplus
}
#endif
