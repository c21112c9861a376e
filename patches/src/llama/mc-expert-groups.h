#pragma once

// Mixed-expert GGUF: a stack of experts T = "blk.N.ffn_{gate,up,down}_exps.weight" that is stored as typed groups
// T.0, T.1, ... and T.map, the (group, position) of each expert. The format is specified in mc_gguf's docs/format.md.
//
// Model code asks the loader for T and gets a tensor of T's name and shape that has no data: src[0] is the map, src[1..]
// the groups. It never enters a graph; mc_mul_mat_id, at the one place where experts are multiplied, looks into it.

#include "llama-arch.h"
#include "llama-model-loader.h"

#include <functional>
#include <string>
#include <utility>
#include <vector>

using mc_create_part = std::function<ggml_tensor * (const char * suffix, const std::initializer_list<int64_t> & ne)>;

// whether the file stores the stack `tn` in groups
bool mc_has_expert_groups(const llama_model_loader & ml, const LLM_TN_IMPL & tn);

// whether a tensor with this suffix is such a group or map
bool mc_is_expert_group_part(const char * suffix);

// Creates the stack's parts through `create`, checks them and the map, and returns the stack (kept in ml.mc_stacks).
// Throws std::runtime_error that names the tensor when the file breaks the format.
ggml_tensor * mc_create_expert_groups(
        llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne, const mc_create_part & create);

// Makes the stacks known by name, as adapters look tensors up.
void mc_register_expert_groups(ggml_context * stacks, std::vector<std::pair<std::string, ggml_tensor *>> & tensors_by_name);

// Gives each stack the buffer of its first group, once those are allocated: adapters ask where the weight lives.
void mc_adopt_buffers(ggml_context * stacks);

// an op in which `part` (a group or a map) plays its role, to ask a backend whether it supports it
ggml_tensor * mc_mul_mat_id_grouped_probe(ggml_context * ctx, ggml_tensor * part, int64_t n_expert_used);

// ggml_mul_mat_id, or ggml_mul_mat_id_grouped when `w` is a stack of groups
ggml_tensor * mc_mul_mat_id(ggml_context * ctx, ggml_tensor * w, ggml_tensor * b, ggml_tensor * ids);
