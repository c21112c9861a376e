#pragma once

// Helpers that the CPU implementations of the routing ops share.

#include "ggml-cpu-impl.h"
#include "ggml-mc-routing.h"

#include <utility>

static inline int32_t ggml_mc_token_field_of(const ggml_tensor * tokens, int64_t token, ggml_mc_token_field field) {
    return ((const int32_t *) tokens->data)[token*GGML_MC_TOKEN_FIELD_COUNT + field];
}

// this thread's share [begin, end) of n items
static inline std::pair<int64_t, int64_t> ggml_mc_share_of(const ggml_compute_params * params, int64_t n) {
    return { n*params->ith/params->nth, n*(params->ith + 1)/params->nth };
}
