// A libFuzzer target on the loader of expert groups: `python -m tools.sanitizers fuzzer` builds and runs it.
//
// The input decides what a small mixed GGUF looks like: its groups, their types and sizes, the map, and up to four
// faults in them. The file is loaded through mc_guarded, as the Python wrapper does it. A file whose map gives every
// expert a place of its own must load and compute; one whose map does not must be refused; neither may end the process.
// What docs/reference/format.md wants beyond that, such as the order of groups, the loader does not need, and the
// reader in Python checks.

#include "ggml-mc.h"
#include "ggml.h"
#include "llama.h"
#include "mc.h"

#include <fuzzer/FuzzedDataProvider.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace {

const int64_t N_VOCAB = 8;
const int64_t N_FF    = 32;

// what the format allows for groups, and what else there is
const ggml_type SMALL_BLOCKS[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL };
const ggml_type LARGE_BLOCKS[] = { GGML_TYPE_IQ1_S, GGML_TYPE_IQ1_M, GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ2_XS, GGML_TYPE_IQ2_S,
    GGML_TYPE_Q2_K, GGML_TYPE_IQ3_XXS, GGML_TYPE_IQ3_S, GGML_TYPE_Q3_K, GGML_TYPE_IQ4_XS, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,
    GGML_TYPE_Q6_K };

struct tensor {
    int                  type;
    std::vector<int64_t> ne;
    std::vector<uint8_t> data;

    bool has_size() const {
        const bool is_type = type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size((ggml_type) type) > 0;
        return is_type && *std::min_element(ne.begin(), ne.end()) >= 0 && ne[0] % ggml_blck_size((ggml_type) type) == 0;
    }

    size_t n_bytes() const {
        size_t n = has_size() ? ggml_row_size((ggml_type) type, ne[0]) : 0;
        for (size_t i = 1; i < ne.size(); ++i) {
            n *= ne[i];
        }
        return n;
    }
};

struct expert_place {
    int32_t group;
    int32_t position;
};

// One stack of experts as the input describes it. It is valid until a fault is put in.
struct stack {
    std::string               name;
    int64_t                   n_cols, n_rows;
    std::vector<expert_place> map;
    std::vector<tensor>       groups;
    tensor                    map_tensor;
    bool                      is_stored_whole = false;
    int                       gap             = -1; // this group is missing
};

void append(std::vector<uint8_t> & out, const void * data, size_t n) {
    out.insert(out.end(), (const uint8_t *) data, (const uint8_t *) data + n);
}

template <typename T> void append(std::vector<uint8_t> & out, T value) {
    append(out, &value, sizeof(value));
}

void append(std::vector<uint8_t> & out, const std::string & text) {
    append<uint64_t>(out, text.size());
    append(out, text.data(), text.size());
}

// A GGUF, written without ggml's own writer, which would assert what is to be tested.
struct gguf_file {
    std::vector<uint8_t>                        metadata;
    uint64_t                                    n_metadata = 0;
    std::vector<std::pair<std::string, tensor>> tensors;

    void set(const std::string & key, uint32_t value) { head(key, 4); append(metadata, value); }
    void set(const std::string & key, float value)    { head(key, 6); append(metadata, value); }
    void set(const std::string & key, const std::string & value) { head(key, 8); append(metadata, value); }

    // a tensor of small numbers
    void add(const std::string & name, std::vector<int64_t> ne) {
        tensor t = { GGML_TYPE_F32, std::move(ne), {} };
        const size_t n = t.n_bytes()/sizeof(float);
        for (size_t i = 0; i < n; ++i) {
            append(t.data, 0.01f*(float) ((i*2654435761u >> 7) % 200) - 1.0f);
        }
        tensors.emplace_back(name, std::move(t));
    }

    std::vector<uint8_t> bytes() const {
        std::vector<uint8_t> out;
        append(out, "GGUF", 4);
        append<uint32_t>(out, 3);
        append<uint64_t>(out, tensors.size());
        append(out, n_metadata);
        append(out, metadata.data(), metadata.size());
        uint64_t offset = 0;
        for (const auto & [name, t] : tensors) {
            append(out, name);
            append<uint32_t>(out, t.ne.size());
            append(out, t.ne.data(), t.ne.size()*sizeof(int64_t));
            append<uint32_t>(out, t.type);
            append(out, offset);
            offset += GGML_PAD(t.data.size(), 32);
        }
        out.resize(GGML_PAD(out.size(), 32));
        for (const auto & [name, t] : tensors) {
            append(out, t.data.data(), t.data.size());
            out.resize(GGML_PAD(out.size(), 32));
        }
        return out;
    }

private:
    void head(const std::string & key, uint32_t type) {
        append(metadata, key);
        append(metadata, type);
        n_metadata++;
    }
};

stack make_stack(FuzzedDataProvider & input, const std::string & name, int64_t n_cols, int64_t n_rows, int64_t n_expert) {
    stack s;
    s.name   = name;
    s.n_cols = n_cols;
    s.n_rows = n_rows;
    const int n_groups = input.ConsumeIntegralInRange<int>(1, std::min<int64_t>(n_expert, GGML_MC_MAX_GROUPS));
    std::vector<int64_t> sizes(n_groups, 0);
    for (int64_t e = 0; e < n_expert; ++e) {
        // the first experts see to it that no group is empty
        const int32_t g = e < n_groups ? (int32_t) e : input.ConsumeIntegralInRange<int32_t>(0, n_groups - 1);
        s.map.push_back({ g, (int32_t) sizes[g]++ });
    }
    for (int64_t size : sizes) {
        const bool is_large = n_cols % 256 == 0 && input.ConsumeBool();
        s.groups.push_back({ is_large ? input.PickValueInArray(LARGE_BLOCKS) : input.PickValueInArray(SMALL_BLOCKS),
            { n_cols, n_rows, size }, {} });
    }
    s.map_tensor = { GGML_TYPE_I32, { 2, n_expert }, {} };
    return s;
}

void put_fault_in(FuzzedDataProvider & input, stack & s) {
    expert_place & place = s.map[input.ConsumeIntegralInRange<size_t>(0, s.map.size() - 1)];
    tensor       & group = s.groups[input.ConsumeIntegralInRange<size_t>(0, s.groups.size() - 1)];
    switch (input.ConsumeIntegralInRange<int>(0, 9)) {
        case 0: place.group    = input.ConsumeIntegral<int32_t>(); break;
        case 1: place.position = input.ConsumeIntegral<int32_t>(); break;
        case 2: place.group    = input.ConsumeIntegralInRange<int32_t>(-1, GGML_MC_MAX_GROUPS + 1); break;
        case 3: place.position = input.ConsumeIntegralInRange<int32_t>(-1, 9); break;
        case 4: group.type     = input.ConsumeIntegralInRange<int>(-1, GGML_TYPE_COUNT + 1); break;
        case 5: group.ne[input.ConsumeIntegralInRange<int>(0, 2)] = input.ConsumeIntegralInRange<int64_t>(-1, 300); break;
        case 6: s.map_tensor.type = input.ConsumeIntegralInRange<int>(-1, GGML_TYPE_COUNT + 1); break;
        case 7: s.map_tensor.ne[input.ConsumeIntegralInRange<int>(0, 1)] = input.ConsumeIntegralInRange<int64_t>(-1, 20); break;
        case 8: s.is_stored_whole = true; break;
        case 9: s.gap = input.ConsumeIntegralInRange<int>(0, (int) s.groups.size() - 1); break;
    }
}

bool is_one_of(int type, const ggml_type * types, size_t n) {
    return std::find(types, types + n, (ggml_type) type) != types + n;
}

enum class expected { loads, either, refused };

// What must happen to a file with this stack.
expected outcome_of(const stack & s) {
    const int64_t n_expert = (int64_t) s.map.size();
    if (s.map_tensor.type != GGML_TYPE_I32 || s.map_tensor.ne != std::vector<int64_t> { 2, n_expert } || s.is_stored_whole || s.gap >= 0) {
        return expected::refused;
    }
    bool is_usual = true;
    std::map<std::pair<int32_t, int32_t>, int> taken;
    int64_t n_places = 0;
    for (const tensor & group : s.groups) {
        if (group.ne[0] != s.n_cols || group.ne[1] != s.n_rows || group.type == GGML_TYPE_I32 || !group.has_size()) {
            return expected::refused;
        }
        is_usual = is_usual && group.ne[2] > 0 && (is_one_of(group.type, SMALL_BLOCKS, std::size(SMALL_BLOCKS)) ||
                                                   is_one_of(group.type, LARGE_BLOCKS, std::size(LARGE_BLOCKS)));
        n_places += group.ne[2];
    }
    for (const expert_place & place : s.map) {
        if (place.group < 0 || place.group >= (int32_t) s.groups.size() || place.position < 0 ||
            place.position >= s.groups[place.group].ne[2] || taken[{ place.group, place.position }]++ > 0) {
            return expected::refused;
        }
    }
    if (n_places != n_expert) {
        return expected::refused;
    }
    return is_usual ? expected::loads : expected::either;
}

void add(FuzzedDataProvider & input, gguf_file & file, stack & s) {
    if (s.is_stored_whole) {
        file.add(s.name, { s.n_cols, s.n_rows, (int64_t) s.map.size() });
    }
    append(s.map_tensor.data, s.map.data(), s.map.size()*sizeof(expert_place));
    s.map_tensor.data.resize(s.map_tensor.n_bytes());
    file.tensors.emplace_back(s.name + ".map", s.map_tensor);
    const uint8_t seed = input.ConsumeIntegral<uint8_t>();
    for (size_t g = 0; g < s.groups.size(); ++g) {
        tensor & group = s.groups[g];
        group.data.resize(group.n_bytes());
        for (size_t i = 0; i < group.data.size(); ++i) {
            group.data[i] = (uint8_t) ((i + seed)*2654435761u >> 11);
        }
        if ((int) g != s.gap) {
            file.tensors.emplace_back(s.name + "." + std::to_string(g), group);
        }
    }
}

template <typename function> function * guarded(function * unguarded, const char * name) {
    const mc_function found = mc_guarded(name);
    return found ? (function *) found : unguarded;
}

#define GUARDED(name) guarded(name, #name)

[[noreturn]] void wrong(const char * what) {
    fprintf(stderr, "fuzz-expert-groups: %s\n", what);
    abort();
}

void compute(FuzzedDataProvider & input, llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 32;
    params.n_batch         = 8;
    params.n_ubatch        = input.ConsumeIntegralInRange<int>(1, 8);
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    llama_context * ctx = GUARDED(llama_init_from_model)(model, params);
    if (!ctx) {
        wrong("no context");
    }
    llama_token tokens[] = { 1, 2, 3, 7, 0 };
    if (GUARDED(llama_decode)(ctx, llama_batch_get_one(tokens, std::size(tokens))) != 0 || mc_error()) {
        wrong("llama_decode failed");
    }
    llama_free(ctx);
}

// Loads the file, and computes when it loads; returns whether it did.
bool runs(FuzzedDataProvider & input, const std::vector<uint8_t> & bytes, bool check_tensors) {
    const int memory = memfd_create("fuzz", 0);
    if (memory < 0 || write(memory, bytes.data(), bytes.size()) != (ssize_t) bytes.size()) {
        wrong("no memory for the file");
    }
    llama_model_params params = llama_model_default_params();
    params.load_mode       = input.ConsumeBool() ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    params.check_tensors   = check_tensors;
    params.use_extra_bufts = input.ConsumeBool();
    llama_model * model = GUARDED(llama_model_load_from_file)(("/proc/self/fd/" + std::to_string(memory)).c_str(), params);
    const bool    loaded = model != nullptr;
    if (loaded) {
        compute(input, model);
        llama_model_free(model);
    }
    close(memory);
    return loaded;
}

} // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    FuzzedDataProvider input(data, size);
    const int64_t n_embd   = input.ConsumeBool() ? 256 : 32;
    const int64_t n_expert = input.ConsumeIntegralInRange<int64_t>(1, GGML_MC_MAX_GROUPS + 1);

    std::vector<stack> stacks = {
        make_stack(input, "blk.0.ffn_gate_exps.weight", n_embd, N_FF, n_expert),
        make_stack(input, "blk.0.ffn_up_exps.weight",   n_embd, N_FF, n_expert),
        make_stack(input, "blk.0.ffn_down_exps.weight", N_FF, n_embd, n_expert),
    };
    for (int i = input.ConsumeIntegralInRange<int>(0, 4); i > 0; --i) {
        put_fault_in(input, stacks[input.ConsumeIntegralInRange<size_t>(0, stacks.size() - 1)]);
    }
    expected outcome = expected::loads;
    for (const stack & s : stacks) {
        outcome = std::max(outcome, outcome_of(s));
    }

    gguf_file file;
    file.set("general.architecture", std::string("llama"));
    file.set("llama.block_count", 1u);
    file.set("llama.context_length", 64u);
    file.set("llama.embedding_length", (uint32_t) n_embd);
    file.set("llama.feed_forward_length", (uint32_t) N_FF);
    file.set("llama.attention.head_count", 1u);
    file.set("llama.attention.layer_norm_rms_epsilon", 1e-5f);
    file.set("llama.vocab_size", (uint32_t) N_VOCAB);
    file.set("llama.expert_count", (uint32_t) n_expert);
    file.set("llama.expert_used_count", input.ConsumeIntegralInRange<uint32_t>(1, n_expert));
    file.set("tokenizer.ggml.model", std::string("no_vocab"));
    if (const uint32_t version = input.ConsumeIntegralInRange<uint32_t>(0, 9); version > 1) {
        file.set("mc_gguf.version", 1u);
    } else if (version == 1) {
        file.set("mc_gguf.version", input.ConsumeIntegralInRange<uint32_t>(2, 9));
        outcome = expected::refused;
    } else {
        outcome = expected::refused;
    }
    file.add("token_embd.weight", { n_embd, N_VOCAB });
    file.add("output_norm.weight", { n_embd });
    file.add("output.weight", { n_embd, N_VOCAB });
    file.add("blk.0.attn_norm.weight", { n_embd });
    for (const char * name : { "attn_q", "attn_k", "attn_v", "attn_output" }) {
        file.add(std::string("blk.0.") + name + ".weight", { n_embd, n_embd });
    }
    file.add("blk.0.ffn_norm.weight", { n_embd });
    file.add("blk.0.ffn_gate_inp.weight", { n_embd, n_expert });
    for (stack & s : stacks) {
        add(input, file, s);
    }

    std::vector<uint8_t> bytes = file.bytes();
    if (input.ConsumeIntegralInRange<int>(0, 9) == 0) {
        bytes.resize(bytes.size() - input.ConsumeIntegralInRange<size_t>(32, bytes.size())); // more than the padding
        outcome = expected::refused;
    }
    const bool check_tensors = input.ConsumeBool();
    if (check_tensors && outcome == expected::loads) {
        outcome = expected::either; // the blocks are random, their scales may be infinite
    }
    const bool ran = runs(input, bytes, check_tensors);
    if (outcome == expected::loads && !ran) {
        wrong("a file that follows the format was refused");
    }
    if (outcome == expected::refused && ran) {
        wrong("a file that violates the format was loaded");
    }
    return 0;
}
