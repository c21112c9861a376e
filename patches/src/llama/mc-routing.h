#pragma once

// Dynamic expert routing in the graph; mc.h is its API. When it is off, the graph is upstream's, node for node.
//
// build_moe_ffn calls mc_route_experts once the weights of the selected experts are known, before the architecture normalizes
// them. Upstream's code keeps its own ids, by which it looks up biases and scales; only the multiplications by experts, in
// build_lora_mm_id, use the routed ids (mc_mul_mat_routed).

#include "mc.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <initializer_list>
#include <vector>

struct llama_model;
struct llm_graph_context;

//
// settings and counters of a context (mc-routing.cpp)
//

struct mc_routing {
    explicit mc_routing(const llama_model & model);

    // throws a std::runtime_error that says which parameter is wrong
    void set(const mc_routing_params & params);

    bool is_active(int il) const;

    // whether the importance of tokens is needed, and whether that needs attention
    bool needs_importance(int il) const;
    bool needs_attention (int il) const;
    bool needs_attention () const; // in any layer

    ggml_mc_route_params route_params(int il) const;

    // the most nodes that routing adds to a graph
    uint32_t n_nodes() const { return 16*n_layer; }

    ggml_tensor * thresholds(ggml_context * ctx, int il) const; // view [n_rank]
    ggml_tensor * counters  (ggml_context * ctx, int il) const; // view [3*n_rank + 2*n_expert]

    void get_counters(int64_t * slots, int64_t * experts) const;
    void reset_counters();

    const int n_layer;
    const int n_rank;
    const int n_expert;
    const std::vector<bool> has_router; // [n_layer]

    mc_routing_params   params; // without its arrays, which are copied
    std::vector<int8_t> active;

    mutable std::vector<bool> has_warned; // [n_layer] that attention cannot be measured

private:
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor *           all_thresholds;
    ggml_tensor *           all_counters;
};

//
// graph (mc-routing-graph.cpp)
//

// Which cells of the keys that build_attn_mha gets hold the keys of the ubatch's tokens. Its callers know, and each has to say so.
struct mc_key_cells {
    bool          known; // false: none do, or no single cell does
    ggml_tensor * idxs;  // [n_tokens], where the keys were written to; null: the key of token i is key i

    static mc_key_cells at(ggml_tensor * idxs) { return { true,  idxs    }; }
    static mc_key_cells in_order()             { return { true,  nullptr }; }
    static mc_key_cells none()                 { return { false, nullptr }; }
};

// what is remembered while a graph is built
struct mc_routing_graph {
    ggml_tensor * tokens  = nullptr; // input that describes the tokens of the ubatch, see ggml_mc_token_field
    ggml_tensor * out_ids = nullptr; // upstream's input: the tokens whose output is wanted

    int           attn_layer = -1;      // the layer of `received`
    ggml_tensor * received   = nullptr; // mean attention received

    const ggml_tensor * selected = nullptr; // the ids of the latest MoE block,
    ggml_tensor *       routed   = nullptr; // and what routing left of them
};

// Measures the attention of a layer, if the layer needs that: from its softmax or, with flash attention, from queries and keys.
void mc_observe_attn(const llm_graph_context & graph, ggml_tensor * probs, ggml_tensor * k, const mc_key_cells & cells, int il);
void mc_observe_flash_attn(const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, const mc_key_cells & cells, int il);

// Decides which of the `selected` experts are dropped, and returns the weights with 0 for those. `stacks` are the weights of
// the block's experts; null ones are ignored. `normalized`: the weights add up to 1 already, and no normalization follows.
ggml_tensor * mc_route_experts(const llm_graph_context & graph, ggml_tensor * cur, ggml_tensor * weights, ggml_tensor * selected,
        std::initializer_list<ggml_tensor *> stacks, int64_t n_expert, bool normalized, int il);

// ggml_mul_mat_id of w, b and ids; where these ids were routed, without the experts that are dropped
ggml_tensor * mc_mul_mat_routed(const llm_graph_context & graph, ggml_tensor * w, ggml_tensor * b, ggml_tensor * ids);
