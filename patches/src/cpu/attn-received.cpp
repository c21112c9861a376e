// CPU implementation of MC_ATTN_RECEIVED and MC_QK_RECEIVED (ggml-mc-routing.h): column sums of the attention matrix over heads
// and queries. The order of summation, and so the result, does not depend on the number of threads.

#include "ggml-mc-cpu.h"

#include "ggml-impl.h"
#include "routing-common.h"
#include "simd-gemm.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

int64_t cell_of(const ggml_tensor * cells, int64_t token, int64_t cells_per_stream) {
    if (!cells) {
        return token;
    }
    const int64_t cell = cells->type == GGML_TYPE_I64 ? ((const int64_t *) cells->data)[token] : ((const int32_t *) cells->data)[token];
    return cell % cells_per_stream;
}

// the mean over heads and over the queries that can see the token
float mean_of(float sum, const ggml_tensor * tokens, int64_t token, int64_t n_head) {
    return sum/(float) (n_head*std::max(1, ggml_mc_token_field_of(tokens, token, GGML_MC_TOKEN_FIELD_QUERIES)));
}

} // namespace

// Every thread sums some of the columns.
void ggml_compute_forward_mc_attn_received(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * probs  = dst->src[0];
    const ggml_tensor * tokens = dst->src[1];
    const ggml_tensor * cells  = dst->src[2];

    const int64_t n_tokens         = dst->ne[0];
    const int64_t n_queries        = probs->ne[1]; // in a stream
    const int64_t n_head           = probs->ne[2];
    const int64_t cells_per_stream = ggml_get_op_params_i32(dst, 0);

    float * out = (float *) dst->data;
    const auto [begin, end] = ggml_mc_share_of(params, n_tokens);
    std::fill(out + begin, out + end, 0.0f);

    // runs of tokens of one stream in consecutive cells
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
                ggml_vec_add_f32((int) n, out + t, out + t, p);
            }
        }
        t += n;
    }
    for (int64_t t = begin; t < end; ++t) {
        out[t] = mean_of(out[t], tokens, t, n_head);
    }
}

namespace {

// queries and keys whose scores are computed at once: small enough to stay in the first-level cache
constexpr int64_t Q_TILE  = 64;
constexpr int64_t KV_TILE = 64;

// a thread's part of the work buffer, in floats
struct qk_space {
    int64_t q;      // [Q_TILE, n_embd_head] queries
    int64_t k;      // [n_embd_head, KV_TILE] keys
    int64_t row;    // [n_embd_head] one key
    int64_t scores; // [n_kv/KV_TILE, Q_TILE, KV_TILE]
    int64_t sums;   // [n_kv] column sums of a head

    explicit qk_space(const ggml_tensor * dst) {
        const int64_t n_embd_head = dst->src[0]->ne[0];
        const int64_t n_kv        = GGML_PAD(dst->src[3]->ne[1], KV_TILE);
        q      = Q_TILE*n_embd_head;
        k      = n_embd_head*KV_TILE;
        row    = GGML_PAD(n_embd_head, 16);
        scores = Q_TILE*n_kv;
        sums   = n_kv;
    }

    int64_t total() const { return q + k + row + scores + sums; }
};

// one head of one stream
struct qk_head {
    const ggml_tensor *     q;
    const ggml_tensor *     k;
    const ggml_tensor *     mask;
    const ggml_mc_qk_params p;
    const int64_t           head;
    const int64_t           stream;
    const float             slope;
    const float             sink; // -INFINITY: none

    float * const q_tile;
    float * const k_tile;
    float * const row;
    float * const scores;
    float * const sums;

    qk_head(const ggml_tensor * dst, int64_t head, int64_t stream, const qk_space & space, float * work) :
        q(dst->src[0]), k(dst->src[3]), mask(dst->src[4]), p(ggml_mc_qk_received_get_params(dst)), head(head), stream(stream),
        slope(alibi_slope()), sink(dst->src[5] ? ((const float *) dst->src[5]->data)[head] : -INFINITY),
        q_tile(work), k_tile(q_tile + space.q), row(k_tile + space.k), scores(row + space.row), sums(scores + space.scores) {}

    // as ggml_soft_max_ext
    float alibi_slope() const {
        if (p.max_bias <= 0.0f) {
            return 1.0f;
        }
        const int   n  = 1 << (int) std::floor(std::log2((float) q->ne[2]));
        const float m0 = std::pow(2.0f, -p.max_bias/n);
        const float m1 = std::pow(2.0f, -p.max_bias/2.0f/n);
        return head < n ? std::pow(m0, (float) (head + 1)) : std::pow(m1, (float) (2*(head - n) + 1));
    }

    float mask_of(int64_t query, int64_t cell) const {
        const char * line = (const char *) mask->data + query*mask->nb[1] + stream*mask->nb[3];
        return mask->type == GGML_TYPE_F16 ? GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) line)[cell]) : ((const float *) line)[cell];
    }

    // whether a query of [first, first + n) sees a key of the tile
    bool is_seen(int64_t first, int64_t n, int64_t tile) const {
        if (!mask) {
            return true;
        }
        const int64_t end = std::min((tile + 1)*KV_TILE, k->ne[1]);
        for (int64_t i = first; i < first + n; ++i) {
            for (int64_t cell = tile*KV_TILE; cell < end; ++cell) {
                if (mask_of(i, cell) != -INFINITY) {
                    return true;
                }
            }
        }
        return false;
    }

    void load_queries(int64_t first, int64_t n) {
        const int64_t n_embd_head = q->ne[0];
        for (int64_t i = 0; i < n; ++i) {
            const char * line = (const char *) q->data + (first + i)*q->nb[1] + head*q->nb[2] + stream*q->nb[3];
            memcpy(q_tile + i*n_embd_head, line, n_embd_head*sizeof(float));
        }
        std::fill(q_tile + n*n_embd_head, q_tile + Q_TILE*n_embd_head, 0.0f);
    }

    // transposed, padded with zeros after the last key
    void load_keys(int64_t tile) {
        const int64_t n_embd_head = k->ne[0];
        const int64_t n           = std::min(KV_TILE, k->ne[1] - tile*KV_TILE);
        const auto    to_float    = ggml_get_type_traits(k->type)->to_float;
        if (n < KV_TILE) {
            std::fill(k_tile, k_tile + n_embd_head*KV_TILE, 0.0f);
        }
        for (int64_t i = 0; i < n; ++i) {
            const char * line = (const char *) k->data + (tile*KV_TILE + i)*k->nb[1] + head/(q->ne[2]/k->ne[2])*k->nb[2] + stream*k->nb[3];
            const float * x = (const float *) line;
            if (k->type == GGML_TYPE_F16) {
                ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) line, row, n_embd_head);
                x = row;
            } else if (k->type != GGML_TYPE_F32) {
                to_float(line, row, n_embd_head);
                x = row;
            }
            for (int64_t j = 0; j < n_embd_head; ++j) {
                k_tile[j*KV_TILE + i] = x[j];
            }
        }
    }

    // masked scores of the queries in q_tile, [Q_TILE, KV_TILE]
    void compute_tile(int64_t first, int64_t n, int64_t tile, float * s) {
        std::fill(s, s + Q_TILE*KV_TILE, 0.0f);
        simd_gemm(s, q_tile, k_tile, Q_TILE, (int) q->ne[0], KV_TILE);
        const float scale = p.logit_softcap != 0.0f ? p.scale/p.logit_softcap : p.scale;
        ggml_vec_scale_f32(Q_TILE*KV_TILE, s, scale);
        if (p.logit_softcap != 0.0f) {
            ggml_vec_tanh_f32(Q_TILE*KV_TILE, s, s);
            ggml_vec_scale_f32(Q_TILE*KV_TILE, s, p.logit_softcap);
        }
        const int64_t n_key = std::min(KV_TILE, k->ne[1] - tile*KV_TILE);
        for (int64_t i = 0; i < n; ++i) {
            float * line = s + i*KV_TILE;
            for (int64_t j = 0; mask && j < n_key; ++j) {
                line[j] += slope*mask_of(first + i, tile*KV_TILE + j);
            }
            std::fill(line + n_key, line + KV_TILE, -INFINITY);
        }
    }

    // adds the softmax of the scores of query i to the column sums; `tiles` are the tiles of keys that were computed
    void add_softmax(int64_t i, const int64_t * tiles, int64_t n_tile) {
        float max = sink;
        for (int64_t t = 0; t < n_tile; ++t) {
            float m = -INFINITY;
            ggml_vec_max_f32(KV_TILE, &m, scores + (t*Q_TILE + i)*KV_TILE);
            max = std::max(max, m);
        }
        if (max == -INFINITY) {
            return;
        }
        ggml_float sum = sink == -INFINITY ? 0.0 : std::exp(sink - max);
        for (int64_t t = 0; t < n_tile; ++t) {
            float * line = scores + (t*Q_TILE + i)*KV_TILE;
            sum += ggml_vec_soft_max_f32(KV_TILE, line, line, max);
        }
        for (int64_t t = 0; t < n_tile; ++t) {
            ggml_vec_mad_f32(KV_TILE, sums + tiles[t]*KV_TILE, scores + (t*Q_TILE + i)*KV_TILE, (float) (1.0/sum));
        }
    }

    // the column sums of this head
    void run(std::vector<int64_t> & tiles) {
        const int64_t n_kv = k->ne[1];
        std::fill(sums, sums + GGML_PAD(n_kv, KV_TILE), 0.0f);
        for (int64_t first = 0; first < q->ne[1]; first += Q_TILE) {
            const int64_t n = std::min(Q_TILE, q->ne[1] - first);
            load_queries(first, n);
            tiles.clear();
            for (int64_t tile = 0; tile*KV_TILE < n_kv; ++tile) {
                if (is_seen(first, n, tile)) {
                    load_keys(tile);
                    compute_tile(first, n, tile, scores + (int64_t) tiles.size()*Q_TILE*KV_TILE);
                    tiles.push_back(tile);
                }
            }
            for (int64_t i = 0; i < n; ++i) {
                add_softmax(i, tiles.data(), (int64_t) tiles.size());
            }
        }
    }
};

} // namespace

// After the parts of the threads: the sums of every head at the tokens' cells, [n_head, n_tokens].
size_t ggml_mc_qk_received_work_size(int n_tasks, const ggml_tensor * dst) {
    const int64_t n_head = dst->src[0]->ne[2];
    return (n_tasks*qk_space(dst).total() + n_head*dst->ne[0])*sizeof(float);
}

void ggml_compute_forward_mc_qk_received(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * tokens = dst->src[1];
    const ggml_tensor * cells  = dst->src[2];

    const int64_t n_tokens         = dst->ne[0];
    const int64_t n_queries        = q->ne[1]; // in a stream
    const int64_t n_head           = q->ne[2];
    const int64_t cells_per_stream = ggml_mc_qk_received_get_params(dst).cells_per_stream;

    const qk_space space(dst);
    float * work = (float *) params->wdata + params->ith*space.total();
    float * part = (float *) params->wdata + params->nth*space.total();

    std::vector<int64_t> tiles;
    for (int64_t item = params->ith; item < n_head*q->ne[3]; item += params->nth) {
        const int64_t stream = item/n_head;
        qk_head head(dst, item % n_head, stream, space, work);
        head.run(tiles);
        for (int64_t t = stream*n_queries; t < (stream + 1)*n_queries; ++t) {
            const int64_t cell = cell_of(cells, t, cells_per_stream);
            GGML_ASSERT(cell >= 0 && cell < head.k->ne[1]);
            part[head.head*n_tokens + t] = head.sums[cell];
        }
    }
    ggml_barrier(params->threadpool);

    float * out = (float *) dst->data;
    const auto [begin, end] = ggml_mc_share_of(params, n_tokens);
    for (int64_t t = begin; t < end; ++t) {
        float sum = 0.0f;
        for (int64_t head = 0; head < n_head; ++head) {
            sum += part[head*n_tokens + t];
        }
        out[t] = mean_of(sum, tokens, t, n_head);
    }
}
