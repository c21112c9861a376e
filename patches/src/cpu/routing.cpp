// CPU implementation of MC_IMPORTANCE, MC_ROUTE, MC_COUNT and MC_MASK_WEIGHTS (ggml-mc-routing.h).

#include "ggml-mc-cpu.h"

#include "ggml-impl.h"
#include "routing-common.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

// the token that a row of a MoE block belongs to
int64_t token_of(const ggml_tensor * rows, const ggml_tensor * tokens, int64_t row) {
    const int64_t token = rows ? *(const int32_t *) ((const char *) rows->data + row*rows->nb[0]) : row;
    GGML_ASSERT(token >= 0 && token < tokens->ne[1]);
    return token;
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

// uniform in [0, 1), the same for the same slot
double random_of(uint32_t seed, int32_t layer, int32_t pos, int32_t rank) {
    uint64_t z = 0;
    for (uint64_t part : { (uint64_t) seed, (uint64_t) layer, (uint64_t) pos, (uint64_t) rank }) {
        z = mix(z ^ part);
    }
    return (double) (z >> 11)*0x1.0p-53;
}

// decides about the slots of one row
struct row_router {
    const ggml_mc_route_params & params;
    const float *                thresholds;
    std::vector<int32_t>         slots; // slots[rank]: slots in descending order of weight
    std::vector<bool>            below; // below[rank]: whether the policy drops it, protection aside

    row_router(const ggml_mc_route_params & params, const float * thresholds, int64_t n_used) :
        params(params), thresholds(thresholds), slots(n_used), below(n_used) {}

    void run(const float * w, int32_t pos) {
        const int n_used = (int) slots.size();
        std::iota(slots.begin(), slots.end(), 0);
        const auto key = [w](int32_t slot) { return std::isnan(w[slot]) ? -INFINITY : w[slot]; };
        std::stable_sort(slots.begin(), slots.end(), [&key](int32_t a, int32_t b) { return key(a) > key(b); });

        const float  first = w[slots[0]];
        const double total = std::accumulate(w, w + n_used, 0.0);
        double       sum   = 0.0; // of the ranks before r
        for (int r = 0; r < n_used; ++r) {
            const float weight = w[slots[r]];
            switch (params.policy) {
                case GGML_MC_POLICY_OFF:       below[r] = false;                                                       break;
                case GGML_MC_POLICY_ODP:
                case GGML_MC_POLICY_THRESHOLD: below[r] = weight < thresholds[r]*first;                                break;
                case GGML_MC_POLICY_KEEP_MIN:  below[r] = r >= params.keep_min && weight < params.value*first;         break;
                case GGML_MC_POLICY_TOP_P:     below[r] = sum >= params.value*total;                                   break;
                case GGML_MC_POLICY_RANDOM:    below[r] = random_of(params.seed, params.layer, pos, r) < params.value; break;
                case GGML_MC_POLICY_COUNT:     GGML_ABORT("fatal error");
            }
            sum += weight;
        }
        below[0] = false;
    }
};

// the rows whose tokens keep all experts
std::vector<bool> protected_rows(const ggml_tensor * dst, const ggml_mc_route_params & params) {
    const ggml_tensor * tokens     = dst->src[1];
    const ggml_tensor * rows       = dst->src[2];
    const ggml_tensor * importance = dst->src[4];
    const int64_t       n_rows     = dst->src[3]->ne[1];
    const double        share      = params.policy == GGML_MC_POLICY_ODP ? params.protect : 0.0;

    std::vector<bool> result(n_rows, share >= 1.0);
    if (share >= 1.0 || share <= 0.0 || !importance) {
        return result;
    }
    // NaN has no place in an order: it counts as the least important
    std::vector<float> value((const float *) importance->data, (const float *) importance->data + n_rows);
    for (float & v : value) {
        v = std::isnan(v) ? -INFINITY : v;
    }
    struct entry { int32_t seq; int64_t row; };
    std::vector<entry> order(n_rows);
    for (int64_t i = 0; i < n_rows; ++i) {
        order[i] = { ggml_mc_token_field_of(tokens, token_of(rows, tokens, i), GGML_MC_TOKEN_FIELD_SEQ), i };
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
        // share*n may be above the exact product by a rounding error, which must not protect one more row
        const int64_t n_protected = n == 1 ? 0 : (int64_t) std::ceil(share*n - 1e-9*n);
        for (int64_t i = 0; i < n_protected; ++i) {
            result[order[begin + i].row] = true;
        }
        begin = end;
    }
    return result;
}

} // namespace

void ggml_compute_forward_mc_importance(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * x        = dst->src[0];
    const ggml_tensor * tokens   = dst->src[1];
    const ggml_tensor * rows     = dst->src[2];
    const ggml_tensor * received = dst->src[3];
    const auto          measure  = (ggml_mc_measure) ggml_get_op_params_i32(dst, 0);

    const auto [begin, end] = ggml_mc_share_of(params, dst->ne[0]);
    for (int64_t row = begin; row < end; ++row) {
        float value = measure_row((const float *) ((const char *) x->data + row*x->nb[1]), x->ne[0], measure);
        const int64_t token = token_of(rows, tokens, row);
        if (measure == GGML_MC_MEASURE_ATTENTION && received) {
            value *= ((const float *) received->data)[token];
        }
        if (measure == GGML_MC_MEASURE_LAST) {
            value /= (float) std::max(1, ggml_mc_token_field_of(tokens, token, GGML_MC_TOKEN_FIELD_QUERIES));
        }
        ((float *) dst->data)[row] = value;
    }
}

void ggml_compute_forward_mc_route(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->ith != 0) {
        return;
    }
    const ggml_tensor * weights = dst->src[0];
    const ggml_tensor * tokens  = dst->src[1];
    const ggml_tensor * rows    = dst->src[2];
    const ggml_tensor * ids     = dst->src[3];

    const ggml_mc_route_params p = ggml_mc_route_get_params(dst);

    const int64_t n_used = ids->ne[0];
    const int64_t n_rows = ids->ne[1];

    int32_t * routed      = (int32_t *) dst->data;
    int32_t * n_kept      = routed      + n_used*n_rows;
    int32_t * n_dropped   = n_kept      + p.n_rank;
    int32_t * n_protected = n_dropped   + p.n_rank;
    int32_t * wanted      = n_protected + p.n_rank;
    int32_t * read        = wanted      + p.n_expert;
    std::fill(n_kept, read + p.n_expert, 0);

    const std::vector<bool> is_protected = protected_rows(dst, p);
    row_router router(p, (const float *) dst->src[5]->data, n_used);

    for (int64_t row = 0; row < n_rows; ++row) {
        const int32_t pos = ggml_mc_token_field_of(tokens, token_of(rows, tokens, row), GGML_MC_TOKEN_FIELD_POS);
        router.run((const float *) weights->data + row*n_used, pos);
        int32_t * out = routed + row*n_used;
        for (int64_t r = 0; r < n_used; ++r) {
            const int32_t slot = router.slots[r];
            const int32_t id   = *(const int32_t *) ((const char *) ids->data + row*ids->nb[1] + slot*ids->nb[0]);
            const bool    drop = router.below[r] && !is_protected[row];
            GGML_ASSERT(id >= 0 && id < p.n_expert);

            wanted[id] = 1;
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
}

void ggml_compute_forward_mc_count(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->ith != 0) {
        return;
    }
    const ggml_tensor * route    = dst->src[0];
    const int32_t *     counts   = (const int32_t *) route->data + (route->ne[0] - dst->ne[0]); // they follow the ids
    int64_t *           counters = (int64_t *) dst->data;
    for (int64_t i = 0; i < dst->ne[0]; ++i) {
        counters[i] += counts[i];
    }
}

void ggml_compute_forward_mc_mask_weights(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * weights   = dst->src[0];
    const ggml_tensor * ids       = dst->src[1];
    const int32_t       n_expert  = ggml_get_op_params_i32(dst, 0);
    const bool          normalize = ggml_get_op_params_i32(dst, 1) != 0;
    const int64_t       n_used    = ids->ne[0];

    const auto [begin, end] = ggml_mc_share_of(params, ids->ne[1]);
    for (int64_t row = begin; row < end; ++row) {
        const float *   w   = (const float *) weights->data + row*n_used;
        const int32_t * id  = (const int32_t *) ids->data + row*n_used;
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
