// Dynamic expert routing in the graph.

#include "mc-routing.h"

#include "mc-expert-groups.h"
#include "ggml-mc.h"
#include "ggml-mc-routing.h"
#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <map>
#include <set>

namespace {

// Whether a sequence has several tokens in the ubatch. Otherwise there are none to compare a token with.
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
        // A token is a query of its first sequence, and the queries of all its sequences can see it (as in llama_kv_cache's mask).
        std::map<llama_seq_id, std::vector<llama_pos>> queries;
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            queries[ubatch->seq_id[i][0]].push_back(ubatch->pos[i]);
        }
        for (auto & [seq, pos] : queries) {
            std::sort(pos.begin(), pos.end());
        }
        std::vector<int32_t> data(ubatch->n_tokens*GGML_MC_TOKEN_FIELD_COUNT);
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            int64_t n_queries = 0;
            for (int32_t s = 0; s < ubatch->n_seq_id[i]; ++s) {
                const auto it = queries.find(ubatch->seq_id[i][s]);
                if (it != queries.end()) {
                    const auto & pos = it->second;
                    n_queries += pos.end() - (causal ? std::lower_bound(pos.begin(), pos.end(), ubatch->pos[i]) : pos.begin());
                }
            }
            int32_t * token = data.data() + i*GGML_MC_TOKEN_FIELD_COUNT;
            token[GGML_MC_TOKEN_FIELD_SEQ]     = ubatch->seq_id[i][0];
            token[GGML_MC_TOKEN_FIELD_QUERIES] = (int32_t) n_queries;
            token[GGML_MC_TOKEN_FIELD_POS]     = ubatch->pos[i];
        }
        ggml_backend_tensor_set(tokens, data.data(), 0, data.size()*sizeof(int32_t));
    }

    bool can_reuse(const llm_graph_params & params) override {
        return tokens->ne[1] == params.ubatch.n_tokens && causal == params.cparams.causal_attn &&
            company == has_company(params.ubatch);
    }

private:
    ggml_tensor * tokens; // I32 [GGML_MC_TOKEN_FIELD_COUNT, n_tokens]
    const bool    company;
    const bool    causal;
};

ggml_tensor * tokens_input(const llm_graph_context & graph) {
    ggml_tensor * & tokens = graph.mc.tokens;
    if (!tokens) {
        tokens = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_I32, GGML_MC_TOKEN_FIELD_COUNT, graph.n_tokens);
        ggml_set_input(tokens);
        ggml_set_name(tokens, "mc_tokens");
        graph.res->add_input(std::make_unique<llm_graph_input_mc_tokens>(tokens, graph.ubatch, graph.cparams.causal_attn));
    }
    return tokens;
}

// Whether the attention of a layer is needed in this graph.
bool needs_attention(const llm_graph_context & graph, int il) {
    const mc_routing * routing = graph.cparams.mc_routing_state;
    return routing && !graph.cparams.warmup && !graph.cparams.training && il >= 0 && il < routing->n_layer &&
        routing->needs_attention(il) && has_company(graph.ubatch);
}

// Whether each token's key is in one known cell. k is permuted to [n_embd_head, n_kv, n_head_kv, n_stream].
bool has_cells(const llm_graph_context & graph, const ggml_tensor * k, const mc_key_cells & cells) {
    if (!cells.known) {
        return false;
    }
    if (cells.idxs) {
        GGML_ASSERT(k->view_src && k->view_src->op == GGML_OP_NONE && "mc_key_cells::at: the keys are not in a cache");
        return cells.idxs->ne[0] == graph.n_tokens; // more where a token is written to several streams
    }
    GGML_ASSERT(k->ne[1] == graph.n_tokens && k->ne[3] == 1 && "mc_key_cells::in_order: the keys are not the tokens' own");
    return true;
}

// In a cache, nb[3] spans all cells of a stream, also those that this graph does not look at.
int64_t cells_per_stream(const llm_graph_context & graph, const ggml_tensor * k, const mc_key_cells & cells) {
    return cells.idxs ? (int64_t) (k->nb[3]/k->nb[1]) : graph.n_tokens;
}

void set_received(const llm_graph_context & graph, ggml_tensor * received, int il) {
    ggml_build_forward_expand(graph.gf, received); // now, so that the scores can be freed
    graph.cb(received, "attn_received", il);
    graph.mc.attn_layer = il;
    graph.mc.received   = received;
}

// The importance of the rows of `cur`; null when it is not needed.
ggml_tensor * build_importance(const llm_graph_context & graph, ggml_tensor * cur, ggml_tensor * rows, int il) {
    const mc_routing & routing = *graph.cparams.mc_routing_state;
    if (!routing.needs_importance(il) || !has_company(graph.ubatch)) {
        return nullptr;
    }
    ggml_tensor * received = graph.mc.attn_layer == il ? graph.mc.received : nullptr;
    if (!received && routing.needs_attention(il) && !routing.has_warned[il]) {
        routing.has_warned[il] = true;
        LLAMA_LOG_WARN("expert routing: attention cannot be measured in layer %d, the importance of its tokens is the L1 norm\n", il);
    }
    ggml_tensor * result = ggml_mc_importance(graph.ctx0, cur, received, tokens_input(graph), rows,
            (ggml_mc_measure) routing.params.importance);
    graph.cb(result, "ffn_moe_importance", il);
    return result;
}

// The tokens that the rows of a MoE block belong to; null: all tokens, in order. In the last layer, only the tokens whose output is
// wanted are left (out_ids is in order, so when all are wanted it makes no difference).
ggml_tensor * rows_of(const llm_graph_context & graph, const ggml_tensor * cur, int il) {
    if (cur->ne[1] == graph.n_tokens) {
        return nullptr;
    }
    if (!graph.mc.out_ids || graph.mc.out_ids->ne[0] != cur->ne[1]) {
        GGML_ABORT("expert routing: the MoE block of layer %d has %lld rows, which are neither all tokens nor the outputs",
                il, (long long) cur->ne[1]);
    }
    return graph.mc.out_ids;
}

// Whether the device that holds `w` can multiply by it and skip slots. Moving weights to a device that can would cost more. The groups
// of a grouped stack were placed where MUL_MAT_ID_GROUPED is known.
bool can_skip(ggml_tensor * w) {
    ggml_backend_buffer_type_t buft = w->buffer ? ggml_backend_buffer_get_type(w->buffer) : nullptr;
    ggml_backend_dev_t         dev  = buft ? ggml_backend_buft_get_device(buft) : nullptr;
    if (mc_is_grouped_stack(w) || !dev || ggml_backend_buft_is_host(buft)) {
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

} // namespace

void mc_observe_attn(const llm_graph_context & graph, ggml_tensor * probs, ggml_tensor * k, const mc_key_cells & cells, int il) {
    if (!needs_attention(graph, il) || !has_cells(graph, k, cells)) {
        return;
    }
    set_received(graph, ggml_mc_attn_received(graph.ctx0, probs, cells.idxs, tokens_input(graph), cells_per_stream(graph, k, cells)), il);
}

void mc_observe_flash_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, const mc_key_cells & cells, int il) {
    if (!needs_attention(graph, il) || !has_cells(graph, k, cells)) {
        return;
    }
    const ggml_mc_qk_params params = {
        /*.scale            =*/ kq_scale,
        /*.max_bias         =*/ graph.hparams.f_max_alibi_bias,
        /*.logit_softcap    =*/ graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f,
        /*.cells_per_stream =*/ (int32_t) cells_per_stream(graph, k, cells),
    };
    set_received(graph, ggml_mc_qk_received(graph.ctx0, q, k, kq_mask, sinks, cells.idxs, tokens_input(graph), &params), il);
}

ggml_tensor * mc_route_experts(const llm_graph_context & graph, ggml_tensor * cur, ggml_tensor * weights, ggml_tensor * selected,
        std::initializer_list<ggml_tensor *> stacks, int64_t n_expert, bool normalized, int il) {
    const mc_routing * routing = graph.cparams.mc_routing_state;
    graph.mc.selected = nullptr;
    if (!routing || graph.cparams.warmup || graph.cparams.training || il < 0 || il >= routing->n_layer ||
            n_expert != routing->n_expert || selected->ne[0] > routing->n_rank) {
        return weights;
    }
    ggml_context * ctx0 = graph.ctx0;
    ggml_tensor  * rows = rows_of(graph, cur, il);

    ggml_mc_route_params params = routing->route_params(il);
    params.skips = std::all_of(stacks.begin(), stacks.end(), [](ggml_tensor * w) { return !w || can_skip(w); });

    ggml_tensor * route = ggml_mc_route(ctx0, weights, selected, build_importance(graph, cur, rows, il), tokens_input(graph), rows,
            routing->thresholds(ctx0, il), &params);
    graph.cb(route, "ffn_moe_route", il);
    ggml_tensor * routed = ggml_mc_route_ids(ctx0, route);
    graph.cb(routed, "ffn_moe_routed", il);

    // also where nothing can be dropped
    ggml_build_forward_expand(graph.gf, routed);
    ggml_build_forward_expand(graph.gf, ggml_mc_count(ctx0, routing->counters(ctx0, il), route));

    if (params.policy == GGML_MC_POLICY_OFF) {
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
    if (mc_is_grouped_stack(w)) {
        return mc_mul_mat_id(graph.ctx0, w, b, graph.mc.routed);
    }
    return ggml_mul_mat_id_grouped(graph.ctx0, &w, 1, nullptr, b, graph.mc.routed);
}
