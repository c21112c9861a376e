// Settings and counters of dynamic expert routing.

#include "mc-routing.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

[[noreturn]] void fail(const std::string & what) {
    throw std::runtime_error("expert routing: " + what);
}

void check_share(const char * name, double value) {
    if (!(value >= 0.0 && value <= 1.0)) {
        fail(format("%s must be from 0 to 1, it is %g", name, value));
    }
}

// the layers that have a router; all layers where the model stores its routers under another name
std::vector<bool> find_routers(const llama_model & model) {
    std::vector<bool> result(model.hparams.n_layer());
    for (size_t il = 0; il < result.size(); ++il) {
        result[il] = model.layers[il].ffn_gate_inp != nullptr;
    }
    if (std::find(result.begin(), result.end(), true) == result.end()) {
        result.assign(result.size(), true);
    }
    return result;
}

} // namespace

mc_routing_params mc_routing_default_params(void) {
    return {
        /*.policy     =*/ GGML_MC_POLICY_OFF,
        /*.importance =*/ GGML_MC_MEASURE_ATTENTION,
        /*.keep_min   =*/ 1,
        /*.seed       =*/ 0,
        /*.ratio      =*/ 0.0f,
        /*.top_p      =*/ 1.0f,
        /*.rate       =*/ 0.0f,
        /*.protect    =*/ 0.02,
        /*.thresholds =*/ nullptr,
        /*.active     =*/ nullptr,
    };
}

mc_routing::mc_routing(const llama_model & model) :
        n_layer   ((int) model.hparams.n_layer()),
        n_rank    ((int) model.hparams.n_expert_used_max()),
        n_expert  ((int) model.hparams.n_expert),
        has_router(find_routers(model)),
        params    (mc_routing_default_params()),
        active    (n_layer, 1),
        has_warned(n_layer, false) {
    ggml_init_params init = {
        /*.mem_size   =*/ 2*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ctx.reset(ggml_init(init));
    all_thresholds = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_rank, n_layer);
    all_counters   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I64, 3*n_rank + 2*n_expert, n_layer);
    buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
    if (!buffer) {
        fail("no memory for the counters");
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
}

void mc_routing::set(const mc_routing_params & p) {
    if (p.policy < 0 || p.policy >= GGML_MC_POLICY_COUNT) {
        fail(format("there is no policy %d", p.policy));
    }
    if (p.importance < 0 || p.importance >= GGML_MC_MEASURE_COUNT) {
        fail(format("there is no importance measure %d", p.importance));
    }
    check_share("protect", p.protect);
    check_share("top_p",   p.top_p);
    check_share("rate",    p.rate);
    if (p.keep_min < 1) {
        fail(format("keep_min must be at least 1, it is %d", p.keep_min));
    }
    if (!(p.ratio >= 0.0f)) {
        fail(format("ratio must not be negative, it is %g", (double) p.ratio));
    }
    if (p.policy == GGML_MC_POLICY_ODP || p.policy == GGML_MC_POLICY_THRESHOLD) {
        if (!p.thresholds) {
            fail("this policy needs thresholds");
        }
        for (int i = 0; i < n_layer*n_rank; ++i) {
            if (i % n_rank != 0 && !(p.thresholds[i] >= 0.0f)) {
                fail(format("the threshold of layer %d, rank %d must not be negative, it is %g",
                        i/n_rank, i % n_rank, (double) p.thresholds[i]));
            }
        }
        memcpy(all_thresholds->data, p.thresholds, ggml_nbytes(all_thresholds));
    }
    if (p.active) {
        active.assign(p.active, p.active + n_layer);
    } else {
        active.assign(n_layer, 1);
    }
    params = p;
    params.thresholds = nullptr;
    params.active     = nullptr;
}

bool mc_routing::is_active(int il) const {
    return active[il] != 0;
}

bool mc_routing::needs_attention() const {
    for (int il = 0; il < n_layer; ++il) {
        if (needs_attention(il)) {
            return true;
        }
    }
    return false;
}

bool mc_routing::needs_importance(int il) const {
    return params.policy == GGML_MC_POLICY_ODP && params.protect > 0.0 && params.protect < 1.0 && is_active(il);
}

bool mc_routing::needs_attention(int il) const {
    return params.importance == GGML_MC_MEASURE_ATTENTION && has_router[il] && needs_importance(il);
}

ggml_mc_route_params mc_routing::route_params(int il) const {
    const auto policy = (ggml_mc_policy) (is_active(il) ? params.policy : GGML_MC_POLICY_OFF);
    ggml_mc_route_params result = {
        /*.policy   =*/ policy,
        /*.n_expert =*/ n_expert,
        /*.n_rank   =*/ n_rank,
        /*.layer    =*/ il,
        /*.keep_min =*/ params.keep_min,
        /*.value    =*/ 0.0f,
        /*.seed     =*/ params.seed,
        /*.skips    =*/ 1,
        /*.protect  =*/ params.protect,
    };
    switch (policy) {
        case GGML_MC_POLICY_KEEP_MIN: result.value = params.ratio; break;
        case GGML_MC_POLICY_TOP_P:    result.value = params.top_p; break;
        case GGML_MC_POLICY_RANDOM:   result.value = params.rate;  break;
        default:                                                   break;
    }
    return result;
}

ggml_tensor * mc_routing::thresholds(ggml_context * ctx_graph, int il) const {
    return ggml_view_1d(ctx_graph, all_thresholds, all_thresholds->ne[0], il*all_thresholds->nb[1]);
}

ggml_tensor * mc_routing::counters(ggml_context * ctx_graph, int il) const {
    return ggml_view_1d(ctx_graph, all_counters, all_counters->ne[0], il*all_counters->nb[1]);
}

void mc_routing::get_counters(int64_t * slots, int64_t * experts) const {
    const int64_t * layer = (const int64_t *) all_counters->data;
    for (int il = 0; il < n_layer; ++il, layer += all_counters->ne[0]) {
        if (slots) {
            std::copy_n(layer, 3*n_rank, slots + il*3*n_rank);
        }
        if (experts) {
            std::copy_n(layer + 3*n_rank, 2*n_expert, experts + il*2*n_expert);
        }
    }
}

void mc_routing::reset_counters() {
    memset(all_counters->data, 0, ggml_nbytes(all_counters));
}
