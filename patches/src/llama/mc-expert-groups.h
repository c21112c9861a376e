#pragma once

// Mixed-expert GGUF: a stack of experts T = "blk.N.ffn_{gate,up,down}_exps.weight" that is stored as groups of one type each,
// T.0, T.1, ..., and T.map, the (group, position) of each expert. mc_gguf's documentation specifies the format.
//
// Model code asks the loader for T and gets a grouped stack: a tensor of T's name and shape that has no data, whose src[0] is the
// map and whose src[1..] are the groups. It never enters a graph itself; mc_mul_mat_id, at the one place where weights are
// multiplied by expert, looks into it.

#include "llama-arch.h"
#include "llama-model-loader.h"

#include <functional>
#include <string>
#include <utility>
#include <vector>

using mc_create_part = std::function<ggml_tensor * (const char * suffix, const std::initializer_list<int64_t> & ne)>;

// whether the file stores the stack `tn` in groups
bool mc_has_expert_groups(const llama_model_loader & ml, const LLM_TN_IMPL & tn);

// whether a tensor with this suffix is a group or a map
bool mc_is_expert_group_part(const char * suffix);

// Creates the parts of the stack through `create`, checks them and the map, and returns the grouped stack, which ml.mc_stacks owns.
// When the file violates the format, throws a std::runtime_error that names the tensor.
ggml_tensor * mc_create_expert_groups(
        llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne, const mc_create_part & create);

// Adds the stacks to the tensors that adapters look up by name.
void mc_register_expert_groups(ggml_context * stacks, std::vector<std::pair<std::string, ggml_tensor *>> & tensors_by_name);

// Gives each stack the buffer of its first group once the groups are allocated: adapters ask in which buffer a weight is.
void mc_adopt_buffers(ggml_context * stacks);

// an op that uses `part` (a group or a map), to ask a backend whether it supports it
ggml_tensor * mc_mul_mat_id_grouped_probe(ggml_context * ctx, ggml_tensor * part, int64_t n_expert_used);

// whether a weight is a grouped stack
bool mc_is_grouped_stack(const ggml_tensor * w);

// ggml_mul_mat_id, or ggml_mul_mat_id_grouped when `w` is a grouped stack
ggml_tensor * mc_mul_mat_id(ggml_context * ctx, ggml_tensor * w, ggml_tensor * b, ggml_tensor * ids);
