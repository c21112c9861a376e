// Checks libmc-quantize on made-up rows, and writes what it and MUL_MAT_ID_GROUPED compute, to compare builds.
//
// For every type that can be compensated: the error in the metric must not be larger than that of ggml's own
// quantization, the values that the library reports must be those that ggml reads from its blocks, and a second run must
// give the same bytes. The time of the compensation is printed. The rows are scaled integers, and the metric is
// made of integers, so all builds get the same ones.
//
// usage: test-mc-quantize [OUT [REFERENCE]]      exit 0: all passed
//   OUT        a folder, for each TYPE: TYPE.stock (ggml's blocks), TYPE.blocks (compensated), TYPE.op (float32)
//   REFERENCE  the OUT of another build, whose TYPE.stock is what the compensation and the op start from

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-mc.h"
#include "ggml.h"
#include "mc-quantize.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

const int COLS = 256, ROWS = 40, N_EXPERT = 4, N_USED = 2, N_TOKENS = 3, PASSES = 3;

// the same on every platform, which the distributions of <random> are not
uint32_t state = 1;

// the sum of four integers from -largest to largest
float random_integer(int largest) {
    int sum = 0;
    for (int i = 0; i < 4; i++) {
        state = state*1664525u + 1013904223u;
        sum += (int) (state >> 12) % (2*largest + 1) - largest;
    }
    return (float) sum;
}

std::vector<float> numbers(size_t n, int largest, float scale) {
    std::vector<float> v(n);
    for (auto & x : v) x = random_integer(largest)*scale;
    return v;
}

// a a' + diagonal, in integers below 2^24: exact
std::vector<float> make_metric() {
    const int inputs = 2*COLS;
    const auto a = numbers((size_t) COLS*inputs, 2, 1.0f);
    std::vector<float> s((size_t) COLS*COLS);
    for (int i = 0; i < COLS; i++) {
        for (int j = 0; j < COLS; j++) {
            float sum = i == j ? 64.0f : 0.0f;
            for (int k = 0; k < inputs; k++) sum += a[i*inputs + k]*a[j*inputs + k];
            s[(size_t) i*COLS + j] = sum;
        }
    }
    return s;
}

double loss(const std::vector<float> & s, const float * w, const float * q) {
    double sum = 0;
    for (int r = 0; r < ROWS; r++) {
        for (int i = 0; i < COLS; i++) {
            double image = 0;
            for (int j = 0; j < COLS; j++) image += (double) s[(size_t) i*COLS + j]*(w[r*COLS + j] - q[r*COLS + j]);
            sum += image*(w[r*COLS + i] - q[r*COLS + i]);
        }
    }
    return sum;
}

std::vector<float> read_blocks(ggml_type type, const std::vector<uint8_t> & blocks) {
    std::vector<float> values((size_t) ROWS*COLS);
    ggml_get_type_traits(type)->to_float(blocks.data(), values.data(), (int64_t) values.size());
    return values;
}

void compensate(const mc_metric * metric, ggml_type type, const std::vector<float> & w, std::vector<uint8_t> & blocks,
                std::vector<float> & q) {
    mc_quantize_rows(metric, ROWS, w.data(), COLS, blocks.data(), (int64_t) ggml_row_size(type, COLS), q.data(), COLS, 1,
                     PASSES);
}

// MUL_MAT_ID_GROUPED with the rows of `blocks` as N_EXPERT experts
std::vector<float> multiply(ggml_type type, const std::vector<uint8_t> & blocks, const std::vector<float> & input) {
    ggml_context * ctx = ggml_init({ ggml_tensor_overhead()*16 + ggml_graph_overhead(), nullptr, true });
    ggml_tensor * experts = ggml_new_tensor_3d(ctx, type, COLS, ROWS/N_EXPERT, N_EXPERT);
    ggml_tensor * b   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, COLS, 1, N_TOKENS);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, N_USED, N_TOKENS);
    ggml_tensor * out = ggml_mul_mat_id_grouped(ctx, &experts, 1, nullptr, b, ids);
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, 1);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    const int32_t routed[N_USED*N_TOKENS] = { 0, 3, 2, 1, 1, 0 };
    ggml_backend_tensor_set(experts, blocks.data(), 0, blocks.size());
    ggml_backend_tensor_set(b, input.data(), 0, ggml_nbytes(b));
    ggml_backend_tensor_set(ids, routed, 0, sizeof(routed));
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    ggml_backend_graph_compute(backend, graph);
    std::vector<float> result(ggml_nelements(out));
    ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
    ggml_backend_buffer_free(buffer);
    ggml_backend_free(backend);
    ggml_free(ctx);
    return result;
}

void save(const std::string & path, const void * data, size_t size) {
    std::ofstream(path, std::ios::binary).write((const char *) data, (std::streamsize) size);
}

int n_failed = 0;
int n_passed = 0;

void report(bool ok, const char * what, ggml_type type) {
    (ok ? n_passed : n_failed)++;
    if (!ok) printf("FAIL %s: %s\n", what, ggml_type_name(type));
}

} // namespace

int main(int argc, char ** argv) {
    const std::string out = argc > 1 ? argv[1] : "", reference = argc > 2 ? argv[2] : "";
    const auto s       = make_metric();
    const auto weights = numbers((size_t) ROWS*COLS, 500, 1e-4f);
    const auto input   = numbers((size_t) COLS*N_TOKENS, 500, 1e-3f);
    const std::vector<float> importance(COLS, 1.0f);

    double seconds = 0, n_weights = 0;  // processor time, over all types
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        const ggml_type type = (ggml_type) t;
        if (!mc_quantize_supports(t)) continue;
        const std::string name = ggml_type_name(type);

        std::vector<uint8_t> stock(ggml_row_size(type, COLS)*ROWS);
        ggml_quantize_chunk(type, weights.data(), stock.data(), 0, ROWS, COLS, importance.data());
        if (!out.empty()) save(out + "/" + name + ".stock", stock.data(), stock.size());
        if (!reference.empty()) {
            std::ifstream file(reference + "/" + name + ".stock", std::ios::binary);
            stock.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
            if (stock.size() != ggml_row_size(type, COLS)*ROWS) {
                fprintf(stderr, "%s/%s.stock: not %d rows\n", reference.c_str(), name.c_str(), ROWS);
                return 2;
            }
        }

        mc_metric * metric = mc_metric_create(t, COLS, s.data());
        report(metric != nullptr, "no metric", type);
        if (!metric) continue;
        auto blocks = stock, again = stock;
        std::vector<float> q(weights.size()), q_again(weights.size());
        compensate(metric, type, weights, blocks, q);
        const clock_t start = clock();
        compensate(metric, type, weights, again, q_again);
        seconds += (double) (clock() - start)/CLOCKS_PER_SEC;
        n_weights += (double) weights.size();
        mc_metric_free(metric);

        report(blocks == again && memcmp(q.data(), q_again.data(), q.size()*sizeof(float)) == 0, "a second run differs", type);
        report(ggml_validate_row_data(type, blocks.data(), blocks.size()), "not valid", type);
        const auto read = read_blocks(type, blocks);
        bool same = true;
        for (size_t i = 0; i < q.size(); i++) same = same && std::fabs(q[i] - read[i]) <= 1e-5f*(1e-3f + std::fabs(read[i]));
        report(same, "ggml reads other values", type);
        const auto before = read_blocks(type, stock);
        report(loss(s, weights.data(), read.data()) <= loss(s, weights.data(), before.data()), "larger error than ggml's", type);

        if (!out.empty()) {
            const auto product = multiply(type, stock, input);
            save(out + "/" + name + ".blocks", blocks.data(), blocks.size());
            save(out + "/" + name + ".op", product.data(), product.size()*sizeof(float));
        }
    }
    printf("compensation: %.0f ns per weight\n", n_weights > 0 ? 1e9*seconds/n_weights : 0.0);
    printf("passed %d failed %d\n", n_passed, n_failed);
    return n_failed > 0 || n_passed == 0;
}
