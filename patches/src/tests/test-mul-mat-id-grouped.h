// Cases for MUL_MAT_ID_GROUPED; test-backend-ops.cpp includes this file after its helpers.

#include "ggml-mc.h"

// GGML_OP_MUL_MAT_ID_GROUPED: n_mats experts dealt round robin to one group per type; every skip-th slot is skipped
struct test_mul_mat_id_grouped : public test_case {
    const std::vector<ggml_type> types;
    const int n_mats;
    const int n_used;
    const bool b; // broadcast b matrix
    const int64_t m;
    const int64_t n;
    const int64_t k;
    const int skip; // 0: none

    std::string vars() override {
        std::string names;
        for (ggml_type type : types) {
            names += std::string(names.empty() ? "" : "+") + ggml_type_name(type);
        }
        return "types=" + names + "," + VARS_TO_STR7(n_mats, n_used, b, m, n, k, skip);
    }

    double max_nmse_err() override {
        return 5e-4;
    }

    uint64_t op_flops(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return 2 * m * k * n * n_used;
    }

    test_mul_mat_id_grouped(std::vector<ggml_type> types, int n_mats, int n_used, bool b, int64_t m, int64_t n, int64_t k, int skip = 0)
        : types(std::move(types)), n_mats(n_mats), n_used(n_used), b(b), m(m), n(n), k(k), skip(skip) {
        GGML_ASSERT(n_used <= n_mats && (int) this->types.size() <= n_mats);
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int n_groups = (int) types.size();
        std::vector<ggml_tensor *> groups;
        for (int g = 0; g < n_groups; ++g) {
            groups.push_back(ggml_new_tensor_3d(ctx, types[g], k, m, (n_mats - g + n_groups - 1) / n_groups));
            ggml_format_name(groups[g], "group_%d", g);
        }
        ggml_tensor * map = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, n_mats);
        ggml_set_name(map, "map");
        ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_mats, n);
        ggml_set_name(ids, "ids");
        if (n_used != n_mats) {
            ids = ggml_view_2d(ctx, ids, n_used, n, ids->nb[1], 0);
            ggml_set_name(ids, "view_of_ids");
        }
        ggml_tensor * b = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, this->b ? 1 : n_used, n);
        ggml_set_name(b, "b");

        ggml_tensor * out = ggml_mul_mat_id_grouped(ctx, groups.data(), n_groups, map, b, ids);
        ggml_set_name(out, "out");
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        const int n_groups = (int) types.size();
        std::default_random_engine rng(1234);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != NULL; t = ggml_get_next_tensor(ctx, t)) {
            if (strcmp(t->name, "map") == 0) {
                std::vector<int32_t> data;
                for (int i = 0; i < n_mats; ++i) {
                    data.push_back(i % n_groups);
                    data.push_back(i / n_groups);
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (strcmp(t->name, "ids") == 0) {
                std::vector<int32_t> data;
                for (int64_t r = 0; r < n; ++r) {
                    std::vector<int32_t> row(n_mats);
                    for (int i = 0; i < n_mats; ++i) {
                        row[i] = i;
                    }
                    std::shuffle(row.begin(), row.end(), rng);
                    data.insert(data.end(), row.begin(), row.end());
                }
                for (size_t i = 0; skip && i < data.size(); i += skip) {
                    data[i] = i % 2 ? -1 : n_mats; // both ways of marking a skipped slot
                }
                ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
            } else if (!ggml_is_view_op(t->op) && t->op == GGML_OP_NONE) {
                init_tensor_uniform(t);
            }
        }
    }
};

static void mc_add_mul_mat_id_grouped_cases(std::vector<std::unique_ptr<test_case>> & test_cases) {
    const std::vector<ggml_type> types = {
        GGML_TYPE_IQ1_S, GGML_TYPE_IQ1_M, GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ2_XS, GGML_TYPE_IQ2_S, GGML_TYPE_Q2_K, GGML_TYPE_IQ3_XXS,
        GGML_TYPE_IQ3_S, GGML_TYPE_Q3_K, GGML_TYPE_IQ4_XS, GGML_TYPE_Q4_K, GGML_TYPE_Q8_0, GGML_TYPE_F16,
    };
    for (int n : { 1, 7, 64 }) {
        for (ggml_type type : types) {
            test_cases.emplace_back(new test_mul_mat_id_grouped({ type }, 8, 2, true, 128, n, 512));
        }
        for (int skip : { 0, 2, 3 }) {
            for (bool b : { false, true }) {
                test_cases.emplace_back(new test_mul_mat_id_grouped({ GGML_TYPE_IQ1_M, GGML_TYPE_Q2_K, GGML_TYPE_IQ3_XXS }, 8, 2, b, 128, n, 512, skip));
                test_cases.emplace_back(new test_mul_mat_id_grouped({ GGML_TYPE_Q2_K, GGML_TYPE_Q8_0, GGML_TYPE_F32 }, 5, 3, b, 100, n, 256, skip));
                test_cases.emplace_back(new test_mul_mat_id_grouped(types, 29, 8, b, 64, n, 256, skip));
            }
        }
    }
}
