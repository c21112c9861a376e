// Construction of MUL_MAT_ID_GROUPED, and access to its groups (ggml-mc.h).

#include "ggml-mc.h"
#include "ggml-impl.h"

// op_params 0 to 3 hold the precisions, as in MUL_MAT_ID (ggml_prec_set_acc, ggml_prec_set_src)
enum { PARAM_N_GROUPS = 4 };

static int src_of_group(int g) {
    return g == 0 ? 0 : 3 + g;
}

struct ggml_tensor * ggml_mul_mat_id_grouped(
        struct ggml_context * ctx,
        struct ggml_tensor ** groups,
        int                   n_groups,
        struct ggml_tensor  * map,
        struct ggml_tensor  * b,
        struct ggml_tensor  * ids) {
    GGML_ASSERT(n_groups >= 1 && n_groups <= GGML_MC_MAX_GROUPS);
    GGML_ASSERT(map != NULL || n_groups == 1);
    GGML_ASSERT(map == NULL || (map->type == GGML_TYPE_I32 && map->ne[0] == 2 && ggml_is_matrix(map) && ggml_is_contiguous(map)));

    for (int g = 0; g < n_groups; ++g) {
        GGML_ASSERT(!ggml_is_transposed(groups[g]));
        GGML_ASSERT(groups[g]->ne[0] == b->ne[0]);
        GGML_ASSERT(groups[g]->ne[1] == groups[0]->ne[1]);
        GGML_ASSERT(groups[g]->ne[3] == 1);
    }

    // as in ggml_mul_mat_id
    GGML_ASSERT(ids->type == GGML_TYPE_I32);
    GGML_ASSERT(b->ne[3] == 1);
    GGML_ASSERT(ids->ne[2] == 1 && ids->ne[3] == 1);
    GGML_ASSERT(ids->ne[1] == b->ne[2]);
    GGML_ASSERT(ids->ne[0] % b->ne[1] == 0);

    const int64_t ne[4] = { groups[0]->ne[1], ids->ne[0], b->ne[2], 1 };
    struct ggml_tensor * result = ggml_new_tensor(ctx, GGML_TYPE_F32, 4, ne);

    result->op     = GGML_OP_MUL_MAT_ID_GROUPED;
    result->src[1] = b;
    result->src[2] = ids;
    result->src[3] = map;
    for (int g = 0; g < n_groups; ++g) {
        result->src[src_of_group(g)] = groups[g];
    }
    ggml_set_op_params_i32(result, PARAM_N_GROUPS, n_groups);

    return result;
}

int ggml_mc_n_groups(const struct ggml_tensor * op) {
    return ggml_get_op_params_i32(op, PARAM_N_GROUPS);
}

const struct ggml_tensor * ggml_mc_group(const struct ggml_tensor * op, int g) {
    return op->src[src_of_group(g)];
}
