// CPU implementation of the ops of dynamic expert routing (ggml-mc-routing.h).

#include "ggml-mc-cpu.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ggml-mc-routing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

int32_t token_field(const ggml_tensor * tokens, int64_t token, ggml_mc_token_field field) {
    return ((const int32_t *) tokens->data)[token*GGML_MC_TOKEN_N_FIELDS + field];
}

// the token that a row of a MoE block belongs to
int64_t token_of(const ggml_tensor * rows, const ggml_tensor * tokens, int64_t row) {
    const int64_t token = rows ? *(const int32_t *) ((const char *) rows->data + row*rows->nb[0]) : row;
    GGML_ASSERT(token >= 0 && token < tokens->ne[1]);
    return token;
}

// [begin, end) of n items that are this thread's
std::pair<int64_t, int64_t> share_of(const ggml_compute_params * params, int64_t n) {
    return { n*params->ith/params->nth, n*(params->ith + 1)/params->nth };
}

int64_t cell_of(const ggml_tensor * cells, int64_t token, int64_t cells_per_stream) {
    if (!cells) {
        return token;
    }
    const int64_t cell = cells->type == GGML_TYPE_I64 ? ((const int64_t *) cells->data)[token] : ((const int32_t *) cells->data)[token];
    return cell % cells_per_stream;
}

float measure_row(const float * x, int64_t n, ggml_mc_measure measure) {
    double sum = 0.0, sum_abs = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum     += x[i];
        sum_abs += std::fabs(x[i]);
    }
    const double mean = sum/n;
    if (measure == GGML_MC_MEASURE_MEAN) {
        return (float) mean;
    }
    if (measure != GGML_MC_MEASURE_VARIANCE && measure != GGML_MC_MEASURE_KURTOSIS) {
        return (float) sum_abs;
    }
    double m2 = 0.0, m4 = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const double d2 = (x[i] - mean)*(x[i] - mean);
        m2 += d2;
        m4 += d2*d2;
    }
    m2 /= n;
    m4 /= n;
    if (measure == GGML_MC_MEASURE_VARIANCE) {
        return (float) m2;
    }
    return m2 > 0.0 ? (float) (m4/(m2*m2)) : 0.0f;
}

// the output function of splitmix64
uint64_t mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27))*0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// uniform in [0, 1), from what identifies a slot
double random_of(uint32_t seed, int32_t layer, int32_t pos, int32_t rank) {
    uint64_t z = 0;
    for (uint64_t part : { (uint64_t) seed, (uint64_t) layer, (uint64_t) pos, (uint64_t) rank }) {
        z = mix(z ^ part);
    }
    return (double) (z >> 11)*0x1.0p-53;
}

// the decision for one row
struct row_router {
    const ggml_mc_route_params & params;
    const float *                thresholds;
    std::vector<int32_t>         slots; // slots[rank]: by falling weight
    std::vector<bool>            below; // below[rank]: the policy alone would drop it

    row_router(const ggml_mc_route_params & params, const float * thresholds, int64_t n_used) :
        params(params), thresholds(thresholds), slots(n_used), below(n_used) {}

    void run(const float * w, int32_t pos) {
        const int n_used = (int) slots.size();
        std::iota(slots.begin(), slots.end(), 0);
        const auto key = [w](int32_t slot) { return std::isnan(w[slot]) ? -INFINITY : w[slot]; };
        std::stable_sort(slots.begin(), slots.end(), [&key](int32_t a, int32_t b) { return key(a) > key(b); });

        const float  first = w[slots[0]];
        const double total = std::accumulate(w, w + n_used, 0.0);
        double       sum   = 0.0; // of the ranks before
        for (int r = 0; r < n_used; ++r) {
            const float weight = w[slots[r]];
            switch (params.policy) {
                case GGML_MC_POLICY_COUNT_ONLY: below[r] = false;                                                      break;
                case GGML_MC_POLICY_THRESHOLD:  below[r] = weight < thresholds[r]*first;                               break;
                case GGML_MC_POLICY_KEEP_MIN:   below[r] = r >= params.keep_min && weight < params.value*first;        break;
                case GGML_MC_POLICY_TOP_P:      below[r] = sum >= params.value*total;                                  break;
                case GGML_MC_POLICY_RANDOM:     below[r] = random_of(params.seed, params.layer, pos, r) < params.value; break;
            }
            sum += weight;
        }
        below[0] = false;
    }
};

// rows whose tokens keep all experts
std::vector<bool> protected_rows(const ggml_tensor * dst, double share) {
    const ggml_tensor * tokens     = dst->src[1];
    const ggml_tensor * rows       = dst->src[2];
    const ggml_tensor * importance = dst->src[4];
    const int64_t       n_rows     = dst->ne[1];

    std::vector<bool> result(n_rows, share >= 1.0);
    if (share >= 1.0 || share <= 0.0 || !importance) {
        return result;
    }
    // NaN has no order; a token that gives one is not worth protecting
    std::vector<float> value((const float *) importance->data, (const float *) importance->data + n_rows);
    for (float & v : value) {
        v = std::isnan(v) ? -INFINITY : v;
    }
    struct entry { int32_t seq; int64_t row; };
    std::vector<entry> order(n_rows);
    for (int64_t i = 0; i < n_rows; ++i) {
        order[i] = { token_field(tokens, token_of(rows, tokens, i), GGML_MC_TOKEN_SEQ), i };
    }
    std::sort(order.begin(), order.end(), [&value](const entry & a, const entry & b) {
        if (a.seq != b.seq)               return a.seq < b.seq;
        if (value[a.row] != value[b.row]) return value[a.row] > value[b.row];
        return a.row < b.row;
    });
    for (int64_t begin = 0; begin < n_rows; ) {
        int64_t end = begin;
        while (end < n_rows && order[end].seq == order[begin].seq) {
            ++end;
        }
        const int64_t n = end - begin;
        // ceil of what is meant: share*n may be off by the rounding of share
        const int64_t n_protected = n == 1 ? 0 : (int64_t) std::ceil(share*n - 1e-9*n);
        for (int64_t i = 0; i < n_protected; ++i) {
            result[order[begin + i].row] = true;
        }
        begin = end;
    }
    return result;
}

} // namespace

// Every thread sums some of the columns over all heads and queries: the order, and so the result, does not depend on the
// number of threads.
void ggml_compute_forward_mc_attn_received(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * probs  = dst->src[0];
    const ggml_tensor * tokens = dst->src[1];
    const ggml_tensor * cells  = dst->src[2];

    const int64_t n_tokens         = dst->ne[0];
    const int64_t n_queries        = probs->ne[1]; // in a stream
    const int64_t n_head           = probs->ne[2];
    const int64_t cells_per_stream = ggml_get_op_params_i32(dst, 0);
    const int64_t n_head_all       = ggml_get_op_params_i32(dst, 1);
    const float * acc              = dst->src[3] ? (const float *) dst->src[3]->data : nullptr;

    float * out = (float *) dst->data;
    const auto [begin, end] = share_of(params, n_tokens);
    std::fill(out + begin, out + end, 0.0f);

    // runs of tokens of one stream in neighbouring cells
    for (int64_t t = begin; t < end; ) {
        const int64_t stream = t/n_queries;
        const int64_t cell   = cell_of(cells, t, cells_per_stream);
        int64_t n = 1;
        while (t + n < end && (t + n)/n_queries == stream && cell_of(cells, t + n, cells_per_stream) == cell + n) {
            ++n;
        }
        GGML_ASSERT(cell >= 0 && cell + n <= probs->ne[0]);
        for (int64_t head = 0; head < n_head; ++head) {
            for (int64_t q = 0; q < n_queries; ++q) {
                const float * p = (const float *) ((const char *) probs->data + stream*probs->nb[3] + head*probs->nb[2] + q*probs->nb[1]) + cell;
                for (int64_t i = 0; i < n; ++i) {
                    out[t + i] += p[i];
                }
            }
        }
        t += n;
    }
    for (int64_t t = begin; t < end; ++t) {
        out[t] = (acc ? acc[t] : 0.0f) + out[t]/(float) (n_head_all*std::max(1, token_field(tokens, t, GGML_MC_TOKEN_QUERIES)));
    }
}

void ggml_compute_forward_mc_importance(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * x        = dst->src[0];
    const ggml_tensor * tokens   = dst->src[1];
    const ggml_tensor * rows     = dst->src[2];
    const ggml_tensor * received = dst->src[3];
    const auto          measure  = (ggml_mc_measure) ggml_get_op_params_i32(dst, 0);

    const auto [begin, end] = share_of(params, dst->ne[0]);
    for (int64_t row = begin; row < end; ++row) {
        float value = measure_row((const float *) ((const char *) x->data + row*x->nb[1]), x->ne[0], measure);
        const int64_t token = token_of(rows, tokens, row);
        if (measure == GGML_MC_MEASURE_ATTENTION && received) {
            value *= ((const float *) received->data)[token];
        }
        if (measure == GGML_MC_MEASURE_LAST) {
            value /= (float) std::max(1, token_field(tokens, token, GGML_MC_TOKEN_QUERIES));
        }
        ((float *) dst->data)[row] = value;
    }
}

void ggml_compute_forward_mc_route(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->ith != 0) {
        return;
    }
    const ggml_tensor * weights  = dst->src[0];
    const ggml_tensor * tokens   = dst->src[1];
    const ggml_tensor * rows     = dst->src[2];
    const ggml_tensor * ids      = dst->src[3];
    const ggml_tensor * counters = dst->src[6];

    const ggml_mc_route_params p = ggml_mc_get_route_params(dst);

    const int64_t n_used = dst->ne[0];
    const int64_t n_rank = (counters->ne[0] - 2*p.n_expert)/3;

    int64_t * n_kept      = (int64_t *) counters->data;
    int64_t * n_dropped   = n_kept      + n_rank;
    int64_t * n_protected = n_dropped   + n_rank;
    int64_t * n_wanted    = n_protected + n_rank;
    int64_t * n_read      = n_wanted    + p.n_expert;

    std::vector<bool> wanted(p.n_expert), read(p.n_expert);
    const std::vector<bool> is_protected = protected_rows(dst, p.protect);
    row_router router(p, (const float *) dst->src[5]->data, n_used);

    for (int64_t row = 0; row < dst->ne[1]; ++row) {
        router.run((const float *) weights->data + row*n_used, token_field(tokens, token_of(rows, tokens, row), GGML_MC_TOKEN_POS));
        int32_t * out = (int32_t *) dst->data + row*n_used;
        for (int64_t r = 0; r < n_used; ++r) {
            const int32_t slot = router.slots[r];
            const int32_t id   = *(const int32_t *) ((const char *) ids->data + row*ids->nb[1] + slot*ids->nb[0]);
            const bool    drop = router.below[r] && !is_protected[row];
            GGML_ASSERT(id >= 0 && id < p.n_expert);

            wanted[id] = true;
            read[id]   = read[id] || !drop || !p.skips;
            if (drop) {
                n_dropped[r]++;
            } else {
                n_kept[r]++;
                n_protected[r] += router.below[r];
            }
            out[slot] = drop ? p.n_expert : id;
        }
    }
    for (int32_t e = 0; e < p.n_expert; ++e) {
        n_wanted[e] += wanted[e];
        n_read[e]   += read[e];
    }
}

void ggml_compute_forward_mc_mask_weights(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * weights   = dst->src[0];
    const ggml_tensor * routed    = dst->src[1];
    const int32_t       n_expert  = ggml_get_op_params_i32(dst, 0);
    const bool          normalize = ggml_get_op_params_i32(dst, 1) != 0;
    const int64_t       n_used    = routed->ne[0];

    const auto [begin, end] = share_of(params, routed->ne[1]);
    for (int64_t row = begin; row < end; ++row) {
        const float *   w   = (const float *) weights->data + row*n_used;
        const int32_t * id  = (const int32_t *) routed->data + row*n_used;
        float *         out = (float *) dst->data + row*n_used;

        float sum  = 0.0f;
        bool  full = true;
        for (int64_t i = 0; i < n_used; ++i) {
            out[i] = id[i] == n_expert ? 0.0f : w[i];
            full  &= id[i] != n_expert;
            sum   += out[i];
        }
        if (normalize && !full && sum > 0.0f) {
            for (int64_t i = 0; i < n_used; ++i) {
                out[i] /= sum;
            }
        }
    }
}
