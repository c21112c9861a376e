// Construction of the ops of dynamic expert routing (ggml-mc-routing.h).

#include "ggml-mc-routing.h"
#include "ggml-impl.h"

#include <string.h>

static void check_tokens(const struct ggml_tensor * tokens, const struct ggml_tensor * rows, int64_t n_rows) {
    GGML_ASSERT(tokens->type == GGML_TYPE_I32 && ggml_is_matrix(tokens) && ggml_is_contiguous(tokens));
    GGML_ASSERT(tokens->ne[0] == GGML_MC_TOKEN_FIELD_COUNT);
    if (rows) {
        GGML_ASSERT(rows->type == GGML_TYPE_I32 && ggml_is_vector(rows) && rows->ne[0] == n_rows);
    } else {
        GGML_ASSERT(tokens->ne[1] == n_rows);
    }
}

static void check_cells(const struct ggml_tensor * cells, int64_t n_tokens, int64_t n_stream, int64_t cells_per_stream) {
    GGML_ASSERT(cells_per_stream > 0 && cells_per_stream <= INT32_MAX);
    if (cells) {
        GGML_ASSERT(cells->type == GGML_TYPE_I64 || cells->type == GGML_TYPE_I32);
        GGML_ASSERT(ggml_is_vector(cells) && cells->ne[0] == n_tokens && ggml_is_contiguous(cells));
    } else {
        GGML_ASSERT(n_stream == 1);
    }
}

struct ggml_tensor * ggml_mc_attn_received(
        struct ggml_context * ctx,
        struct ggml_tensor  * probs,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * tokens,
        int64_t               cells_per_stream) {
    const int64_t n_tokens = tokens->ne[1];

    GGML_ASSERT(probs->type == GGML_TYPE_F32 && probs->nb[0] == sizeof(float));
    GGML_ASSERT(probs->ne[1]*probs->ne[3] == n_tokens);
    check_cells(cells, n_tokens, probs->ne[3], cells_per_stream);
    check_tokens(tokens, NULL, n_tokens);

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_tokens);

    ggml_set_op_params_i32(result, 0, (int32_t) cells_per_stream);

    result->op     = GGML_OP_MC_ATTN_RECEIVED;
    result->src[0] = probs;
    result->src[1] = tokens;
    result->src[2] = cells;

    return result;
}

struct ggml_tensor * ggml_mc_qk_received(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * sinks,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * tokens,
        const struct ggml_mc_qk_params * params) {
    const int64_t n_tokens = tokens->ne[1];
    const int64_t n_stream = q->ne[3];

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[1]*n_stream == n_tokens);
    GGML_ASSERT(k->ne[0] == q->ne[0] && k->ne[3] == n_stream && q->ne[2] % k->ne[2] == 0);
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type) && k->ne[0] % ggml_blck_size(k->type) == 0);
    GGML_ASSERT(mask == NULL || mask->type == GGML_TYPE_F16 || mask->type == GGML_TYPE_F32);
    GGML_ASSERT(mask == NULL || mask->nb[0] == ggml_type_size(mask->type));
    GGML_ASSERT(mask == NULL || (mask->ne[0] == k->ne[1] && mask->ne[1] >= q->ne[1] && mask->ne[2] == 1 && mask->ne[3] == n_stream));
    GGML_ASSERT(sinks == NULL || (sinks->type == GGML_TYPE_F32 && sinks->ne[0] == q->ne[2] && ggml_is_contiguous(sinks)));
    check_cells(cells, n_tokens, n_stream, params->cells_per_stream);
    check_tokens(tokens, NULL, n_tokens);

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_tokens);

    static_assert(sizeof(struct ggml_mc_qk_params) <= GGML_MAX_OP_PARAMS, "does not fit op_params");
    ggml_set_op_params(result, params, sizeof(*params));

    result->op     = GGML_OP_MC_QK_RECEIVED;
    result->src[0] = q;
    result->src[1] = tokens;
    result->src[2] = cells;
    result->src[3] = k;
    result->src[4] = mask;
    result->src[5] = sinks;

    return result;
}

struct ggml_mc_qk_params ggml_mc_qk_received_get_params(const struct ggml_tensor * received) {
    struct ggml_mc_qk_params params;
    memcpy(&params, received->op_params, sizeof(params));
    return params;
}

struct ggml_tensor * ggml_mc_importance(
        struct ggml_context * ctx,
        struct ggml_tensor  * x,
        struct ggml_tensor  * received,
        struct ggml_tensor  * tokens,
        struct ggml_tensor  * rows,
        enum ggml_mc_measure  measure) {
    GGML_ASSERT(x->type == GGML_TYPE_F32 && ggml_is_matrix(x) && x->nb[0] == sizeof(float));
    GGML_ASSERT(received == NULL || (received->type == GGML_TYPE_F32 && ggml_is_contiguous(received)));
    GGML_ASSERT(received == NULL || received->ne[0] == tokens->ne[1]);
    check_tokens(tokens, rows, x->ne[1]);

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, x->ne[1]);

    ggml_set_op_params_i32(result, 0, (int32_t) measure);

    result->op     = GGML_OP_MC_IMPORTANCE;
    result->src[0] = x;
    result->src[1] = tokens;
    result->src[2] = rows;
    result->src[3] = received;

    return result;
}

// layout of the result: ids, then counts
static int64_t n_route_ids(const struct ggml_tensor * ids) {
    return ids->ne[0]*ids->ne[1];
}

static int64_t n_route_counts(const struct ggml_mc_route_params * params) {
    return 3*(int64_t) params->n_rank + 2*(int64_t) params->n_expert;
}

struct ggml_tensor * ggml_mc_route(
        struct ggml_context * ctx,
        struct ggml_tensor  * weights,
        struct ggml_tensor  * ids,
        struct ggml_tensor  * importance,
        struct ggml_tensor  * tokens,
        struct ggml_tensor  * rows,
        struct ggml_tensor  * thresholds,
        const struct ggml_mc_route_params * params) {
    const int64_t n_used = ids->ne[0];
    const int64_t n_rows = ids->ne[1];

    GGML_ASSERT(weights->type == GGML_TYPE_F32 && ggml_is_contiguous(weights));
    GGML_ASSERT(weights->ne[0] == 1 && weights->ne[1] == n_used && weights->ne[2] == n_rows && weights->ne[3] == 1);
    GGML_ASSERT(ids->type == GGML_TYPE_I32 && ggml_is_matrix(ids));
    GGML_ASSERT(importance == NULL || (importance->type == GGML_TYPE_F32 && importance->ne[0] == n_rows));
    GGML_ASSERT(thresholds->type == GGML_TYPE_F32 && ggml_is_contiguous(thresholds) && thresholds->ne[0] >= n_used);
    GGML_ASSERT(params->n_rank >= n_used && params->n_expert > 0);
    check_tokens(tokens, rows, n_rows);

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_route_ids(ids) + n_route_counts(params));

    static_assert(sizeof(struct ggml_mc_route_params) <= GGML_MAX_OP_PARAMS, "does not fit op_params");
    ggml_set_op_params(result, params, sizeof(*params));

    result->op     = GGML_OP_MC_ROUTE;
    result->src[0] = weights;
    result->src[1] = tokens;
    result->src[2] = rows;
    result->src[3] = ids;
    result->src[4] = importance;
    result->src[5] = thresholds;

    return result;
}

struct ggml_mc_route_params ggml_mc_route_get_params(const struct ggml_tensor * route) {
    GGML_ASSERT(route->op == GGML_OP_MC_ROUTE);

    struct ggml_mc_route_params params;
    memcpy(&params, route->op_params, sizeof(params));
    return params;
}

struct ggml_tensor * ggml_mc_route_ids(struct ggml_context * ctx, struct ggml_tensor * route) {
    GGML_ASSERT(route->op == GGML_OP_MC_ROUTE);

    const struct ggml_tensor * ids = route->src[3];
    return ggml_view_2d(ctx, route, ids->ne[0], ids->ne[1], ids->ne[0]*sizeof(int32_t), 0);
}

struct ggml_tensor * ggml_mc_count(
        struct ggml_context * ctx,
        struct ggml_tensor  * counters,
        struct ggml_tensor  * route) {
    const struct ggml_mc_route_params params = ggml_mc_route_get_params(route);

    GGML_ASSERT(counters->type == GGML_TYPE_I64 && ggml_is_contiguous(counters));
    GGML_ASSERT(ggml_is_vector(counters) && counters->ne[0] == n_route_counts(&params));

    struct ggml_tensor * result = ggml_view_tensor(ctx, counters);

    result->op     = GGML_OP_MC_COUNT;
    result->src[0] = route;
    result->src[1] = counters;

    return result;
}

struct ggml_tensor * ggml_mc_mask_weights(
        struct ggml_context * ctx,
        struct ggml_tensor  * weights,
        struct ggml_tensor  * ids,
        bool                  normalize) {
    GGML_ASSERT(ids->type == GGML_TYPE_I32 && ggml_is_matrix(ids) && ggml_is_contiguous(ids));
    GGML_ASSERT(ids->view_src != NULL && ids->view_offs == 0); // of the result of ggml_mc_route
    GGML_ASSERT(weights->type == GGML_TYPE_F32 && ggml_is_contiguous(weights));
    GGML_ASSERT(weights->ne[0] == 1 && weights->ne[1] == ids->ne[0] && weights->ne[2] == ids->ne[1]);

    struct ggml_tensor * result = ggml_dup_tensor(ctx, weights);

    ggml_set_op_params_i32(result, 0, ggml_mc_route_get_params(ids->view_src).n_expert);
    ggml_set_op_params_i32(result, 1, normalize);

    result->op     = GGML_OP_MC_MASK_WEIGHTS;
    result->src[0] = weights;
    result->src[1] = ids;

    return result;
}
