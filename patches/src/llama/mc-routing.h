#pragma once

// Dynamic expert routing in the graph (mc.h is the API). Off: not one node more than upstream.
//
// build_moe_ffn asks mc_route_experts to decide after the weights of the selected experts are known and before the
// architecture normalises them. The ids that upstream's code goes on with stay as they are (biases and scales are looked
// up by them); only the multiplications by experts, in build_lora_mm_id, take the routed ids, see mc_mul_mat_routed.

#include "mc.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <initializer_list>
#include <vector>

struct llama_model;
struct llm_graph_context;

// the settings and counters of a context
struct mc_routing {
    explicit mc_routing(const llama_model & model);

    // throws std::runtime_error that says what is wrong with the parameters
    void set(const mc_routing_params & params);

    bool is_active(int il) const;
    // whether the importance of tokens is needed, and whether it needs attention
    bool needs_importance(int il) const;
    bool needs_attention (int il) const;
    bool needs_attention () const; // of any layer

    // most nodes that it adds to a graph
    uint32_t n_nodes() const { return 16*n_layer; }

    ggml_tensor * thresholds(ggml_context * ctx, int il) const; // view [n_rank]
    ggml_tensor * counters  (ggml_context * ctx, int il) const; // view [3*n_rank + 2*n_expert]

    void get_counters(int64_t * slots, int64_t * experts) const;
    void reset_counters();

    const int n_layer;
    const int n_rank;
    const int n_expert;
    const std::vector<bool> has_router; // [n_layer]

    mc_routing_params   params; // thresholds and active point nowhere
    std::vector<int8_t> active;

private:
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor *           all_thresholds;
    ggml_tensor *           all_counters;
};

// what one graph remembers while it is built
struct mc_routing_graph {
    ggml_tensor * tokens = nullptr; // input that describes the ubatch's tokens, see ggml_mc_token_field

    int           attn_layer = -1;      // layer of `received`
    ggml_tensor * received   = nullptr; // mean attention received

    const ggml_tensor * selected = nullptr; // the latest MoE block's ids, and what routing left of them
    ggml_tensor *       routed   = nullptr;
};

// The attention of a layer: its softmax, or (with flash attention) queries and keys to compute it from. Does nothing when
// the layer does not need it.
void mc_see_attention      (const llm_graph_context & graph, ggml_tensor * probs, ggml_tensor * k, int il);
void mc_see_flash_attention(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, int il);

// Decides which of `selected` are dropped and returns the weights, 0 for those. `stacks` are the block's experts (null:
// none). `normalized`: the weights sum up to 1 already, and no normalisation follows.
ggml_tensor * mc_route_experts(const llm_graph_context & graph, ggml_tensor * cur, ggml_tensor * weights, ggml_tensor * selected,
        std::initializer_list<ggml_tensor *> stacks, int64_t n_expert, bool normalized, int il);

// w times b for the experts `ids`, as ggml_mul_mat_id; for ids that were routed, without those that are dropped
ggml_tensor * mc_mul_mat_routed(const llm_graph_context & graph, ggml_tensor * w, ggml_tensor * b, ggml_tensor * ids);
