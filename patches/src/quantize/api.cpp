// The C API (mc-quantize.h).

#include "mc-quantize-impl.h"
#include "mc-quantize.h"

#include <algorithm>
#include <memory>

using namespace mc;

// The part of the metric that a sub-block needs stays in the cache for this many rows.
constexpr int64_t ROWS_AT_ONCE = 64;

int mc_quantize_supports(int type) {
    return find_format(type) != nullptr;
}

mc_metric * mc_metric_create(int type, int n, const float * s) {
    const block_format * f = find_format(type);
    if (!f || n < f->block || n > MAX_COLS || n % f->block) {
        return nullptr;
    }
    auto metric    = std::make_unique<mc_metric>();
    metric->format = f;
    metric->n      = n;
    metric->s.assign(s, s + (size_t) n * n);
    return metric->prepare() ? metric.release() : nullptr;
}

void mc_metric_free(mc_metric * metric) {
    delete metric;
}

void mc_quantize_rows(const mc_metric * metric,
                      int64_t           rows,
                      const float *     w,
                      int64_t           ldw,
                      uint8_t *         blocks,
                      int64_t           stride,
                      float *           q,
                      int64_t           ldq,
                      int               greedy,
                      int               passes) {
    for (int64_t i = 0; i < rows; i += ROWS_AT_ONCE) {
        const int count = (int) std::min(ROWS_AT_ONCE, rows - i);
        quantize_rows(*metric, count, w + i * ldw, ldw, blocks + i * stride, stride, q + i * ldq, ldq, greedy != 0,
                      passes);
    }
}

void mc_scale_rows(int type, int64_t rows, int64_t n, uint8_t * blocks, int64_t stride, const float * factor) {
    const block_format * f = find_format(type);
    if (!f) {
        return;
    }
    const size_t bytes = ggml_type_size(f->type);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t b = 0; b < n / f->block; b++) {
            uint8_t * block = blocks + i * stride + b * bytes;
            block_row row   = {};
            read_block(f->type, block, 0, row);
            row.d[0] *= factor[i];
            row.dmin *= factor[i];
            write_block(f->type, block, 0, row);
        }
    }
}
