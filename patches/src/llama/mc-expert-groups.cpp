#include "mc-expert-groups.h"

#include "ggml-mc.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

const char * const SUFFIX_MAP  = "weight.map";
const char * const KEY_VERSION = "mc_gguf.version";
const uint32_t     VERSION     = 1;

struct map_entry {
    int32_t group;
    int32_t position;
};

std::string part_name(const LLM_TN_IMPL & tn, const std::string & suffix) {
    return LLM_TN_IMPL(tn.arch, tn.tensor, suffix.c_str(), tn.bid, tn.xid).str();
}

bool is_weight(const char * suffix) {
    return suffix != nullptr && strcmp(suffix, "weight") == 0;
}

[[noreturn]] void fail(const std::string & name, const std::string & what) {
    throw std::runtime_error(format("mixed-expert GGUF: tensor '%s' %s", name.c_str(), what.c_str()));
}

void check_version(llama_model_loader & ml) {
    uint32_t version = 0;
    if (!ml.get_key(std::string(KEY_VERSION), version, false)) {
        throw std::runtime_error(format("mixed-expert GGUF: key '%s' is missing", KEY_VERSION));
    }
    if (version != VERSION) {
        throw std::runtime_error(format("mixed-expert GGUF: key '%s' is %u, this build reads %u", KEY_VERSION, version, VERSION));
    }
}

std::vector<map_entry> read_map(const llama_model_loader & ml, const std::string & name, int64_t n_expert) {
    const auto & weight = ml.require_weight(name.c_str());
    const ggml_tensor * t = weight.tensor;
    if (t->type != GGML_TYPE_I32 || t->ne[0] != 2 || t->ne[1] != n_expert || t->ne[2] != 1 || t->ne[3] != 1) {
        fail(name, format("must be I32 of shape [2, %lld]", (long long) n_expert));
    }
    std::vector<map_entry> map(n_expert);
    const auto & file = ml.files.at(weight.idx);
    file->seek(weight.offs, SEEK_SET);
    file->read_raw(map.data(), ggml_nbytes(t));
    return map;
}

// every (group, position) belongs to exactly one expert
void check_map(const std::string & name, const std::vector<map_entry> & map, const std::vector<int64_t> & group_sizes) {
    std::vector<std::vector<bool>> taken;
    int64_t n_places = 0;
    for (int64_t size : group_sizes) {
        taken.emplace_back(size, false);
        n_places += size;
    }
    for (size_t e = 0; e < map.size(); ++e) {
        const auto & at = map[e];
        if (at.group < 0 || at.group >= (int32_t) taken.size() || at.position < 0 || at.position >= group_sizes[at.group]) {
            fail(name, format("sends expert %zu to group %d, position %d, which does not exist", e, at.group, at.position));
        }
        if (taken[at.group][at.position]) {
            fail(name, format("sends two experts to group %d, position %d", at.group, at.position));
        }
        taken[at.group][at.position] = true;
    }
    if (n_places != (int64_t) map.size()) {
        fail(name, format("has %zu experts, the groups hold %lld", map.size(), (long long) n_places));
    }
}

ggml_context * stacks_context(llama_model_loader & ml) {
    if (!ml.mc_stacks) {
        ggml_init_params params = {
            /*.mem_size   =*/ ggml_tensor_overhead()*(ml.n_tensors + 1),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };
        ml.mc_stacks.reset(ggml_init(params));
        if (!ml.mc_stacks) {
            throw std::runtime_error("failed to create ggml context for expert groups");
        }
    }
    return ml.mc_stacks.get();
}

} // namespace

bool mc_has_expert_groups(const llama_model_loader & ml, const LLM_TN_IMPL & tn) {
    return is_weight(tn.suffix) && ml.get_weight(part_name(tn, SUFFIX_MAP).c_str()) != nullptr;
}

bool mc_is_expert_group_part(const char * suffix) {
    return suffix != nullptr && strncmp(suffix, "weight.", strlen("weight.")) == 0;
}

ggml_tensor * mc_create_expert_groups(
        llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne, const mc_create_part & create) {
    const std::string name = tn.str();
    check_version(ml);
    if (ml.get_weight(name.c_str())) {
        fail(name, "is stored both whole and in groups");
    }
    if (ne.size() != 3) {
        fail(name, "is not a stack of experts, it cannot be stored in groups");
    }
    const int64_t n_cols   = ne.begin()[0];
    const int64_t n_rows   = ne.begin()[1];
    const int64_t n_expert = ne.begin()[2];

    const std::string map_name = part_name(tn, SUFFIX_MAP);
    const auto map = read_map(ml, map_name, n_expert);

    std::vector<ggml_tensor *> parts  = { create(SUFFIX_MAP, { 2, n_expert }) };
    std::vector<int64_t>       sizes;
    for (int g = 0; ; ++g) {
        const std::string suffix = format("weight.%d", g);
        const auto * meta = ml.get_tensor_meta(part_name(tn, suffix).c_str());
        if (!meta) {
            break;
        }
        if (g == GGML_MC_MAX_GROUPS) {
            fail(name, format("has more than %d groups", GGML_MC_MAX_GROUPS));
        }
        if (meta->type == GGML_TYPE_I32) {
            fail(part_name(tn, suffix), "is I32, which is not a type of weights");
        }
        sizes.push_back(meta->ne[2]);
        parts.push_back(create(suffix.c_str(), { n_cols, n_rows, meta->ne[2] }));
    }
    check_map(map_name, map, sizes);

    if (!parts[0]) {
        return nullptr; // the model code asked to skip this tensor, and with it all of its parts
    }
    ggml_tensor * stack = ggml_new_tensor_3d(stacks_context(ml), GGML_TYPE_F32, n_cols, n_rows, n_expert);
    ggml_set_name(stack, name.c_str());
    std::copy(parts.begin(), parts.end(), stack->src);
    return stack;
}

void mc_register_expert_groups(ggml_context * stacks, std::vector<std::pair<std::string, ggml_tensor *>> & tensors_by_name) {
    for (ggml_tensor * t = stacks ? ggml_get_first_tensor(stacks) : nullptr; t; t = ggml_get_next_tensor(stacks, t)) {
        tensors_by_name.emplace_back(ggml_get_name(t), t);
    }
}

void mc_adopt_buffers(ggml_context * stacks) {
    for (ggml_tensor * t = stacks ? ggml_get_first_tensor(stacks) : nullptr; t; t = ggml_get_next_tensor(stacks, t)) {
        t->buffer = t->src[1]->buffer;
    }
}

ggml_tensor * mc_mul_mat_id_grouped_probe(ggml_context * ctx, ggml_tensor * part, int64_t n_expert_used) {
    const bool    is_map   = part->type == GGML_TYPE_I32;
    const int64_t n_expert = is_map ? part->ne[1] : part->ne[2];
    const int64_t n_tokens = 512;

    ggml_tensor * group = is_map ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 256, 256, n_expert) : part;
    ggml_tensor * map   = is_map ? part : ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, n_expert);
    ggml_tensor * b     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, group->ne[0], n_expert_used, n_tokens);
    ggml_tensor * ids   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_expert_used, n_tokens);

    return ggml_mul_mat_id_grouped(ctx, &group, 1, map, b, ids);
}

bool mc_is_grouped_stack(const ggml_tensor * w) {
    return w->op == GGML_OP_NONE && w->src[0] != nullptr;
}

ggml_tensor * mc_mul_mat_id(ggml_context * ctx, ggml_tensor * w, ggml_tensor * b, ggml_tensor * ids) {
    if (!mc_is_grouped_stack(w)) {
        return ggml_mul_mat_id(ctx, w, b, ids);
    }
    int n_groups = 0;
    while (n_groups < GGML_MC_MAX_GROUPS && w->src[1 + n_groups]) {
        ++n_groups;
    }
    return ggml_mul_mat_id_grouped(ctx, &w->src[1], n_groups, w->src[0], b, ids);
}
