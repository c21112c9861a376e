// CPU implementation of MUL_MAT_ID_GROUPED.
//
// Same arithmetic as ggml_compute_forward_mul_mat_id: per output element the same vec_dot (or tiled kernel) on the same
// operands, so the results are equal bit for bit. The differences:
//   - activations are quantized once per vec_dot type of the op, not once per group, and not at all for skipped slots;
//   - the routed slots are sorted by expert into one list (n_slots entries, not n_expert * n_slots);
//   - the row chunks of all experts share one counter, so threads are balanced over the whole op and not within each expert.
// Rows are prefetched as in MUL_MAT_ID.

#include "ggml-mc-cpu.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml-mc.h"
#include "tiled/tiled.h"

#include <algorithm>
#include <cstring>

namespace {

#if defined(_MSC_VER)
#define NO_INLINE __declspec(noinline)
#else
#define NO_INLINE __attribute__((noinline))
#endif

constexpr size_t CACHE_LINE = 64;

// a routed slot, in the layout that the tiled kernel expects
struct routed_slot {
    int32_t slot;  // index into ids->ne[0]
    int32_t token; // index into ids->ne[1]
};

struct map_entry {
    int32_t group;
    int32_t position;
};

// activations in the format that a group's vec_dot reads
struct activations {
    const char * data;
    size_t       nb1; // bytes from one slot to the next
    size_t       nb2; // bytes from one token to the next
};

// distinct vec_dot types of the groups
struct vec_dot_types {
    ggml_type type[GGML_MC_MAX_GROUPS];
    int       n = 0;
    int       of_group[GGML_MC_MAX_GROUPS];

    explicit vec_dot_types(const ggml_tensor * dst) {
        for (int g = 0; g < ggml_mc_n_groups(dst); ++g) {
            const ggml_type vdt = ggml_get_type_traits_cpu(ggml_mc_group(dst, g)->type)->vec_dot_type;
            int i = 0;
            while (i < n && type[i] != vdt) {
                ++i;
            }
            if (i == n) {
                type[n++] = vdt;
            }
            of_group[g] = i;
        }
    }
};

// hands out aligned pieces of the work buffer; without a base it only adds up their sizes
struct arena {
    char * base;
    size_t used = 0;

    char * take(size_t size, size_t align) {
        used = GGML_PAD(used, align);
        char * ptr = base ? base + used : nullptr;
        used += size;
        return ptr;
    }
};

struct workspace {
    char *        quantized[GGML_MC_MAX_GROUPS]; // per vec_dot type that differs from b's: [ne12][ne11] rows
    int32_t *     first;                         // [n_expert + 1] where an expert's slots begin in `slots`
    int32_t *     cursor;                        // [n_expert] scratch of the counting sort
    routed_slot * slots;                         // [n_ids * n_tokens] sorted by expert
    char *        tiled;                         // per-thread scratch of the tiled kernel
    size_t        size;

    // The buffer is aligned to a cache line here: ggml promises no alignment of wdata.
    workspace(const ggml_tensor * dst, const vec_dot_types & vdts, int64_t n_expert, int n_tasks, void * wdata) {
        const ggml_tensor * b   = dst->src[1];
        const ggml_tensor * ids = dst->src[2];

        char * aligned = wdata ? (char *) GGML_PAD((uintptr_t) wdata, CACHE_LINE) : nullptr;
        arena  mem { aligned };

        for (int i = 0; i < vdts.n; ++i) {
            quantized[i] = b->type == vdts.type[i] ? nullptr :
                mem.take(ggml_row_size(vdts.type[i], b->ne[0]) * b->ne[1] * b->ne[2], CACHE_LINE);
        }
        first  = (int32_t *)     mem.take(sizeof(int32_t) * (n_expert + 1), CACHE_LINE);
        cursor = (int32_t *)     mem.take(sizeof(int32_t) * n_expert, sizeof(int32_t));
        slots  = (routed_slot *) mem.take(sizeof(routed_slot) * ids->ne[0] * ids->ne[1], sizeof(int64_t));

        size_t tiled_size = 0;
        for (int g = 0; g < ggml_mc_n_groups(dst); ++g) {
            ggml_tensor one = *dst;
            one.src[0] = const_cast<ggml_tensor *>(ggml_mc_group(dst, g));
            tiled_size = std::max(tiled_size, ggml_tiled_wdata_size(n_tasks, &one));
        }
        tiled = mem.take(tiled_size, 64);
        size  = mem.used + CACHE_LINE;
    }
};

int64_t n_expert_of(const ggml_tensor * dst) {
    return dst->src[3] ? dst->src[3]->ne[1] : dst->src[0]->ne[2];
}

map_entry locate(const ggml_tensor * dst, int64_t expert) {
    const ggml_tensor * map = dst->src[3];
    const map_entry at = map ? ((const map_entry *) map->data)[expert] : map_entry { 0, (int32_t) expert };
    GGML_ASSERT(at.group    >= 0 && at.group    < ggml_mc_n_groups(dst));
    GGML_ASSERT(at.position >= 0 && at.position < ggml_mc_group(dst, at.group)->ne[2]);
    return at;
}

int32_t id_at(const ggml_tensor * ids, int64_t slot, int64_t token) {
    return *(const int32_t *) ((const char *) ids->data + token*ids->nb[1] + slot*ids->nb[0]);
}

// Counting sort of the slots by expert; skipped slots are left out.
void sort_slots(const ggml_tensor * ids, int64_t n_expert, const workspace & ws) {
    memset(ws.cursor, 0, sizeof(int32_t) * n_expert);
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            const int32_t id = id_at(ids, slot, token);
            if (id >= 0 && id < n_expert) {
                ws.cursor[id]++;
            }
        }
    }
    ws.first[0] = 0;
    for (int64_t e = 0; e < n_expert; ++e) {
        ws.first[e + 1] = ws.first[e] + ws.cursor[e];
        ws.cursor[e]    = ws.first[e];
    }
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            const int32_t id = id_at(ids, slot, token);
            if (id >= 0 && id < n_expert) {
                ws.slots[ws.cursor[id]++] = { (int32_t) slot, (int32_t) token };
            }
        }
    }
}

void zero_skipped(const ggml_compute_params * params, ggml_tensor * dst, int64_t n_expert) {
    const ggml_tensor * ids = dst->src[2];
    for (int64_t i = params->ith; i < ids->ne[0]*ids->ne[1]; i += params->nth) {
        const int64_t slot  = i % ids->ne[0];
        const int64_t token = i / ids->ne[0];
        const int32_t id    = id_at(ids, slot, token);
        if (id < 0 || id >= n_expert) {
            memset((char *) dst->data + slot*dst->nb[1] + token*dst->nb[2], 0, dst->ne[0]*sizeof(float));
        }
    }
}

// One row of b in vec_dot type `vdt`, the blocks of the row split over the threads as MUL_MAT_ID does.
void quantize_row_part(const ggml_compute_params * params, const ggml_tensor * b, ggml_type vdt, const char * row, char * out) {
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(vdt)->from_float;
    const int64_t bs    = ggml_blck_size(vdt);
    const int64_t begin = (params->ith       * (b->ne[0]/bs)) / params->nth;
    const int64_t end   = ((params->ith + 1) * (b->ne[0]/bs)) / params->nth;

    from_float((const float *) (row + begin*bs*b->nb[0]), out + begin*ggml_type_size(vdt), (end - begin)*bs);
}

void quantize_activations(const ggml_compute_params * params, const ggml_tensor * dst, const vec_dot_types & vdts, int64_t n_expert, const workspace & ws) {
    const ggml_tensor * b   = dst->src[1];
    const ggml_tensor * ids = dst->src[2];
    // with one row of b per slot, the rows of skipped slots and those of other vec_dot types are not needed
    const bool per_slot = b->ne[1] == ids->ne[0];

    for (int i = 0; i < vdts.n; ++i) {
        if (!ws.quantized[i]) {
            continue;
        }
        const size_t row_size = ggml_row_size(vdts.type[i], b->ne[0]);
        for (int64_t i2 = 0; i2 < b->ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < b->ne[1]; ++i1) {
                if (per_slot) {
                    const int32_t id = id_at(ids, i1, i2);
                    if (id < 0 || id >= n_expert || vdts.of_group[locate(dst, id).group] != i) {
                        continue;
                    }
                }
                quantize_row_part(params, b, vdts.type[i],
                        (const char *) b->data + i1*b->nb[1] + i2*b->nb[2],
                        ws.quantized[i] + (i1 + i2*b->ne[1])*row_size);
            }
        }
    }
}

// rows [ir0, ir0_end) of one expert's matrix times its routed activations [ir1, ir1_end)
// Not inlined: in the frame of its caller IQ3_XXS decodes 4 % slower (see LOG.md).
NO_INLINE void one_chunk(ggml_tensor * dst, const ggml_tensor * group, const char * matrix, const activations & act,
               const routed_slot * slots, int64_t ir0, int64_t ir0_end, int64_t ir1, int64_t ir1_end) {
    const ggml_vec_dot_t vec_dot = ggml_get_type_traits_cpu(group->type)->vec_dot;
    const int64_t ne11 = dst->src[1]->ne[1];
    const int64_t cols = group->ne[0];
    const size_t  nb01 = group->nb[1];

    const int64_t blck = 16;

    for (int64_t iir1 = ir1; iir1 < ir1_end; iir1 += blck) {
        for (int64_t iir0 = ir0; iir0 < ir0_end; iir0 += blck) {
            const int64_t n0 = std::min(blck, ir0_end - iir0);
            for (int64_t i = iir1; i < std::min(iir1 + blck, ir1_end); ++i) {
                const char * b_row   = act.data + (slots[i].slot % ne11)*act.nb1 + slots[i].token*act.nb2;
                float *      dst_row = (float *) ((char *) dst->data + slots[i].slot*dst->nb[1] + slots[i].token*dst->nb[2]);
                for (int64_t j = iir0; j < iir0 + n0; ++j) {
                    if (i == ir1 && j + GGML_CPU_PREFETCH_ROWS < ir0_end) {
                        ggml_cpu_prefetch(matrix + (j + GGML_CPU_PREFETCH_ROWS)*nb01, nb01);
                    }
                    vec_dot(cols, dst_row + j, 0, matrix + j*nb01, 0, b_row, 0, 1);
                }
            }
        }
    }
}

// how the rows x slots of one expert are cut; the sizes are those of MUL_MAT_ID
struct chunking {
    int64_t n0, n1; // number of chunks
    int64_t d0, d1; // rows, slots per chunk

    chunking(int64_t nr0, int64_t nr1, int nth) {
        const int64_t size = nr0 == 1 || nr1 == 1 ? 64 : 16;
        n0 = (nr0 + size - 1)/size;
        n1 = (nr1 + size - 1)/size;
        if (ggml_is_numa()) {
            n0 = nr0 > nr1 ? nth : 1;
            n1 = nr0 > nr1 ? 1 : nth;
        }
        d0 = (nr0 + n0 - 1)/n0;
        d1 = (nr1 + n1 - 1)/n1;
    }
};

} // namespace

bool ggml_mc_mul_mat_id_grouped_supported(const ggml_tensor * dst) {
    const ggml_tensor * b = dst->src[1];
    for (int g = 0; g < ggml_mc_n_groups(dst); ++g) {
        const ggml_tensor * group  = ggml_mc_group(dst, g);
        const auto *        traits = ggml_get_type_traits_cpu(group->type);
        if (traits->vec_dot == nullptr || group->nb[0] != ggml_type_size(group->type)) {
            return false;
        }
        if (b->type != traits->vec_dot_type &&
                (b->type != GGML_TYPE_F32 || ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float == nullptr)) {
            return false;
        }
        // repacked layouts have kernels of their own
        if (group->buffer && !ggml_backend_buft_is_host(group->buffer->buft)) {
            return false;
        }
    }
    return b->nb[0] == ggml_type_size(b->type);
}

size_t ggml_mc_mul_mat_id_grouped_work_size(int n_tasks, const ggml_tensor * dst) {
    return workspace(dst, vec_dot_types(dst), n_expert_of(dst), n_tasks, nullptr).size;
}

void ggml_compute_forward_mul_mat_id_grouped(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * b = dst->src[1];

    GGML_ASSERT(dst->nb[0] == sizeof(float));

    const int     nth      = params->nth;
    const int64_t n_expert = n_expert_of(dst);

    const vec_dot_types vdts(dst);
    const workspace     ws(dst, vdts, n_expert, nth, params->wdata);
    GGML_ASSERT(params->wsize >= ws.size);

    zero_skipped(params, dst, n_expert);
    quantize_activations(params, dst, vdts, n_expert, ws);
    if (params->ith == 0) {
        sort_slots(dst->src[2], n_expert, ws);
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);

    // chunks are numbered through all experts; `begin` is the first number of the current one
    int64_t begin = 0;
    int64_t chunk = params->ith;

    for (int64_t e = 0; e < n_expert; ++e) {
        const routed_slot * slots = ws.slots + ws.first[e];
        const int64_t       nr1   = ws.first[e + 1] - ws.first[e];
        if (nr1 == 0) {
            continue;
        }

        const map_entry     at    = locate(dst, e);
        const ggml_tensor * group = ggml_mc_group(dst, at.group);

        const ggml_type vdt = vdts.type[vdts.of_group[at.group]];
        const size_t    row = ggml_row_size(vdt, b->ne[0]);
        char *          q   = ws.quantized[vdts.of_group[at.group]];
        const activations act = q ?
            activations { q, row, row*b->ne[1] } :
            activations { (const char *) b->data, b->nb[1], b->nb[2] };

        // the tiled kernel sees an ordinary MUL_MAT_ID on this group
        ggml_tensor         one   = *dst;
        ggml_compute_params tiled = *params;
        one.src[0]  = const_cast<ggml_tensor *>(group);
        tiled.wdata = q;
        if (ggml_compute_forward_mul_mat_id_tiled(&tiled, &one, at.position, nr1, (const int32_t *) slots, ws.tiled)) {
            continue;
        }

        const char *   matrix = (const char *) group->data + at.position*group->nb[2];
        const int64_t  nr0    = group->ne[1];
        const chunking cut(nr0, nr1, nth);

        for (; chunk < begin + cut.n0*cut.n1; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            const int64_t ir0 = cut.d0*((chunk - begin) % cut.n0);
            const int64_t ir1 = cut.d1*((chunk - begin) / cut.n0);
            one_chunk(dst, group, matrix, act, slots,
                    ir0, std::min(ir0 + cut.d0, nr0), ir1, std::min(ir1 + cut.d1, nr1));
        }
        begin += cut.n0*cut.n1;
    }
}
