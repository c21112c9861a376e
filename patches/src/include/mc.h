#pragma once

// C API of mc_gguf's patches, next to llama.h.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Digest of the patch set that this library was built with (the value of -DMC_PATCHSET at configure time).
LLAMA_API const char * mc_patchset(void);

//
// dynamic expert routing: which of the experts that the router selected a token really uses
//

enum mc_routing_policy {
    MC_ROUTING_OFF       = 0, // the graph of upstream, nothing is counted
    MC_ROUTING_ODP       = 1, // drop rank r when w_r < thresholds[layer][r]*w_0, except for protected tokens
    MC_ROUTING_THRESHOLD = 2, // the same without protection
    MC_ROUTING_KEEP_MIN  = 3, // keep the first keep_min ranks, and those with w_r >= ratio*w_0
    MC_ROUTING_TOP_P     = 4, // keep the fewest ranks that hold a share top_p of the selected experts' weight
    MC_ROUTING_RANDOM    = 5, // drop every rank but the first with probability rate, by position and seed
};

// how important a token is; with MC_ROUTING_ODP the most important ones of a sequence in a ubatch are protected
enum mc_routing_importance {
    MC_IMPORTANCE_ATTENTION = 0, // L1 norm of the MoE block's input times the mean attention that its key receives
    MC_IMPORTANCE_L1        = 1,
    MC_IMPORTANCE_MEAN      = 2,
    MC_IMPORTANCE_VARIANCE  = 3,
    MC_IMPORTANCE_KURTOSIS  = 4,
    MC_IMPORTANCE_LAST      = 5, // L1 norm divided by the number of queries at or after the token
};

struct mc_routing_params {
    int32_t  policy;       // enum mc_routing_policy
    int32_t  importance;   // enum mc_routing_importance
    int32_t  keep_min;
    uint32_t seed;
    float    ratio;
    float    top_p;
    float    rate;
    double   protect;      // share of tokens, 0..1
    const float  * thresholds; // [n_layer][n_rank], rank 0 is not looked at; needed by ODP and THRESHOLD
    const int8_t * active;     // [n_layer], layers in which experts may be dropped; NULL: all
};

LLAMA_API struct mc_routing_params mc_routing_default_params(void);

// Sets the policy from the next decode on. Returns 0, or -1 (and logs why) when the model has no experts or a value is out
// of range; then nothing changes. Arrays are copied.
LLAMA_API int32_t mc_set_routing(struct llama_context * ctx, const struct mc_routing_params * params);

// Sizes of the arrays above and below: layers, most experts that a token uses, experts in a layer. 0 without experts.
LLAMA_API int32_t mc_routing_n_layer (const struct llama_context * ctx);
LLAMA_API int32_t mc_routing_n_rank  (const struct llama_context * ctx);
LLAMA_API int32_t mc_routing_n_expert(const struct llama_context * ctx);

// What happened since the context was made or the counters were reset, while a policy other than OFF was set. `slots` is
// [n_layer][3][n_rank]: slots kept, dropped, and protected (kept although below the threshold: they are among the kept).
// `experts` is [n_layer][2][n_expert]: in how many ubatches an expert would have been read with nothing dropped, and was.
// Layers that are not active count too. Either may be NULL.
LLAMA_API void mc_routing_get_counters(struct llama_context * ctx, int64_t * slots, int64_t * experts);
LLAMA_API void mc_routing_reset_counters(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
