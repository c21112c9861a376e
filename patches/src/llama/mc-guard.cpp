// mc_guarded (mc.h): functions of llama.h for callers that cannot catch C++ exceptions.

#include "mc-guard.h"

#include "mc.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <type_traits>

static thread_local std::string error;
static thread_local bool        has_failed  = false;
static thread_local int         n_guarded   = 0; // guarded calls that the thread is in
static thread_local int         n_computing = 0; // graphs that it is computing

mc_no_throw:: mc_no_throw() { n_computing++; }
mc_no_throw::~mc_no_throw() { n_computing--; }

// ggml_abort calls abort() when this returns
static void on_abort(const char * message) {
    if (n_guarded > 0 && n_computing == 0) {
        throw std::runtime_error(message);
    }
    fprintf(stderr, "%s\n", message);
}

static void fail(const char * what) {
    error      = what;
    has_failed = true;
}

namespace {

struct guarded_scope {
    guarded_scope()  { n_guarded++; }
    ~guarded_scope() { n_guarded--; }
};

template <auto function> struct guard;

template <typename result, typename... arguments, result (*function)(arguments...)>
struct guard<function> {
    static result call(arguments... args) {
        guarded_scope scope;
        try {
            return finished(args...);
        } catch (const std::exception & err) {
            fail(err.what());
        } catch (...) {
            fail("unknown exception");
        }
        return result();
    }

private:
    // Callbacks may make guarded calls of their own, whose failures are not this one's.
    static result finished(arguments... args) {
        if constexpr (std::is_void_v<result>) {
            function(args...);
            has_failed = false;
        } else {
            const result r = function(args...);
            has_failed = false;
            return r;
        }
    }
};

struct entry {
    const char * name;
    mc_function  function;
};

} // namespace

#define GUARDED(name) { #name, (mc_function) guard<name>::call }

static const entry FUNCTIONS[] = {
    GUARDED(llama_model_load_from_file),
    GUARDED(llama_model_load_from_splits),
    GUARDED(llama_model_desc),
    GUARDED(llama_model_cls_label),
    GUARDED(llama_model_meta_key_by_index),
    GUARDED(llama_model_meta_val_str),
    GUARDED(llama_model_meta_val_str_by_index),
    GUARDED(llama_init_from_model),
    GUARDED(llama_adapter_lora_init),
    GUARDED(llama_set_adapters_lora),
    GUARDED(llama_set_adapter_cvec),
    GUARDED(llama_decode),
    GUARDED(llama_encode),
    GUARDED(llama_synchronize),
    GUARDED(llama_set_n_threads),
    GUARDED(llama_get_logits),
    GUARDED(llama_get_logits_ith),
    GUARDED(llama_get_embeddings),
    GUARDED(llama_get_embeddings_ith),
    GUARDED(llama_get_embeddings_seq),
    GUARDED(llama_get_sampled_token_ith),
    GUARDED(llama_get_sampled_probs_ith),
    GUARDED(llama_get_sampled_probs_count_ith),
    GUARDED(llama_get_sampled_logits_ith),
    GUARDED(llama_get_sampled_logits_count_ith),
    GUARDED(llama_get_sampled_candidates_ith),
    GUARDED(llama_get_sampled_candidates_count_ith),
    GUARDED(llama_memory_clear),
    GUARDED(llama_memory_seq_rm),
    GUARDED(llama_memory_seq_cp),
    GUARDED(llama_memory_seq_keep),
    GUARDED(llama_memory_seq_add),
    GUARDED(llama_memory_seq_div),
    GUARDED(llama_memory_seq_pos_min),
    GUARDED(llama_memory_seq_pos_max),
    GUARDED(llama_state_get_size),
    GUARDED(llama_state_get_data),
    GUARDED(llama_state_set_data),
    GUARDED(llama_state_load_file),
    GUARDED(llama_state_save_file),
    GUARDED(llama_state_seq_get_size),
    GUARDED(llama_state_seq_get_data),
    GUARDED(llama_state_seq_set_data),
    GUARDED(llama_state_seq_get_size_ext),
    GUARDED(llama_state_seq_get_data_ext),
    GUARDED(llama_state_seq_set_data_ext),
    GUARDED(llama_state_seq_load_file),
    GUARDED(llama_state_seq_save_file),
    GUARDED(llama_tokenize),
    GUARDED(llama_token_to_piece),
    GUARDED(llama_detokenize),
    GUARDED(llama_chat_apply_template),
    GUARDED(llama_vocab_get_text),
    GUARDED(llama_vocab_get_score),
    GUARDED(llama_vocab_get_attr),
    GUARDED(llama_vocab_is_eog),
    GUARDED(llama_vocab_is_control),
    GUARDED(llama_sampler_chain_add),
    GUARDED(llama_sampler_chain_get),
    GUARDED(llama_sampler_chain_remove),
    GUARDED(llama_sampler_init_dist),
    GUARDED(llama_sampler_init_top_k),
    GUARDED(llama_sampler_init_top_p),
    GUARDED(llama_sampler_init_min_p),
    GUARDED(llama_sampler_init_typical),
    GUARDED(llama_sampler_init_temp),
    GUARDED(llama_sampler_init_temp_ext),
    GUARDED(llama_sampler_init_adaptive_p),
    GUARDED(llama_sampler_init_xtc),
    GUARDED(llama_sampler_init_top_n_sigma),
    GUARDED(llama_sampler_init_mirostat),
    GUARDED(llama_sampler_init_mirostat_v2),
    GUARDED(llama_sampler_init_grammar),
    GUARDED(llama_sampler_init_grammar_lazy_patterns),
    GUARDED(llama_sampler_init_penalties),
    GUARDED(llama_sampler_init_dry),
    GUARDED(llama_sampler_init_logit_bias),
    GUARDED(llama_sampler_init_infill),
    GUARDED(llama_sampler_sample),
    GUARDED(llama_sampler_accept),
    GUARDED(llama_sampler_apply),
    GUARDED(llama_sampler_reset),
    GUARDED(llama_sampler_clone),
};

mc_function mc_guarded(const char * name) {
    ggml_set_abort_callback(on_abort);
    for (const entry & e : FUNCTIONS) {
        if (strcmp(e.name, name) == 0) {
            return e.function;
        }
    }
    return nullptr;
}

const char * mc_error(void) {
    return has_failed ? error.c_str() : nullptr;
}
