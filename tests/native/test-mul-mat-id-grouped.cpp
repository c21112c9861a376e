// Checks MUL_MAT_ID_GROUPED on the CPU against MUL_MAT_ID of the same library, bit for bit.
//
// For every type of a grouped op, a stock MUL_MAT_ID runs on the same experts all stored in that type; the rows of slots
// whose expert has that type must be equal. With skipped slots the op is compared with itself without skipping. The
// output is filled with NaN before each run, so a row that nobody writes is found.
//
// usage: test-mul-mat-id-grouped [SEED]      exit 0: all passed

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-mc.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace {

const std::vector<ggml_type> TYPES = {
    GGML_TYPE_IQ1_S, GGML_TYPE_IQ1_M, GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ2_XS, GGML_TYPE_IQ2_S, GGML_TYPE_Q2_K,
    GGML_TYPE_IQ3_XXS, GGML_TYPE_IQ3_S, GGML_TYPE_Q3_K, GGML_TYPE_IQ4_XS, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
    GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q5_0, GGML_TYPE_IQ4_NL, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_F32,
};

struct problem {
    int64_t cols = 512, rows = 20;
    std::vector<std::vector<int>> groups; // experts of each group, ascending
    std::vector<ggml_type>        types;  // of each group
    int  n_used = 2, n_tokens = 1, n_threads = 1;
    bool broadcast = true;                // b has one row for all slots of a token
    bool use_map = true;

    int n_expert() const {
        int n = 0;
        for (const auto & g : groups) n += (int) g.size();
        return n;
    }
    std::string str() const {
        std::string s = "tokens " + std::to_string(n_tokens) + " used " + std::to_string(n_used) + " threads " +
            std::to_string(n_threads) + (broadcast ? " broadcast" : "") + " groups";
        for (size_t g = 0; g < groups.size(); ++g) {
            s += " " + std::string(ggml_type_name(types[g])) + "x" + std::to_string(groups[g].size());
        }
        return s;
    }
};

std::mt19937 rng;

std::vector<float> gaussian(int64_t n) {
    std::normal_distribution<float> d;
    std::vector<float> v(n);
    for (auto & x : v) x = d(rng);
    return v;
}

std::vector<uint8_t> quantize(ggml_type type, const std::vector<float> & w, int64_t rows, int64_t cols) {
    std::vector<uint8_t> q(ggml_row_size(type, cols)*rows);
    const std::vector<float> imatrix(cols, 1.0f);
    ggml_quantize_chunk(type, w.data(), q.data(), 0, rows, cols, imatrix.data());
    return q;
}

struct inputs {
    std::vector<std::vector<float>> experts; // [n_expert][rows*cols]
    std::vector<float>   b;
    std::vector<int32_t> ids;
};

inputs make_inputs(const problem & p) {
    inputs in;
    for (int e = 0; e < p.n_expert(); ++e) in.experts.push_back(gaussian(p.rows*p.cols));
    in.b = gaussian(p.cols*(p.broadcast ? 1 : p.n_used)*p.n_tokens);
    for (int t = 0; t < p.n_tokens; ++t) {
        std::vector<int32_t> all(p.n_expert());
        for (int e = 0; e < p.n_expert(); ++e) all[e] = e;
        std::shuffle(all.begin(), all.end(), rng);
        in.ids.insert(in.ids.end(), all.begin(), all.begin() + p.n_used);
    }
    return in;
}

// stock == true: MUL_MAT_ID on all experts in types[0]
std::vector<float> run(const problem & p, const inputs & in, bool stock) {
    ggml_init_params params = { ggml_tensor_overhead()*64 + ggml_graph_overhead(), nullptr, true };
    ggml_context * ctx = ggml_init(params);

    std::vector<ggml_tensor *> groups;
    std::vector<std::vector<int>> members = p.groups;
    if (stock) {
        members = { {} };
        for (int e = 0; e < p.n_expert(); ++e) members[0].push_back(e);
    }
    for (size_t g = 0; g < members.size(); ++g) {
        groups.push_back(ggml_new_tensor_3d(ctx, p.types[g], p.cols, p.rows, members[g].size()));
    }
    ggml_tensor * b   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.cols, p.broadcast ? 1 : p.n_used, p.n_tokens);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, p.n_used, p.n_tokens);
    ggml_tensor * map = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, p.n_expert());
    ggml_tensor * out = stock ? ggml_mul_mat_id(ctx, groups[0], b, ids) :
        ggml_mul_mat_id_grouped(ctx, groups.data(), (int) groups.size(), p.use_map ? map : nullptr, b, ids);

    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, p.n_threads);
    if (!ggml_backend_supports_op(backend, out)) {
        fprintf(stderr, "the CPU backend does not support: %s\n", p.str().c_str());
        exit(1);
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);

    std::vector<int32_t> entries(2*p.n_expert());
    for (size_t g = 0; g < members.size(); ++g) {
        const size_t size = ggml_row_size(p.types[g], p.cols)*p.rows;
        for (size_t i = 0; i < members[g].size(); ++i) {
            const auto q = quantize(p.types[g], in.experts[members[g][i]], p.rows, p.cols);
            ggml_backend_tensor_set(groups[g], q.data(), i*size, size);
            entries[2*members[g][i] + 0] = (int32_t) g;
            entries[2*members[g][i] + 1] = (int32_t) i;
        }
    }
    ggml_backend_tensor_set(map, entries.data(), 0, ggml_nbytes(map));
    ggml_backend_tensor_set(b, in.b.data(), 0, ggml_nbytes(b));
    ggml_backend_tensor_set(ids, in.ids.data(), 0, ggml_nbytes(ids));
    std::vector<float> result(ggml_nelements(out), std::numeric_limits<float>::quiet_NaN());
    ggml_backend_tensor_set(out, result.data(), 0, ggml_nbytes(out));

    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    ggml_backend_graph_compute(backend, graph);
    ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));

    ggml_backend_buffer_free(buffer);
    ggml_backend_free(backend);
    ggml_free(ctx);
    return result;
}

int n_failed = 0;
int n_passed = 0;

void report(bool ok, const char * what, const problem & p) {
    (ok ? n_passed : n_failed)++;
    if (!ok) printf("FAIL %s: %s\n", what, p.str().c_str());
}

void check_against_stock(const problem & p) {
    const inputs in  = make_inputs(p);
    const auto   got = run(p, in, false);
    bool ok = true;
    for (size_t g = 0; g < p.groups.size(); ++g) {
        problem one = p;
        one.types = { p.types[g] };
        const auto want = run(one, in, true);
        for (size_t i = 0; i < in.ids.size(); ++i) {
            if (std::find(p.groups[g].begin(), p.groups[g].end(), in.ids[i]) == p.groups[g].end()) continue;
            ok = ok && memcmp(&got[i*p.rows], &want[i*p.rows], p.rows*sizeof(float)) == 0;
        }
    }
    report(ok, "differs from MUL_MAT_ID", p);
}

// `exact`: the tiled kernel is off; with it, fewer routed rows may choose another kernel that sums in another order
void check_skipped(const problem & p, double share, bool exact) {
    inputs     in   = make_inputs(p);
    const auto want = run(p, in, false);
    std::bernoulli_distribution skip(share);
    const int32_t marks[] = { -1, p.n_expert(), std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max() };
    std::vector<bool> skipped;
    for (size_t i = 0; i < in.ids.size(); ++i) {
        skipped.push_back(skip(rng));
        if (skipped[i]) in.ids[i] = marks[i % 4];
    }
    const auto got = run(p, in, false);
    bool ok = true;
    for (size_t i = 0; i < in.ids.size(); ++i) {
        for (int64_t j = 0; j < p.rows; ++j) {
            const float g = got[i*p.rows + j];
            const float w = skipped[i] ? 0.0f : want[i*p.rows + j];
            const float tolerance = exact || skipped[i] ? 0.0f : 1e-4f*(1.0f + std::fabs(w));
            ok = ok && std::fabs(g - w) <= tolerance; // false for NaN
        }
    }
    report(ok, "skipped slots", p);
}

std::vector<std::vector<int>> random_groups(const std::vector<int> & sizes) {
    int n = 0;
    for (int s : sizes) n += s;
    std::vector<int> all(n);
    for (int e = 0; e < n; ++e) all[e] = e;
    std::shuffle(all.begin(), all.end(), rng);
    std::vector<std::vector<int>> groups;
    int at = 0;
    for (int s : sizes) {
        groups.emplace_back(all.begin() + at, all.begin() + at + s);
        std::sort(groups.back().begin(), groups.back().end());
        at += s;
    }
    return groups;
}

} // namespace

int main(int argc, char ** argv) {
    rng.seed(argc > 1 ? atoi(argv[1]) : 1);
    const char * tiled = getenv("GGML_CPU_TILED_MM");
    const bool exact = tiled && atoi(tiled) == 0;

    // each type alone: a group of its own, with and without map, at every batch size
    for (ggml_type type : TYPES) {
        for (int n_tokens : { 1, 2, 7, 32, 512 }) {
            for (int n_threads : { 1, 3 }) {
                problem p;
                p.rows = n_tokens == 512 ? 17 : 20;
                p.n_tokens = n_tokens;
                p.n_threads = n_threads;
                p.broadcast = n_tokens != 7;
                p.types = { type };
                p.groups = random_groups({ 8 });
                p.use_map = n_threads == 1;
                check_against_stock(p);
            }
        }
    }
    // group sizes 1..8 beside a second group, types in pairs
    for (int size = 1; size <= 8; ++size) {
        for (size_t i = 0; i < TYPES.size(); ++i) {
            problem p;
            p.types  = { TYPES[i], TYPES[(i + size) % TYPES.size()] };
            p.groups = random_groups({ size, 1 + (int) (i % 3) });
            p.n_tokens  = size % 2 ? 1 : 37;
            p.n_threads = 1 + size % 2;
            p.broadcast = i % 2;
            check_against_stock(p);
            check_skipped(p, 0.5, exact);
        }
    }
    // the most groups an op takes, many experts, several of them used, all or no slot skipped
    for (int n_tokens : { 1, 5, 64 }) {
        problem p;
        p.types.assign(TYPES.begin(), TYPES.begin() + GGML_MC_MAX_GROUPS);
        std::vector<int> sizes;
        for (int g = 0; g < GGML_MC_MAX_GROUPS; ++g) sizes.push_back(1 + (g*5) % 7);
        p.groups = random_groups(sizes);
        p.n_used = 6;
        p.n_tokens = n_tokens;
        p.n_threads = 2;
        p.broadcast = false;
        check_against_stock(p);
        for (double share : { 0.0, 0.3, 1.0 }) check_skipped(p, share, exact);
    }
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed ? 1 : 0;
}
