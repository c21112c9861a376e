#include "mc-routing.h"

#include "mc-expert-groups.h"
#include "ggml-mc.h"
#include "ggml-mc-routing.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>
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

// Whether some sequence has several tokens in the ubatch: only then is there one to compare a token with.
bool has_company(const llama_ubatch & ubatch) {
    std::set<llama_seq_id> seen;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (!seen.insert(ubatch.seq_id[i][0]).second) {
            return true;
        }
    }
    return false;
}

// describes the tokens of the ubatch to the routing ops
class llm_graph_input_mc_tokens : public llm_graph_input_i {
public:
    llm_graph_input_mc_tokens(ggml_tensor * tokens, const llama_ubatch & ubatch, bool causal) :
        tokens(tokens), company(has_company(ubatch)), causal(causal) {}

    void set_input(const llama_ubatch * ubatch) override {
        // A token is a query of its first sequence, and seen by the queries of all its sequences (llama_kv_cache's mask).
        std::map<llama_seq_id, std::vector<llama_pos>> queries;
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            queries[ubatch->seq_id[i][0]].push_back(ubatch->pos[i]);
        }
        for (auto & [seq, pos] : queries) {
            std::sort(pos.begin(), pos.end());
        }
        std::vector<int32_t> data(ubatch->n_tokens*GGML_MC_TOKEN_N_FIELDS);
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            int64_t n_queries = 0;
            for (int32_t s = 0; s < ubatch->n_seq_id[i]; ++s) {
                const auto it = queries.find(ubatch->seq_id[i][s]);
                if (it != queries.end()) {
                    const auto & pos = it->second;
                    n_queries += pos.end() - (causal ? std::lower_bound(pos.begin(), pos.end(), ubatch->pos[i]) : pos.begin());
                }
            }
            int32_t * token = data.data() + i*GGML_MC_TOKEN_N_FIELDS;
            token[GGML_MC_TOKEN_SEQ]     = ubatch->seq_id[i][0];
            token[GGML_MC_TOKEN_QUERIES] = (int32_t) n_queries;
            token[GGML_MC_TOKEN_POS]     = ubatch->pos[i];
        }
        ggml_backend_tensor_set(tokens, data.data(), 0, data.size()*sizeof(int32_t));
    }

    bool can_reuse(const llm_graph_params & params) override {
        return tokens->ne[1] == params.ubatch.n_tokens && causal == params.cparams.causal_attn &&
            company == has_company(params.ubatch);
    }

private:
    ggml_tensor * tokens; // I32 [GGML_MC_TOKEN_N_FIELDS, n_tokens]
    const bool    company;
    const bool    causal;
};

ggml_tensor * tokens_input(const llm_graph_context & graph) {
    ggml_tensor * & tokens = graph.mc.tokens;
    if (!tokens) {
        tokens = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_I32, GGML_MC_TOKEN_N_FIELDS, graph.n_tokens);
        ggml_set_input(tokens);
        ggml_set_name(tokens, "mc_tokens");
        graph.res->add_input(std::make_unique<llm_graph_input_mc_tokens>(tokens, graph.ubatch, graph.cparams.causal_attn));
    }
    return tokens;
}

const ggml_tensor * root(const ggml_tensor * t) {
    while (t->view_src) {
        t = t->view_src;
    }
    return t;
}

// Where the tokens' keys were written to: the indices of the node that stored them in the cache that `k` is a view of.
// Null when `k` is no view of a cache that this graph writes to.
ggml_tensor * cells_of(const llm_graph_context & graph, const ggml_tensor * k) {
    for (int i = ggml_graph_n_nodes(graph.gf) - 1; i >= 0; --i) {
        const ggml_tensor * node = ggml_graph_node(graph.gf, i);
        if (node->op == GGML_OP_SET_ROWS && root(node) == root(k)) {
            return node->src[1];
        }
    }
    return nullptr;
}

// whether attention is over the batch itself, without a cache
bool is_without_cache(const llm_graph_context & graph) {
    return std::any_of(graph.res->inputs.begin(), graph.res->inputs.end(), [](const llm_graph_input_ptr & input) {
        return dynamic_cast<const llm_graph_input_attn_no_cache *>(input.get()) != nullptr;
    });
}

// The importance of the rows of `cur`, null when it is not needed.
ggml_tensor * build_importance(const llm_graph_context & graph, ggml_tensor * cur, ggml_tensor * rows, int il) {
    const mc_routing & routing = *graph.cparams.mc_routing_state;
    if (!routing.needs_importance(il) || !has_company(graph.ubatch)) {
        return nullptr;
    }
    ggml_tensor * received = graph.mc.attn_layer == il ? graph.mc.received : nullptr;
    ggml_tensor * result   = ggml_mc_importance(graph.ctx0, cur, received, tokens_input(graph), rows,
            (ggml_mc_measure) routing.params.importance);
    graph.cb(result, "ffn_moe_importance", il);
    return result;
}

// The tokens of a MoE block's rows: in the last layer only those whose output is wanted are left. False when the rows are
// neither all tokens nor the outputs; `rows` is null for all tokens (out_ids are in order).
bool find_rows(const llm_graph_context & graph, const ggml_tensor * cur, ggml_tensor * & rows) {
    rows = nullptr;
    if (cur->ne[1] == graph.n_tokens) {
        return true;
    }
    for (const auto & input : graph.res->inputs) {
        if (const auto * out = dynamic_cast<const llm_graph_input_out_ids *>(input.get())) {
            if (out->out_ids && out->out_ids->ne[0] == cur->ne[1]) {
                rows = out->out_ids;
                return true;
            }
        }
    }
    return false;
}

ggml_mc_route_params route_params(const mc_routing & routing, int64_t n_expert, int il) {
    const mc_routing_params & p = routing.params;
    ggml_mc_route_params result = {
        /*.policy   =*/ GGML_MC_POLICY_COUNT_ONLY,
        /*.n_expert =*/ (int32_t) n_expert,
        /*.layer    =*/ il,
        /*.keep_min =*/ p.keep_min,
        /*.value    =*/ 0.0f,
        /*.seed     =*/ p.seed,
        /*.skips    =*/ 1,
        /*.protect  =*/ 0.0,
    };
    if (!routing.is_active(il)) {
        return result;
    }
    switch (p.policy) {
        case MC_ROUTING_ODP:       result.policy = GGML_MC_POLICY_THRESHOLD; result.protect = p.protect; break;
        case MC_ROUTING_THRESHOLD: result.policy = GGML_MC_POLICY_THRESHOLD;                             break;
        case MC_ROUTING_KEEP_MIN:  result.policy = GGML_MC_POLICY_KEEP_MIN;  result.value = p.ratio;     break;
        case MC_ROUTING_TOP_P:     result.policy = GGML_MC_POLICY_TOP_P;     result.value = p.top_p;     break;
        case MC_ROUTING_RANDOM:    result.policy = GGML_MC_POLICY_RANDOM;    result.value = p.rate;      break;
    }
    return result;
}

// Whether multiplications by `w` can skip slots where `w` is. Moving the weights to a device that can would cost more.
bool can_skip(ggml_tensor * w) {
    const bool is_stack = w->op == GGML_OP_NONE && w->src[0] != nullptr; // of groups, which are where the op is known
    ggml_backend_buffer_type_t buft = w->buffer ? ggml_backend_buffer_get_type(w->buffer) : nullptr;
    ggml_backend_dev_t         dev  = buft ? ggml_backend_buft_get_device(buft) : nullptr;
    if (is_stack || !dev || ggml_backend_buft_is_host(buft)) {
        return true;
    }
    ggml_init_params init = {
        /*.mem_size   =*/ 4*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx(ggml_init(init));
    ggml_tensor * b   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, w->ne[0], 1, 1);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, 1);
    return ggml_backend_dev_supports_op(dev, ggml_mul_mat_id_grouped(ctx.get(), &w, 1, nullptr, b, ids));
}

// the layers that have a router; all of them where the model calls its routers otherwise
std::vector<bool> routers_of(const llama_model & model) {
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

//
// mc_routing
//

mc_routing::mc_routing(const llama_model & model) :
        n_layer   ((int) model.hparams.n_layer()),
        n_rank    ((int) model.hparams.n_expert_used_max()),
        n_expert  ((int) model.hparams.n_expert),
        has_router(routers_of(model)),
        params    (mc_routing_default_params()),
        active    (n_layer, 1) {
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
    if (p.policy < MC_ROUTING_OFF || p.policy > MC_ROUTING_RANDOM) {
        fail(format("there is no policy %d", p.policy));
    }
    if (p.importance < MC_IMPORTANCE_ATTENTION || p.importance > MC_IMPORTANCE_LAST) {
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
    if (p.policy == MC_ROUTING_ODP || p.policy == MC_ROUTING_THRESHOLD) {
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
    return params.policy == MC_ROUTING_ODP && params.protect > 0.0 && params.protect < 1.0 && is_active(il);
}

bool mc_routing::needs_attention(int il) const {
    return params.importance == MC_IMPORTANCE_ATTENTION && has_router[il] && needs_importance(il);
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

//
// graph
//

static bool needs_attention(const llm_graph_context & graph, int il) {
    const mc_routing * routing = graph.cparams.mc_routing_state;
    return routing && !graph.cparams.warmup && il >= 0 && il < routing->n_layer && routing->needs_attention(il) &&
        has_company(graph.ubatch);
}

// Where the keys of a layer's tokens are; false when they are not the tokens' own.
struct key_places {
    ggml_tensor * cells            = nullptr; // null: token i is in cell i
    int64_t       cells_per_stream = 0;
};

static bool find_keys(const llm_graph_context & graph, const ggml_tensor * k, key_places & places) {
    places.cells = cells_of(graph, k);
    if (!places.cells && (k->ne[1] != graph.n_tokens || k->ne[3] != 1 || !is_without_cache(graph))) {
        return false; // as in cross-attention, or where keys are put together from several caches
    }
    // k is permuted to [n_embd_head, n_kv, n_head_kv, n_stream]; in a cache, nb[3] spans all cells of a stream
    places.cells_per_stream = places.cells ? (int64_t) (k->nb[3]/k->nb[1]) : graph.n_tokens;
    return true;
}

static void set_received(const llm_graph_context & graph, ggml_tensor * received, int il) {
    ggml_build_forward_expand(graph.gf, received); // now, so that the scores are freed
    graph.cb(received, "attn_received", il);
    graph.mc.attn_layer = il;
    graph.mc.received   = received;
}

void mc_see_attention(const llm_graph_context & graph, ggml_tensor * probs, ggml_tensor * k, int il) {
    key_places keys;
    if (needs_attention(graph, il) && find_keys(graph, k, keys)) {
        set_received(graph, ggml_mc_attn_received(graph.ctx0, probs, keys.cells, tokens_input(graph), keys.cells_per_stream), il);
    }
}

void mc_see_flash_attention(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, int il) {
    key_places keys;
    if (!needs_attention(graph, il) || !find_keys(graph, k, keys)) {
        return;
    }
    const ggml_mc_qk_params params = {
        /*.scale            =*/ kq_scale,
        /*.max_bias         =*/ graph.hparams.f_max_alibi_bias,
        /*.logit_softcap    =*/ graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f,
        /*.cells_per_stream =*/ (int32_t) keys.cells_per_stream,
    };
    set_received(graph, ggml_mc_qk_received(graph.ctx0, q, k, kq_mask, sinks, keys.cells, tokens_input(graph), &params), il);
}

ggml_tensor * mc_route_experts(const llm_graph_context & graph, ggml_tensor * cur, ggml_tensor * weights, ggml_tensor * selected,
        std::initializer_list<ggml_tensor *> stacks, int64_t n_expert, bool normalized, int il) {
    const mc_routing * routing = graph.cparams.mc_routing_state;
    graph.mc.selected = nullptr;
    if (!routing || graph.cparams.warmup || graph.cparams.training || il < 0 || il >= routing->n_layer ||
            n_expert != routing->n_expert || selected->ne[0] > routing->n_rank) {
        return weights;
    }
    ggml_tensor * rows = nullptr;
    if (!find_rows(graph, cur, rows)) {
        return weights;
    }
    ggml_context * ctx0 = graph.ctx0;

    ggml_mc_route_params params = route_params(*routing, n_expert, il);
    params.skips = std::all_of(stacks.begin(), stacks.end(), [](ggml_tensor * w) { return !w || can_skip(w); });

    ggml_tensor * routed = ggml_mc_route(ctx0, weights, selected, build_importance(graph, cur, rows, il), tokens_input(graph), rows,
            routing->thresholds(ctx0, il), routing->counters(ctx0, il), &params);
    graph.cb(routed, "ffn_moe_routed", il);
    ggml_build_forward_expand(graph.gf, routed); // counts, even where nothing can be dropped

    if (params.policy == GGML_MC_POLICY_COUNT_ONLY) {
        return weights;
    }
    if (params.skips) {
        graph.mc.selected = selected;
        graph.mc.routed   = routed;
    }
    weights = ggml_mc_mask_weights(ctx0, weights, routed, normalized);
    graph.cb(weights, "ffn_moe_weights_routed", il);
    return weights;
}

ggml_tensor * mc_mul_mat_routed(const llm_graph_context & graph, ggml_tensor * w, ggml_tensor * b, ggml_tensor * ids) {
    if (!graph.mc.selected || ids != graph.mc.selected || !can_skip(w)) {
        return mc_mul_mat_id(graph.ctx0, w, b, ids);
    }
    if (w->op == GGML_OP_NONE && w->src[0]) {
        return mc_mul_mat_id(graph.ctx0, w, b, graph.mc.routed); // a stack of groups
    }
    return ggml_mul_mat_id_grouped(graph.ctx0, &w, 1, nullptr, b, graph.mc.routed);
}
