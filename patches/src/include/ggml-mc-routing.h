#pragma once

// The ops of dynamic expert routing (mc_gguf): which of the experts selected for a token are dropped. A dropped slot gets an id
// that MUL_MAT_ID_GROUPED skips, and the routing weight 0.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// w_r is the weight of the expert of rank r; rank 0 has the largest weight and is never dropped
enum ggml_mc_policy {
    GGML_MC_POLICY_OFF       = 0, // drop nothing
    GGML_MC_POLICY_ODP       = 1, // drop rank r when w_r < thresholds[r]*w_0, unless the token is protected
    GGML_MC_POLICY_THRESHOLD = 2, // the same without protection
    GGML_MC_POLICY_KEEP_MIN  = 3, // keep the first keep_min ranks and those with w_r >= value*w_0
    GGML_MC_POLICY_TOP_P     = 4, // keep the fewest ranks whose weights add up to the share `value` of all selected weights
    GGML_MC_POLICY_RANDOM    = 5, // drop every rank but the first with probability `value`, by a hash of seed, layer, position
                                  // and rank, so two sequences get the same draws
    GGML_MC_POLICY_COUNT,
};

// how important a token is
enum ggml_mc_measure {
    GGML_MC_MEASURE_ATTENTION = 0, // L1 norm of the MoE block's input, times the mean attention that the token's key receives
    GGML_MC_MEASURE_L1        = 1,
    GGML_MC_MEASURE_MEAN      = 2,
    GGML_MC_MEASURE_VARIANCE  = 3,
    GGML_MC_MEASURE_KURTOSIS  = 4,
    GGML_MC_MEASURE_LAST      = 5, // L1 norm divided by the number of queries at or after the token
    GGML_MC_MEASURE_COUNT,
};

// rows of `tokens`, which describes the tokens of a ubatch
enum ggml_mc_token_field {
    GGML_MC_TOKEN_FIELD_SEQ     = 0, // a number for the token's sequence; for a token in several sequences, the first
    GGML_MC_TOKEN_FIELD_QUERIES = 1, // how many queries of the ubatch can see the token, by sequence and position
    GGML_MC_TOKEN_FIELD_POS     = 2, // position in the sequence
    GGML_MC_TOKEN_FIELD_COUNT,
};

/*
    The attention that each token's key receives from the queries of this ubatch that can see it, averaged over those queries
    and over heads.

    probs  -> [n_kv, n_tokens/n_stream, n_head, n_stream]  softmax of the attention scores, 0 where masked
    cells  -> [n_tokens] (i64, i32)                        the cell that holds each token's key, modulo cells_per_stream;
                                                           NULL: token i is in cell i
    tokens -> [GGML_MC_TOKEN_FIELD_COUNT, n_tokens] (i32)
    result -> [n_tokens]
*/
GGML_API struct ggml_tensor * ggml_mc_attn_received(
        struct ggml_context * ctx,
        struct ggml_tensor  * probs,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * tokens,
        int64_t               cells_per_stream);

/*
    The same for flash attention, which keeps no softmax: computed from queries and keys in tiles, without the tiles that the mask
    hides. The arguments are those of ggml_flash_attn_ext; cells and tokens as above.

    q      -> [n_embd_head, n_tokens/n_stream, n_head, n_stream]
    k      -> [n_embd_head, n_kv, n_head_kv, n_stream]     any type with to_float
    mask   -> [n_kv, >= n_tokens/n_stream, 1, n_stream]    F16 or F32; NULL: every query sees every key
    sinks  -> [n_head]                                     NULL: none
    result -> [n_tokens]
*/
struct ggml_mc_qk_params {
    float   scale;
    float   max_bias;      // ALiBi; 0: none
    float   logit_softcap; // 0: none
    int32_t cells_per_stream;
};

GGML_API struct ggml_tensor * ggml_mc_qk_received(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * sinks,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * tokens,
        const struct ggml_mc_qk_params * params);

GGML_API struct ggml_mc_qk_params ggml_mc_qk_received_get_params(const struct ggml_tensor * received);

/*
    Importance of the token of each row of a MoE block.

    x        -> [n_embd, n_rows]  the block's input
    received -> [n_tokens]        from ggml_mc_attn_received or ggml_mc_qk_received; NULL: 1 for every token
    tokens   -> [GGML_MC_TOKEN_FIELD_COUNT, n_tokens] (i32)
    rows     -> [n_rows] (i32)    the token of each row of x; NULL: n_rows == n_tokens, in order
    result   -> [n_rows]
*/
GGML_API struct ggml_tensor * ggml_mc_importance(
        struct ggml_context * ctx,
        struct ggml_tensor  * x,
        struct ggml_tensor  * received,
        struct ggml_tensor  * tokens,
        struct ggml_tensor  * rows,
        enum ggml_mc_measure  measure);

struct ggml_mc_route_params {
    enum ggml_mc_policy policy;
    int32_t  n_expert;
    int32_t  n_rank;   // ranks that are counted, at least n_used
    int32_t  layer;    // one of the inputs of GGML_MC_POLICY_RANDOM's hash
    int32_t  keep_min;
    float    value;    // ratio, share or probability, depending on the policy
    uint32_t seed;
    int32_t  skips;    // 0: the multiplication reads the experts of dropped slots all the same, and they are counted as read
    double   protect;  // share of a sequence's rows that GGML_MC_POLICY_ODP protects, by importance
};

/*
    Decides for each row of a MoE block which of its slots are dropped. Slots are ranked by weight, equal ones by position.

    weights    -> [1, n_used, n_rows]   routing weights, not negative
    ids        -> [n_used, n_rows] (i32)
    importance -> [n_rows]              NULL: no row is protected, unless protect is 1
    tokens     -> [GGML_MC_TOKEN_FIELD_COUNT, n_tokens] (i32)
    rows       -> [n_rows] (i32)        as in ggml_mc_importance
    thresholds -> [>= n_used]
    result     -> [n_used*n_rows + 3*n_rank + 2*n_expert] (i32)
                  the ids, with n_expert in place of dropped ones (ggml_mc_route_ids);
                  per rank the number of slots kept, dropped, and protected (kept although below the threshold);
                  per expert whether it would be used with nothing dropped, and whether it is read

    Of a sequence's n rows, the ceil(protect*n) most important ones are protected (equal ones by position); a sequence's only row
    is protected only if protect is 1.
*/
GGML_API struct ggml_tensor * ggml_mc_route(
        struct ggml_context * ctx,
        struct ggml_tensor  * weights,
        struct ggml_tensor  * ids,
        struct ggml_tensor  * importance,
        struct ggml_tensor  * tokens,
        struct ggml_tensor  * rows,
        struct ggml_tensor  * thresholds,
        const struct ggml_mc_route_params * params);

GGML_API struct ggml_mc_route_params ggml_mc_route_get_params(const struct ggml_tensor * route);

// view of the ids in the result of ggml_mc_route: [n_used, n_rows] (i32)
GGML_API struct ggml_tensor * ggml_mc_route_ids(struct ggml_context * ctx, struct ggml_tensor * route);

/*
    Adds the counts in the result of ggml_mc_route to counters. As in ggml_set_rows, the result is a view of the tensor that
    changes, so a scheduler runs the op where that tensor is and never gives it a copy.

    counters -> [3*n_rank + 2*n_expert] (i64)
    result   -> view of counters
*/
GGML_API struct ggml_tensor * ggml_mc_count(
        struct ggml_context * ctx,
        struct ggml_tensor  * counters,
        struct ggml_tensor  * route);

/*
    Sets the weights of dropped slots to 0. With `normalize`, the weights of a row in which slots were dropped are divided by
    the sum of those that are left; other rows stay as they are.

    weights -> [1, n_used, n_rows]    as given to ggml_mc_route
    ids     -> [n_used, n_rows] (i32) from ggml_mc_route_ids
    result  -> [1, n_used, n_rows]
*/
GGML_API struct ggml_tensor * ggml_mc_mask_weights(
        struct ggml_context * ctx,
        struct ggml_tensor  * weights,
        struct ggml_tensor  * ids,
        bool                  normalize);

#ifdef __cplusplus
}
#endif
