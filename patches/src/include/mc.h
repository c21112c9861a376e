#pragma once

// C API of mc_gguf's patches, next to llama.h.

#include "ggml-mc-routing.h"
#include "llama.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Digest of the patch set that this library was built with (the value of -DMC_PATCHSET at configure time).
LLAMA_API const char * mc_patchset(void);

// sizeof of a struct that a binding declares a second time, by the name of the struct: mc_routing_params, ggml_type_traits. 0 for
// other names.
LLAMA_API size_t mc_sizeof(const char * name);

//
// functions of llama.h for callers that cannot catch C++ exceptions
//

typedef void (*mc_function)(void);

// A function of the same type as the one with this name in llama.h. When an exception or a failed GGML_ASSERT ends it, it returns 0,
// which may also be a result: mc_error() says whether it failed, and why. NULL for functions that are not guarded: those that cannot
// fail, deprecated ones, and some that no model is run with. A failed assertion while a graph is computed ends the process, as it does
// without a guard.
LLAMA_API mc_function mc_guarded(const char * name);

// Why the last guarded call of this thread failed; NULL when it did not. Valid until the next one.
LLAMA_API const char * mc_error(void);

//
// dynamic expert routing: which of the experts that the router selected for a token are really used
//

struct mc_routing_params {
    int32_t  policy;           // enum ggml_mc_policy. With OFF the graph is upstream's and nothing is counted
    int32_t  importance;       // enum ggml_mc_measure: with ODP, the most important tokens of a sequence in a ubatch are protected
    int32_t  keep_min;         // KEEP_MIN: ranks that are always kept, at least 1
    uint32_t seed;             // RANDOM
    float    ratio;            // KEEP_MIN: the other ranks are kept from this multiple of w_0 on
    float    top_p;            // TOP_P: share of the selected experts' weight that is kept, 0 to 1
    float    rate;             // RANDOM: probability of dropping, 0 to 1
    double   protect;          // ODP: share of the tokens that is protected, 0 to 1
    const float  * thresholds; // [n_layer][n_rank], rank 0 is ignored; needed by ODP and THRESHOLD
    const int8_t * active;     // [n_layer], layers in which experts may be dropped; NULL: all
};

LLAMA_API struct mc_routing_params mc_routing_default_params(void);

// Sets the policy from the next decode on. The arrays are copied. Returns 0, or -1 after logging why: the model has no experts, or a
// value is out of range; then nothing changes.
LLAMA_API int32_t mc_routing_set(struct llama_context * ctx, const struct mc_routing_params * params);

// Sizes of the arrays above and below: layers, the most experts that a token uses, experts in a layer. 0 without experts.
LLAMA_API int32_t mc_routing_n_layer (const struct llama_context * ctx);
LLAMA_API int32_t mc_routing_n_rank  (const struct llama_context * ctx);
LLAMA_API int32_t mc_routing_n_expert(const struct llama_context * ctx);

// What has happened under a policy other than OFF since the context was created or the counters were reset. Layers that are not active
// are counted too. Either array may be NULL.
//   slots   [n_layer][3][n_rank]    slots kept, dropped, and protected (a part of the kept: those below the threshold)
//   experts [n_layer][2][n_expert]  ubatches in which the expert would have been read with nothing dropped, and in which it was
LLAMA_API void mc_routing_get_counters(struct llama_context * ctx, int64_t * slots, int64_t * experts);
LLAMA_API void mc_routing_reset_counters(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
