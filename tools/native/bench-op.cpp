// Times MUL_MAT_ID_GROUPED on the CPU, or MUL_MAT_ID when compiled against the unpatched sources.
//
// usage: bench-op TYPE[,TYPE...] N_TOKENS N_THREADS SECONDS [N_COLS N_ROWS N_EXPERT N_USED]
//
// With several types (grouped only) expert e has type e % n_types. Routing is uniform and the same for every run with
// the same shape. With REPACK in the environment the weights of one type go to the buffer that repacks them, where
// there is one (us is 0 where not). Prints one JSON object: microseconds per op, and the share of routed slots of each type.

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#if __has_include("ggml-mc.h")
#include "ggml-mc.h"
#else
#define STOCK
#endif

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

ggml_type type_named(const std::string & name) {
    for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
        const char * known = ggml_type_name((ggml_type) t);
        if (known && strcasecmp(known, name.c_str()) == 0) return (ggml_type) t;
    }
    fprintf(stderr, "unknown type %s\n", name.c_str());
    exit(2);
}

// a few quantized rows, repeated: the speed does not depend on the values
void fill(ggml_tensor * t, std::mt19937 & rng) {
    const int64_t rows = 16;
    std::normal_distribution<float> normal;
    std::vector<float> w(t->ne[0]*rows), imatrix(t->ne[0], 1.0f);
    for (auto & x : w) x = normal(rng);
    std::vector<uint8_t> q(ggml_row_size(t->type, t->ne[0])*rows);
    ggml_quantize_chunk(t->type, w.data(), q.data(), 0, rows, t->ne[0], imatrix.data());
    const size_t n = ggml_nbytes(t);
    std::vector<char> all(n);
    for (size_t at = 0; at < n; at += q.size()) {
        memcpy(all.data() + at, q.data(), std::min(q.size(), n - at));
    }
    ggml_backend_tensor_set(t, all.data(), 0, n); // repacks where the buffer does
}

// the CPU buffer type that repacks `weights` for `op`, or null
ggml_backend_buffer_type_t repacking(ggml_backend_t backend, ggml_tensor * weights, ggml_tensor * op) {
    ggml_backend_dev_t dev = ggml_backend_get_device(backend);
    auto get = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * buft = get ? get(dev) : nullptr; buft && *buft; ++buft) {
        weights->buffer = ggml_backend_buft_alloc_buffer(*buft, 0);
        const bool supported = ggml_backend_dev_supports_op(dev, op);
        ggml_backend_buffer_free(weights->buffer);
        weights->buffer = nullptr;
        if (supported) return *buft;
    }
    return nullptr;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: %s TYPE[,TYPE...] N_TOKENS N_THREADS SECONDS [N_COLS N_ROWS N_EXPERT N_USED]\n", argv[0]);
        return 2;
    }
    std::vector<ggml_type> types;
    std::stringstream names(argv[1]);
    for (std::string name; std::getline(names, name, ','); ) types.push_back(type_named(name));
    const int64_t n_tokens  = atoi(argv[2]);
    const int     n_threads = atoi(argv[3]);
    const double  seconds   = atof(argv[4]);
    const int64_t n_cols    = argc > 5 ? atoi(argv[5]) : 4096;
    const int64_t n_rows    = argc > 6 ? atoi(argv[6]) : 14336;
    const int64_t n_expert  = argc > 7 ? atoi(argv[7]) : 8;
    const int64_t n_used    = argc > 8 ? atoi(argv[8]) : 2;
    const int     n_types   = (int) types.size();

    ggml_context * ctx = ggml_init({ ggml_tensor_overhead()*64 + ggml_graph_overhead(), nullptr, true });
    std::vector<ggml_tensor *> groups;
    for (int g = 0; g < n_types; ++g) {
        groups.push_back(ggml_new_tensor_3d(ctx, types[g], n_cols, n_rows, (n_expert - g + n_types - 1)/n_types));
    }
    ggml_tensor * b   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_cols, 1, n_tokens);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_used, n_tokens);
    ggml_tensor * map = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, n_expert);
#ifdef STOCK
    ggml_tensor * out = ggml_mul_mat_id(ctx, groups[0], b, ids);
    if (n_types != 1) { fprintf(stderr, "stock: one type only\n"); return 2; }
#else
    ggml_tensor * out = ggml_mul_mat_id_grouped(ctx, groups.data(), n_types, map, b, ids);
#endif
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, n_threads);
    ggml_threadpool_params tpp = ggml_threadpool_params_default(n_threads);
    ggml_threadpool_t pool = ggml_threadpool_new(&tpp);
    ggml_backend_cpu_set_threadpool(backend, pool);
    if (getenv("REPACK")) {
        ggml_backend_buffer_type_t extra = repacking(backend, groups[0], out);
        if (!extra) { printf("{\"us\": 0, \"min_us\": 0, \"share\": [1]}\n"); return 0; }
        ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(extra, ggml_backend_buft_get_alloc_size(extra, groups[0]) + 256);
        ggml_backend_tensor_alloc(buffer, groups[0], ggml_backend_buffer_get_base(buffer));
    }
    ggml_backend_alloc_ctx_tensors(ctx, backend);

    std::mt19937 rng(1);
    for (auto * group : groups) fill(group, rng);
    fill(b, rng);
    std::vector<int32_t> entries;
    for (int32_t e = 0; e < n_expert; ++e) {
        entries.push_back(e % n_types);
        entries.push_back(e / n_types);
    }
    memcpy(map->data, entries.data(), ggml_nbytes(map));

    // every routing is used equally often: many draws when one token is routed, one when hundreds are
    std::mt19937 routing(2);
    std::vector<std::vector<int32_t>> draws;
    for (int i = 0; i < (n_tokens == 1 ? 28 : 1); ++i) {
        std::vector<int32_t> draw;
        for (int64_t t = 0; t < n_tokens; ++t) {
            std::vector<int32_t> all(n_expert);
            for (int32_t e = 0; e < n_expert; ++e) all[e] = e;
            std::shuffle(all.begin(), all.end(), routing);
            draw.insert(draw.end(), all.begin(), all.begin() + n_used);
        }
        draws.push_back(draw);
    }
    std::vector<double> share(n_types);
    for (const auto & draw : draws) for (int32_t e : draw) share[e % n_types] += 1.0/(draw.size()*draws.size());

    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);

    using clock = std::chrono::steady_clock;
    auto round = [&] {
        const auto t0 = clock::now();
        for (const auto & draw : draws) {
            memcpy(ids->data, draw.data(), ggml_nbytes(ids));
            ggml_backend_graph_compute(backend, graph);
        }
        return std::chrono::duration<double, std::micro>(clock::now() - t0).count()/draws.size();
    };
    round(); // warm up
    std::vector<double> times;
    const auto start = clock::now();
    do { times.push_back(round()); } while (std::chrono::duration<double>(clock::now() - start).count() < seconds);
    std::sort(times.begin(), times.end());

    printf("{\"us\": %.2f, \"min_us\": %.2f, \"rounds\": %zu, \"share\": [", times[times.size()/2], times[0], times.size());
    for (int g = 0; g < n_types; ++g) printf("%s%.6f", g ? ", " : "", share[g]);
    printf("]}\n");
    return 0;
}
