// Checks of the routing ops on the CPU that a model cannot reach, or reaches only in part.
//
//   received  MC_QK_RECEIVED against MC_ATTN_RECEIVED of the softmax of the same scores, for every type of keys, with ALiBi,
//             soft cap, sinks, several streams and several threads; the same bits for every number of threads
//   read      experts of dropped slots count as read where the multiplication cannot skip (skips = 0)
//   count     MC_ROUTE gives the counts of one call and changes none of its sources; MC_COUNT adds them up
//   nan       NaN among weights and importances: it ranks last and protects nothing
//
// usage: test-routing-ops      exit 0: all passed

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-mc-routing.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

std::mt19937 rng(7);
int n_passed = 0, n_failed = 0;

void check(bool ok, const std::string & what) {
    (ok ? n_passed : n_failed)++;
    if (!ok) {
        printf("FAIL %s\n", what.c_str());
    }
}

std::vector<float> gaussian(int64_t n) {
    std::normal_distribution<float> d;
    std::vector<float> v(n);
    for (auto & x : v) x = d(rng);
    return v;
}

struct session {
    ggml_context *        ctx     = ggml_init({ ggml_tensor_overhead()*64 + 4*ggml_graph_overhead(), nullptr, true });
    ggml_backend_t        backend = ggml_backend_cpu_init();
    ggml_backend_buffer_t buffer  = nullptr;

    ~session() {
        ggml_backend_buffer_free(buffer);
        ggml_backend_free(backend);
        ggml_free(ctx);
    }

    void allocate() {
        buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    }

    void compute(const std::vector<ggml_tensor *> & outs, int n_threads) {
        ggml_cgraph * graph = ggml_new_graph(ctx);
        for (ggml_tensor * out : outs) ggml_build_forward_expand(graph, out);
        ggml_backend_cpu_set_n_threads(backend, n_threads);
        ggml_backend_graph_compute(backend, graph);
    }
};

template <typename T>
void set(ggml_tensor * t, const std::vector<T> & data) {
    GGML_ASSERT(ggml_nbytes(t) == data.size()*sizeof(T));
    ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
}

template <typename T>
std::vector<T> get(const ggml_tensor * t) {
    std::vector<T> data(ggml_nbytes(t)/sizeof(T));
    ggml_backend_tensor_get(t, data.data(), 0, ggml_nbytes(t));
    return data;
}

struct attention {
    ggml_type k_type    = GGML_TYPE_F16;
    ggml_type mask_type = GGML_TYPE_F16;
    int64_t n_embd_head = 64, n_query = 70, n_kv = 160, n_head = 8, n_head_kv = 2, n_stream = 1;
    float   max_bias = 0.0f, logit_softcap = 0.0f;
    bool    sinks = false, cells = true;

    std::string str() const {
        return std::string(ggml_type_name(k_type)) + " mask " + ggml_type_name(mask_type) + " queries " + std::to_string(n_query) +
            " kv " + std::to_string(n_kv) + " heads " + std::to_string(n_head) + "/" + std::to_string(n_head_kv) + " streams " +
            std::to_string(n_stream) + " bias " + std::to_string(max_bias) + " cap " + std::to_string(logit_softcap) + (sinks ? " sinks" : "");
    }
};

// causal: query i is at position n_kv - n_query + i where there are cells, else at i; the last cells are empty
std::vector<float> causal_mask(const attention & a, int64_t first_cell) {
    std::vector<float> mask;
    for (int64_t s = 0; s < a.n_stream; ++s) {
        for (int64_t i = 0; i < a.n_query; ++i) {
            for (int64_t j = 0; j < a.n_kv; ++j) {
                mask.push_back(j <= first_cell + i ? (a.max_bias > 0.0f ? -std::fabs((float) (first_cell + i - j)) : 0.0f) : -INFINITY);
            }
        }
    }
    return mask;
}

void test_received(const attention & a) {
    const int64_t n_tokens = a.n_query*a.n_stream, first_cell = a.cells ? 20 : 0, cells_per_stream = 256;
    session s;
    ggml_tensor * q    = ggml_new_tensor_4d(s.ctx, GGML_TYPE_F32, a.n_embd_head, a.n_head, a.n_query, a.n_stream);
    ggml_tensor * k    = ggml_new_tensor_4d(s.ctx, a.k_type, a.n_embd_head, a.n_head_kv, a.n_kv, a.n_stream);
    ggml_tensor * mask = ggml_new_tensor_4d(s.ctx, a.mask_type, a.n_kv, a.n_query, 1, a.n_stream);
    ggml_tensor * sink = ggml_new_tensor_1d(s.ctx, GGML_TYPE_F32, a.n_head);
    ggml_tensor * cell = ggml_new_tensor_1d(s.ctx, GGML_TYPE_I64, n_tokens);
    ggml_tensor * tok  = ggml_new_tensor_2d(s.ctx, GGML_TYPE_I32, GGML_MC_TOKEN_FIELD_COUNT, n_tokens);

    const float scale = 1.0f/std::sqrt((float) a.n_embd_head);
    const ggml_mc_qk_params params = { scale, a.max_bias, a.logit_softcap, (int32_t) cells_per_stream };
    ggml_tensor * qp  = ggml_permute(s.ctx, q, 0, 2, 1, 3);
    ggml_tensor * kp  = ggml_permute(s.ctx, k, 0, 2, 1, 3);
    ggml_tensor * one = ggml_mc_qk_received(s.ctx, qp, kp, mask, a.sinks ? sink : nullptr, a.cells ? cell : nullptr, tok, &params);

    ggml_tensor * kq = ggml_mul_mat(s.ctx, a.k_type == GGML_TYPE_F32 ? kp : ggml_cast(s.ctx, kp, GGML_TYPE_F32), qp);
    if (a.logit_softcap != 0.0f) {
        kq = ggml_scale(s.ctx, ggml_tanh(s.ctx, ggml_scale(s.ctx, kq, scale/a.logit_softcap)), a.logit_softcap);
    }
    kq = ggml_soft_max_ext(s.ctx, kq, mask, a.logit_softcap != 0.0f ? 1.0f : scale, a.max_bias);
    ggml_soft_max_add_sinks(kq, a.sinks ? sink : nullptr);
    ggml_tensor * two = ggml_mc_attn_received(s.ctx, kq, a.cells ? cell : nullptr, tok, cells_per_stream);
    s.allocate();

    set(q, gaussian(ggml_nelements(q)));
    const std::vector<float> keys = gaussian(ggml_nelements(k));
    std::vector<uint8_t> blocks(ggml_nbytes(k));
    ggml_quantize_chunk(a.k_type, keys.data(), blocks.data(), 0, ggml_nrows(k), k->ne[0], nullptr);
    set(k, blocks);
    const std::vector<float> m = causal_mask(a, first_cell);
    if (a.mask_type == GGML_TYPE_F16) {
        std::vector<ggml_fp16_t> half(m.size());
        ggml_fp32_to_fp16_row(m.data(), half.data(), (int64_t) m.size());
        set(mask, half);
    } else {
        set(mask, m);
    }
    set(sink, gaussian(a.n_head));
    std::vector<int64_t> cells;
    std::vector<int32_t> tokens;
    for (int64_t t = 0; t < n_tokens; ++t) {
        const int64_t i = t % a.n_query;
        cells.push_back(t/a.n_query*cells_per_stream + first_cell + i);
        tokens.insert(tokens.end(), { (int32_t) (t/a.n_query), (int32_t) (a.n_query - i), (int32_t) i });
    }
    set(cell, cells);
    set(tok, tokens);

    std::vector<float> bits;
    for (int n_threads : { 1, 2, 3 }) {
        s.compute({ one, two }, n_threads);
        const std::vector<float> x = get<float>(one), y = get<float>(two);
        float worst = 0.0f;
        for (int64_t t = 0; t < n_tokens; ++t) {
            const float error = std::fabs(x[t] - y[t])/std::max(y[t], 1e-6f);
            worst = error <= worst ? worst : error; // also when it is NaN
        }
        check(worst < 2e-4f, a.str() + ": differs by " + std::to_string(worst));
        check(bits.empty() || memcmp(bits.data(), x.data(), x.size()*sizeof(float)) == 0, a.str() + ": depends on the threads");
        bits = x;
    }
}

void test_all_received() {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        attention a;
        a.k_type = type;
        test_received(a);
    }
    attention f32_mask, alibi, capped, sinks, streams, plain, mqa;
    f32_mask.mask_type = GGML_TYPE_F32;
    alibi.max_bias = 8.0f; alibi.n_head = 12; alibi.n_head_kv = 4;
    capped.logit_softcap = 30.0f;
    sinks.sinks = true;
    streams.n_stream = 3;
    plain.cells = false; plain.n_kv = plain.n_query = 130;
    mqa.n_head_kv = 1; mqa.n_embd_head = 96; mqa.n_kv = 200;
    for (const attention & a : { f32_mask, alibi, capped, sinks, streams, plain, mqa }) test_received(a);
}

struct routing {
    ggml_tensor * weights;
    ggml_tensor * ids;
    ggml_tensor * importance;
    ggml_tensor * tokens;
    ggml_tensor * thresholds;
    ggml_tensor * counters;
    ggml_tensor * routed;
    ggml_tensor * counted;

    routing(session & s, int64_t n_used, int64_t n_rows, const ggml_mc_route_params & p) {
        weights    = ggml_new_tensor_3d(s.ctx, GGML_TYPE_F32, 1, n_used, n_rows);
        ids        = ggml_new_tensor_2d(s.ctx, GGML_TYPE_I32, n_used, n_rows);
        importance = ggml_new_tensor_1d(s.ctx, GGML_TYPE_F32, n_rows);
        tokens     = ggml_new_tensor_2d(s.ctx, GGML_TYPE_I32, GGML_MC_TOKEN_FIELD_COUNT, n_rows);
        thresholds = ggml_new_tensor_1d(s.ctx, GGML_TYPE_F32, n_used);
        counters   = ggml_new_tensor_1d(s.ctx, GGML_TYPE_I64, 3*n_used + 2*p.n_expert);
        ggml_tensor * route = ggml_mc_route(s.ctx, weights, ids, importance, tokens, nullptr, thresholds, &p);
        routed     = ggml_mc_route_ids(s.ctx, route);
        counted    = ggml_mc_count(s.ctx, counters, route);
        s.allocate();
        ggml_backend_tensor_memset(counters, 0, 0, ggml_nbytes(counters));
        std::vector<int32_t> described;
        for (int64_t t = 0; t < n_rows; ++t) described.insert(described.end(), { 0, (int32_t) (n_rows - t), (int32_t) t });
        set(tokens, described);
    }
};

void test_read() {
    for (int32_t skips : { 1, 0 }) {
        session s;
        const ggml_mc_route_params p = { GGML_MC_POLICY_THRESHOLD, 4, 2, 0, 1, 0.0f, 0, skips, 0.0 };
        routing r(s, 2, 2, p);
        set(r.weights,    std::vector<float>{ 0.9f, 0.1f, 0.3f, 0.7f }); // the second slot, then the first is below
        set(r.ids,        std::vector<int32_t>{ 2, 0, 1, 2 });
        set(r.importance, std::vector<float>{ 1.0f, 1.0f });
        set(r.thresholds, std::vector<float>{ 0.0f, 0.5f });
        s.compute({ r.routed, r.counted }, 1);
        const std::string what = "skips " + std::to_string(skips);
        check(get<int32_t>(r.routed) == std::vector<int32_t>{ 2, 4, 4, 2 }, what + ": routed ids");
        const std::vector<int64_t> c = get<int64_t>(r.counters); // kept, dropped, protected; wanted, read by expert
        check(std::vector<int64_t>(c.begin(), c.begin() + 6) == std::vector<int64_t>{ 2, 0, 0, 2, 0, 0 }, what + ": slots");
        check(std::vector<int64_t>(c.begin() + 6, c.begin() + 10) == std::vector<int64_t>{ 1, 1, 1, 0 }, what + ": wanted");
        check(std::vector<int64_t>(c.begin() + 10, c.end()) == (skips ? std::vector<int64_t>{ 0, 0, 1, 0 } :
            std::vector<int64_t>{ 1, 1, 1, 0 }), what + ": read");

        s.compute({ r.routed }, 1);
        check(get<int64_t>(r.counters) == c, what + ": MC_ROUTE alone counts nothing");
        s.compute({ r.counted }, 2);
        std::vector<int64_t> twice = c;
        for (int64_t & x : twice) x *= 2;
        check(get<int64_t>(r.counters) == twice, what + ": MC_COUNT adds up");
        check(get<int32_t>(r.ids) == std::vector<int32_t>{ 2, 0, 1, 2 }, what + ": the ids stay as they are");
    }
}

void test_nan() {
    {
        session s;
        const ggml_mc_route_params p = { GGML_MC_POLICY_KEEP_MIN, 4, 2, 0, 1, 2.0f, 0, 1, 0.0 };
        routing r(s, 2, 1, p);
        set(r.weights,    std::vector<float>{ NAN, 0.2f });
        set(r.ids,        std::vector<int32_t>{ 3, 1 });
        set(r.importance, std::vector<float>{ 1.0f });
        set(r.thresholds, std::vector<float>{ 0.0f, 0.0f });
        s.compute({ r.routed }, 1);
        check(get<int32_t>(r.routed)[1] == 1, "a weight that is not a number does not take the first rank");
    }
    session s;
    const ggml_mc_route_params p = { GGML_MC_POLICY_ODP, 4, 2, 0, 1, 0.0f, 0, 1, 0.25 };
    routing r(s, 2, 4, p); // one of four rows is protected
    set(r.weights,    std::vector<float>{ 0.9f, 0.1f, 0.9f, 0.1f, 0.9f, 0.1f, 0.9f, 0.1f });
    set(r.ids,        std::vector<int32_t>{ 0, 1, 0, 1, 0, 1, 0, 1 });
    set(r.importance, std::vector<float>{ NAN, 1.0f, 3.0f, NAN });
    set(r.thresholds, std::vector<float>{ 0.0f, 0.5f });
    s.compute({ r.routed }, 1);
    check(get<int32_t>(r.routed) == std::vector<int32_t>{ 0, 4, 0, 4, 0, 1, 0, 4 }, "NaN protects nothing");
}

} // namespace

int main() {
    test_all_received();
    test_read();
    test_nan();
    printf("passed %d failed %d\n", n_passed, n_failed);
    return n_failed == 0 ? 0 : 1;
}
