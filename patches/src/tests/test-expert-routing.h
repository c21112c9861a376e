// Cases for the ops of expert routing; test-backend-ops.cpp includes this file after its helpers.

#include "ggml-mc-routing.h"

// GGML_OP_MC_ATTN_RECEIVED -> GGML_OP_MC_IMPORTANCE -> GGML_OP_MC_ROUTE -> GGML_OP_MC_MASK_WEIGHTS or GGML_OP_MC_COUNT, as
// build_moe_ffn chains them; n_seqs sequences of n/n_seqs tokens, of which the block sees n_rows
struct test_mc_route : public test_case {
    const ggml_mc_policy  policy;
    const ggml_mc_measure measure;
    const int64_t n_expert;
    const int64_t n_used;
    const int64_t n;
    const int64_t n_rows;
    const int64_t n_seqs;
    const bool    normalize;
    const bool    count; // the output is the counters, otherwise the weights

    std::string vars() override {
        return "policy=" + std::to_string(policy) + ",measure=" + std::to_string(measure) + "," +
            VARS_TO_STR7(n_expert, n_used, n, n_rows, n_seqs, normalize, count);
    }

    double max_nmse_err() override {
        return 1e-6;
    }

    test_mc_route(ggml_mc_policy policy, ggml_mc_measure measure, int64_t n_expert, int64_t n_used, int64_t n, int64_t n_rows,
            int64_t n_seqs = 1, bool normalize = false, bool count = false) :
        policy(policy), measure(measure), n_expert(n_expert), n_used(n_used), n(n), n_rows(n_rows), n_seqs(n_seqs), normalize(normalize),
        count(count) {
        GGML_ASSERT(n_used <= n_expert && n_rows <= n && n % n_seqs == 0);
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int64_t n_kv = n + 32, n_head = 4, n_embd = 64;

        ggml_tensor * scores = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n_kv, n, n_head, 1);
        ggml_set_name(scores, "scores");
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, n_rows);
        ggml_set_name(x, "x");
        ggml_tensor * logits = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_used, n_rows);
        ggml_set_name(logits, "logits");
        ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_expert, n_rows);
        ggml_set_name(ids, "ids");
        ids = ggml_view_2d(ctx, ids, n_used, n_rows, ids->nb[1], 0);
        ggml_tensor * cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
        ggml_set_name(cells, "cells");
        ggml_tensor * tokens = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, GGML_MC_TOKEN_FIELD_COUNT, n);
        ggml_set_name(tokens, "tokens");
        ggml_tensor * rows = nullptr;
        if (n_rows != n) {
            rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
            ggml_set_name(rows, "rows");
        }
        ggml_tensor * thresholds = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_used);
        ggml_set_name(thresholds, "thresholds");
        ggml_tensor * counters = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 3*n_used + 2*n_expert);
        ggml_set_name(counters, "counters");

        ggml_tensor * received = measure == GGML_MC_MEASURE_ATTENTION ?
            ggml_mc_attn_received(ctx, ggml_soft_max(ctx, scores), cells, tokens, 1024) : nullptr;
        ggml_tensor * importance = ggml_mc_importance(ctx, x, received, tokens, rows, measure);

        ggml_mc_route_params params = { policy, (int32_t) n_expert, (int32_t) n_used, 3, 2, 0.6f, 42, 1, 0.1 };
        ggml_tensor * weights = ggml_reshape_3d(ctx, ggml_soft_max(ctx, logits), 1, n_used, n_rows);
        ggml_tensor * route   = ggml_mc_route(ctx, weights, ids, importance, tokens, rows, thresholds, &params);
        ggml_set_name(route, "route");
        ggml_tensor * out = count ? ggml_mc_count(ctx, counters, route) :
            ggml_mc_mask_weights(ctx, weights, ggml_mc_route_ids(ctx, route), normalize);
        ggml_set_name(out, "out");
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::default_random_engine rng(1234);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != NULL; t = ggml_get_next_tensor(ctx, t)) {
            const std::string name = t->name;
            if (t->op != GGML_OP_NONE || ggml_is_view_op(t->op)) {
                continue;
            }
            if (name == "ids") {
                std::vector<int32_t> data;
                for (int64_t r = 0; r < n_rows; ++r) {
                    std::vector<int32_t> row(n_expert);
                    for (int64_t i = 0; i < n_expert; ++i) {
                        row[i] = (int32_t) i;
                    }
                    std::shuffle(row.begin(), row.end(), rng);
                    data.insert(data.end(), row.begin(), row.end());
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (name == "cells") {
                std::vector<int64_t> data(n);
                for (int64_t i = 0; i < n; ++i) {
                    data[i] = i < n/2 ? i : i + 32; // two runs
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (name == "tokens") {
                std::vector<int32_t> data;
                const int64_t n_seq = n/n_seqs;
                for (int64_t i = 0; i < n; ++i) {
                    data.insert(data.end(), { (int32_t) (i/n_seq), (int32_t) (n_seq - i % n_seq), (int32_t) (i % n_seq) });
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (name == "rows") {
                std::vector<int32_t> data(n_rows);
                for (int64_t i = 0; i < n_rows; ++i) {
                    data[i] = (int32_t) (n - n_rows + i);
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (name == "counters") {
                ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t));
            } else if (name == "thresholds") {
                init_tensor_uniform(t, 0.3f, 0.9f);
            } else {
                init_tensor_uniform(t, -2.0f, 2.0f);
            }
        }
    }
};

// GGML_OP_MC_QK_RECEIVED: n queries, the last of n_kv keys of one sequence, causal
struct test_mc_qk_received : public test_case {
    const ggml_type type_k;
    const int64_t   n_embd_head;
    const int64_t   n_head;
    const int64_t   n_head_kv;
    const int64_t   n;
    const int64_t   n_kv;
    const float     max_bias;
    const float     logit_softcap;

    std::string vars() override {
        return VARS_TO_STR8(type_k, n_embd_head, n_head, n_head_kv, n, n_kv, max_bias, logit_softcap);
    }

    double max_nmse_err() override {
        return 1e-6;
    }

    test_mc_qk_received(ggml_type type_k, int64_t n_embd_head, int64_t n_head, int64_t n_head_kv, int64_t n, int64_t n_kv,
            float max_bias = 0.0f, float logit_softcap = 0.0f) :
        type_k(type_k), n_embd_head(n_embd_head), n_head(n_head), n_head_kv(n_head_kv), n(n), n_kv(n_kv), max_bias(max_bias),
        logit_softcap(logit_softcap) {
        GGML_ASSERT(n <= n_kv);
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_embd_head, n_head, n);
        ggml_set_name(q, "q");
        ggml_tensor * k = ggml_new_tensor_3d(ctx, type_k, n_embd_head, n_head_kv, n_kv);
        ggml_set_name(k, "k");
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_kv, n);
        ggml_set_name(mask, "mask");
        ggml_tensor * cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
        ggml_set_name(cells, "cells");
        ggml_tensor * tokens = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, GGML_MC_TOKEN_FIELD_COUNT, n);
        ggml_set_name(tokens, "tokens");

        const ggml_mc_qk_params params = { 1.0f/sqrtf((float) n_embd_head), max_bias, logit_softcap, (int32_t) n_kv };
        ggml_tensor * out = ggml_mc_qk_received(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, k, 0, 2, 1, 3), mask, nullptr,
                cells, tokens, &params);
        ggml_set_name(out, "out");
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        std::vector<float>   mask(n*n_kv);
        std::vector<int64_t> cells(n);
        std::vector<int32_t> tokens;
        for (int64_t i = 0; i < n; ++i) {
            cells[i] = n_kv - n + i;
            tokens.insert(tokens.end(), { 0, (int32_t) (n - i), (int32_t) cells[i] });
            for (int64_t j = 0; j < n_kv; ++j) {
                mask[i*n_kv + j] = j <= cells[i] ? 0.0f : -INFINITY;
            }
        }
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != NULL; t = ggml_get_next_tensor(ctx, t)) {
            const std::string name = t->name;
            if (name == "mask") {
                ggml_backend_tensor_set(t, mask.data(), 0, ggml_nbytes(t));
            } else if (name == "cells") {
                ggml_backend_tensor_set(t, cells.data(), 0, ggml_nbytes(t));
            } else if (name == "tokens") {
                ggml_backend_tensor_set(t, tokens.data(), 0, ggml_nbytes(t));
            } else if (t->op == GGML_OP_NONE && !ggml_is_view_op(t->op)) {
                init_tensor_uniform(t);
            }
        }
    }
};

static void mc_add_expert_routing_cases(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (int policy = 0; policy < GGML_MC_POLICY_COUNT; ++policy) {
        for (int64_t n : { 1, 7, 64 }) {
            test_cases.emplace_back(new test_mc_route((ggml_mc_policy) policy, GGML_MC_MEASURE_L1, 8, 2, n, n));
            test_cases.emplace_back(new test_mc_route((ggml_mc_policy) policy, GGML_MC_MEASURE_L1, 29, 8, n, n, 1, true));
            test_cases.emplace_back(new test_mc_route((ggml_mc_policy) policy, GGML_MC_MEASURE_L1, 29, 8, n, n, 1, false, true));
        }
    }
    for (int measure = 0; measure < GGML_MC_MEASURE_COUNT; ++measure) {
        for (int64_t n_rows : { 64, 3 }) {
            test_cases.emplace_back(new test_mc_route(GGML_MC_POLICY_ODP, (ggml_mc_measure) measure, 8, 2, 64, n_rows, 4));
        }
    }
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int64_t n : { 1, 65 }) {
            test_cases.emplace_back(new test_mc_qk_received(type, 64, 8, 2, n, 160));
        }
    }
    test_cases.emplace_back(new test_mc_qk_received(GGML_TYPE_F16, 96, 12, 1, 64, 100, 8.0f, 30.0f));
}
