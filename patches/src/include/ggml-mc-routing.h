#pragma once

// Dynamic expert routing (mc_gguf): which of a token's selected experts are dropped. A dropped slot gets an id that
// MUL_MAT_ID_GROUPED skips, and the routing weight 0.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

enum ggml_mc_policy {
    GGML_MC_POLICY_COUNT_ONLY = 0, // drop nothing, count
    GGML_MC_POLICY_THRESHOLD  = 1, // drop rank r when w_r < thresholds[r]*w_0; protected tokens keep all
    GGML_MC_POLICY_KEEP_MIN   = 2, // keep the first keep_min ranks and those with w_r >= value*w_0
    GGML_MC_POLICY_TOP_P      = 3, // keep the fewest ranks whose weights sum up to value times the sum of all
    GGML_MC_POLICY_RANDOM     = 4, // drop every rank but the first with probability value: splitmix64 of seed, layer,
                                   // position and rank, so two sequences have the same draws
};

enum ggml_mc_measure {
    GGML_MC_MEASURE_ATTENTION = 0, // L1 norm times the mean attention received
    GGML_MC_MEASURE_L1        = 1,
    GGML_MC_MEASURE_MEAN      = 2,
    GGML_MC_MEASURE_VARIANCE  = 3,
    GGML_MC_MEASURE_KURTOSIS  = 4,
    GGML_MC_MEASURE_LAST      = 5, // L1 norm divided by the number of queries at or after the token
};

// columns of `tokens`, which describes the tokens of a ubatch
enum ggml_mc_token_field {
    GGML_MC_TOKEN_SEQ     = 0, // sequence, any numbering; of a token in several, the first
    GGML_MC_TOKEN_QUERIES = 1, // number of this ubatch's queries that can see the token, by sequence and position
    GGML_MC_TOKEN_POS     = 2, // position in the sequence
    GGML_MC_TOKEN_N_FIELDS,
};

/*
    Mean attention that each token's key receives from the queries of this ubatch that can see it, over heads.

    probs  -> [n_kv, n_tokens/n_stream, n_head, n_stream]  softmax of the attention scores, masked entries 0
    cells  -> [n_tokens] (i64, i32)                        cell of each token's key; NULL: token i is in cell i.
                                                           In stream s of a cache of cells_per_stream cells, modulo that
    tokens -> [GGML_MC_TOKEN_N_FIELDS, n_tokens] (i32)
    result -> [n_tokens]
*/
GGML_API struct ggml_tensor * ggml_mc_attn_received(
        struct ggml_context * ctx,
        struct ggml_tensor  * probs,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * tokens,
        int64_t               cells_per_stream);

/*
    The same where no softmax is kept (flash attention): from queries and keys, a block of queries at a time, of which
    only what the mask leaves is computed. The arguments are those of ggml_flash_attn_ext, cells and tokens as above.

    q      -> [n_embd_head, n_tokens/n_stream, n_head, n_stream]
    k      -> [n_embd_head, n_kv, n_head_kv, n_stream]     any type that has to_float
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

GGML_API struct ggml_mc_qk_params ggml_mc_get_qk_params(const struct ggml_tensor * received);

/*
    Importance of each token of a MoE block.

    x        -> [n_embd, n_rows]  the block's input
    received -> [n_tokens]        ggml_mc_attn_received or ggml_mc_qk_received; NULL: 1 for every token
    tokens   -> [GGML_MC_TOKEN_N_FIELDS, n_tokens] (i32)
    rows     -> [n_rows] (i32)    the token of each row of x; NULL: n_rows == n_tokens, in order
    result   -> [n_rows]
*/
GGML_API struct ggml_tensor * ggml_mc_importance(
        struct ggml_context   * ctx,
        struct ggml_tensor    * x,
        struct ggml_tensor    * received,
        struct ggml_tensor    * tokens,
        struct ggml_tensor    * rows,
        enum ggml_mc_measure measure);

struct ggml_mc_route_params {
    enum ggml_mc_policy policy;
    int32_t  n_expert;
    int32_t  layer;    // part of the random numbers
    int32_t  keep_min;
    float    value;    // ratio, p or rate, by policy
    uint32_t seed;
    int32_t  skips;    // 0: the experts of dropped slots are read all the same, and counted so
    double   protect;  // share of a sequence's rows that is protected, by importance
};

/*
    Experts that are left: ids with n_expert in the place of dropped ones. Ranks are by weight, ties by slot; rank 0 is
    never dropped.

    weights    -> [1, n_used, n_rows]  routing weights, not negative
    ids        -> [n_used, n_rows] (i32)
    importance -> [n_rows]             NULL: no row is protected, unless protect is 1
    tokens     -> [GGML_MC_TOKEN_N_FIELDS, n_tokens] (i32)
    rows       -> [n_rows] (i32)       as in ggml_mc_importance
    thresholds -> [>= n_used]
    counters   -> [3*n_rank + 2*n_expert] (i64)  added to: per rank slots kept, dropped, protected (kept although below
                                       the threshold); per expert the number of calls that would use it with nothing
                                       dropped, and that do. n_rank >= n_used

    Protected are, of a sequence's n rows, the ceil(protect*n) most important ones (of equals the first); a sequence's only
    row only if protect is 1.
*/
GGML_API struct ggml_tensor * ggml_mc_route(
        struct ggml_context * ctx,
        struct ggml_tensor  * weights,
        struct ggml_tensor  * ids,
        struct ggml_tensor  * importance,
        struct ggml_tensor  * tokens,
        struct ggml_tensor  * rows,
        struct ggml_tensor  * thresholds,
        struct ggml_tensor  * counters,
        const struct ggml_mc_route_params * params);

GGML_API struct ggml_mc_route_params ggml_mc_get_route_params(const struct ggml_tensor * route);

/*
    Weights of dropped slots become 0. With `normalize`, the weights of a row in which slots were dropped are divided by
    the sum of those that are left; other rows stay as they are.

    weights -> [1, n_used, n_rows], as given to ggml_mc_route
    routed  -> [n_used, n_rows] (i32), the result of ggml_mc_route
*/
GGML_API struct ggml_tensor * ggml_mc_mask_weights(
        struct ggml_context * ctx,
        struct ggml_tensor  * weights,
        struct ggml_tensor  * routed,
        bool                  normalize);

#ifdef __cplusplus
}
#endif
