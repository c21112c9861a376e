// The C API (mc.h), except for mc_patchset and the defaults of the settings (mc-routing.cpp).

#include "mc.h"

#include "mc-routing.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <exception>

size_t mc_sizeof(const char * name) {
    if (strcmp(name, "mc_routing_params") == 0) {
        return sizeof(mc_routing_params);
    }
    if (strcmp(name, "ggml_type_traits") == 0) {
        return sizeof(ggml_type_traits);
    }
    return 0;
}

int32_t mc_routing_set(llama_context * ctx, const mc_routing_params * params) {
    try {
        ctx->mc_routing_set(*params);
        return 0;
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return -1;
    }
}

static bool has_experts(const llama_context * ctx) {
    return ctx->get_model().hparams.n_expert > 0;
}

int32_t mc_routing_n_layer(const llama_context * ctx) {
    return has_experts(ctx) ? (int32_t) ctx->get_model().hparams.n_layer() : 0;
}

int32_t mc_routing_n_rank(const llama_context * ctx) {
    return has_experts(ctx) ? (int32_t) ctx->get_model().hparams.n_expert_used_max() : 0;
}

int32_t mc_routing_n_expert(const llama_context * ctx) {
    return has_experts(ctx) ? (int32_t) ctx->get_model().hparams.n_expert : 0;
}

void mc_routing_get_counters(llama_context * ctx, int64_t * slots, int64_t * experts) {
    ctx->synchronize();
    if (const mc_routing * routing = ctx->mc_routing_get()) {
        routing->get_counters(slots, experts);
        return;
    }
    if (slots) {
        std::fill_n(slots, (size_t) mc_routing_n_layer(ctx)*3*mc_routing_n_rank(ctx), 0);
    }
    if (experts) {
        std::fill_n(experts, (size_t) mc_routing_n_layer(ctx)*2*mc_routing_n_expert(ctx), 0);
    }
}

void mc_routing_reset_counters(llama_context * ctx) {
    ctx->synchronize();
    if (mc_routing * routing = ctx->mc_routing_get()) {
        routing->reset_counters();
    }
}
