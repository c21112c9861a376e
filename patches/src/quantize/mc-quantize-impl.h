// Private to libmc-quantize. What its files are:
//
//   formats.cpp   the block formats: scales, codes, codebooks
//   codec.cpp     reading and writing blocks
//   metric.cpp    the quadratic form of the columns' error, prepared: factors, inverses, prices of codebook entries
//   codebook.cpp  the codebook entry nearest to eight columns, in the full 8 x 8 metric
//   scales.cpp    a sub-block of LANES rows: scales tried, codes with feedback
//   descent.cpp   LANES rows: greedy pass, coordinate descent
//   api.cpp       the C API
//
// The lanes of a vector hold rows (descent, scales) or codebook entries (codebook, metric).
#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#    include <immintrin.h>
#endif

namespace mc {

constexpr int MAX_COLS = 256;
constexpr int MAX_SUBS = 16;
constexpr int MAX_SUB  = 32;  // columns of a sub-block
constexpr int GROUP    = 8;   // columns of a codebook entry (IQ3: of a pair of entries)
// As many as a register of the CPU holds: GCC takes wider vectors apart, element by element where it compares.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float   vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint8_t vb __attribute__((vector_size(LANES)));

inline vf splat(float x) {
    return x - vf{};
}

inline vf inverse_or_zero(vf a) {
    return a == 0.0f ? splat(0) : 1.0f / a;
}

// Lane l of the result is lane at[l] of x.
template <typename V> V shuffle(V x, vi at) {
#if defined(__GNUC__) && !defined(__clang__)
    return __builtin_shuffle(x, at);
#else
    V y;
    for (int l = 0; l < LANES; l++) {
        y[l] = x[at[l] & (LANES - 1)];
    }
    return y;
#endif
}

inline vi lane_numbers() {
    vi x = {};
    for (int l = 0; l < LANES; l++) {
        x[l] = l;
    }
    return x;
}

// Whether any lane has any bit.
inline bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i) mask, (__m512i) mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i) mask, (__m256i) mask);
#else
    int found = 0;
    for (int l = 0; l < LANES; l++) {
        found |= mask[l];
    }
    return found != 0;
#endif
}

// The first lane that is set in the result of a comparison; there is one.
inline int first_lane(vi mask) {
#if defined(__AVX512F__)
    return __builtin_ctz(_mm512_test_epi32_mask((__m512i) mask, (__m512i) mask));
#elif defined(__AVX2__)
    return __builtin_ctz(_mm256_movemask_ps((__m256) mask));
#else
    int l = 0;
    while (!mask[l]) {
        l++;
    }
    return l;
#endif
}

// Element at[l] of a table of floats in lane l.
inline vf gather_floats(const float * table, vi at) {
#if defined(__AVX512F__)  // with a source, because GCC 12 warns of that of _mm512_i32gather_ps
    return (vf) _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, (__m512i) at, table, 4);
#elif defined(__AVX2__)
    return (vf) _mm256_i32gather_ps(table, (__m256i) at, 4);
#else
    vf x = {};
    for (int l = 0; l < LANES; l++) {
        x[l] = table[at[l]];
    }
    return x;
#endif
}

// A table of 16 floats.
struct small_table {
    alignas(64) float entry[16];

    vf at(vi index) const {
#if defined(__AVX512F__)
        return shuffle(*(const vf *) entry, index);
#else
        return gather_floats(entry, index);
#endif
    }
};

inline vf lesser(vf a, vf b) {
    return a < b ? a : b;
}

inline vf greater(vf a, vf b) {
    return a > b ? a : b;
}

// To the nearest integer, for |x| < 2^22.
inline vf nearest_integer(vf x) {
    return (x + 12582912.0f) - 12582912.0f;
}

// x rounded to half precision, by its bits because the compiler may contract a product and a difference.
inline vf to_half(vf x) {
    const vi bits = (vi) x, even = bits >> 13 & 1, rounded = (bits + 0xfff + even) & ~0x1fff;
    const vf size = x < 0.0f ? -x : x, subnormal = (x + 0.75f) - 0.75f;
    return size < 6.103515625e-5f ? subnormal : (vf) rounded;
}

// ---------------------------------------------------------------------------------------------------------- formats

enum class format_kind { scalar, grid8, grid4, ternary };

struct search_reach {
    int sc, mn;  // how far around its current value the code of a scale (or min) is searched
};

struct block_format {
    ggml_type    type;
    format_kind  kind;
    int          block;         // columns of a ggml block
    int          sub;           // columns that share a scale
    int          sc_lo, sc_hi;  // range of a sub-block's scale code; lo = hi where the block's d is the scale
    int          mn_hi;         // largest code of a sub-block's min, 0: none
    int          codes;         // scalar: how many codes; else: entries of the codebook
    int          zero;          // scalar: the code that means 0; -1: codes are indices into kvalues_iq4nl
    bool         parity;        // an even number of minus signs in every group
    search_reach first, later;  // in the greedy pass; in the descent

    bool has_min() const { return kind == format_kind::scalar && mn_hi > 0; }

    int codes_per_sub() const {
        return kind == format_kind::scalar ? sub : kind == format_kind::grid4 ? sub / 4 : sub / 8;
    }
};

const block_format * find_format(int type);  // nullptr: not supported

// The scale code sc stands for (offset + slope sc) in units of the block's d.
struct scale_mapping {
    float offset, slope;
};

scale_mapping scale_mapping_of(const block_format & f);

extern const float IQ1_SHIFT;

// A row's block(s), unpacked.
struct block_row {
    float    d[MAX_COLS / 32];        // one for each ggml block; d[0] for super-blocks
    float    dmin;
    int      sc[MAX_SUBS];            // IQ1_S: mn is the shift's sign
    int      mn[MAX_SUBS];
    uint16_t code[MAX_COLS];          // scalar: one a column; grid8, ternary: one a group; grid4: two a group
    uint8_t  sign[MAX_COLS / GROUP];  // grid: bit i: column i is negative; IQ1_M: 1: the shift is negative
};

void read_block(ggml_type type, const uint8_t * block, int i, block_row & row);  // block i of the row
void write_block(ggml_type type, uint8_t * block, int i, const block_row & row);

// A codebook in vectors over entries: [entries / LANES][D].
template <int D> struct code_grid {
    int                n_vec = 0;
    std::vector<vf>    table;
    std::vector<float> entry;  // [entries, D]

    template <typename T>
    code_grid(const T * packed, int entries) :
        n_vec(entries / LANES),
        table((size_t) n_vec * D),
        entry((size_t) entries * D) {
        for (int k = 0; k < entries; k++) {
            for (int i = 0; i < D; i++) {
                entry[k * D + i]                               = (float) value(packed + k, i);
                table[(size_t) (k / LANES) * D + i][k % LANES] = entry[k * D + i];
            }
        }
    }

    // Column i of an entry in each lane.
    vf gather(vi code, int i) const { return gather_floats(entry.data(), code * D + i); }

  private:
    static int value(const uint64_t * entry, int i) { return ((const int8_t *) entry)[i]; }

    static int value(const uint32_t * entry, int i) { return ((const uint8_t *) entry)[i]; }
};

const code_grid<8> & grid8(ggml_type type);
const code_grid<4> & grid4(ggml_type type);

// ----------------------------------------------------------------------------------------------------------- metric

// A group of columns as a codebook sees it: its metric [GROUP, GROUP], and what every entry costs there.
// Entries have magnitudes only, so there is a price for every pattern of signs; a pattern and its opposite share one.
struct group_metric {
    float           m[GROUP][GROUP];
    std::vector<vf> price;                    // grid8 [patterns][n_vec], grid4 [2][8][n_vec], ternary [2][n_vec]

    void set_prices(const block_format & f);  // from m
};

// A range of columns, prepared for the choice of its codes.
struct local_metric {
    int                       n = 0;
    std::vector<float>        feedback;  // [n, n]: [k, j] how much of column j's error column k > j makes up for
    std::vector<float>        weight;    // [n]: what the square of a column's error costs then
    std::vector<group_metric> group;     // codebooks: [n / GROUP], later columns free

    void set(const block_format & f, const double * u, int n_cols);  // u' u the inverse metric, u upper triangular
};

// to[k] += sign * sum over j of m[k, at + j] x[j], for columns k in [first, n), a multiple of 8 of them; m [n, n]. count: 16
// or 32 columns x.
void add_product(const float * m, int n, int first, int at, int count, float sign, const vf * x, vf * to);

// ------------------------------------------------------------------------------------------------------------ search

// Eight columns of LANES rows in entries of a codebook, q in units of the scale.
struct group_picks {
    vf q[GROUP];
    vi code[2];
    vi sign;
};

// The best found for x, in units of the scale, for the rows of `todo`. shift: +1 or -1 where a ternary entry
// must have that shift, else 0.
void nearest_entries(const block_format & f,
                     const group_metric & group,
                     const vf *           x,
                     vi                   shift,
                     vi                   todo,
                     group_picks &        picks);

// Scales of a sub-block for each of LANES rows: value = a * code value - b; grids: a * (entry + shift).
struct sub_scales {
    vf sc, mn, a, b, d;
};

// A sub-block of LANES rows quantized.
struct sub_fit {
    vf         loss;
    sub_scales scale;
    vf         q[MAX_SUB];
    vb         code[MAX_SUB];       // scalar
    vi         entry[MAX_SUB / 4];  // else
    vi         sign[MAX_SUB / GROUP];
};

// The best found for a sub-block's target t, `now` being the scales that it has; `at`: its first column in `local`.
void fit_sub(const block_format & f,
             const local_metric & local,
             int                  at,
             const vf *           t,
             const sub_scales &   now,
             vf                   d,
             vf                   dmin,
             search_reach         reach,
             vi                   active,
             sub_fit &            best);

vf         nearest_code(const block_format & f, vf x);  // x in units of the scale
vf         value_of(const block_format & f, vf code);
sub_scales make_scales(const block_format & f, vf d, vf dmin, vf sc, vf mn);

}  // namespace mc

struct mc_metric {
    const mc::block_format *      format;
    int                           n;
    std::vector<float>            s;              // [n, n]
    std::vector<float>            sub_sums;       // [n, n / sub]: sums of s over the columns of a sub-block
    mc::local_metric              whole;          // for the greedy pass
    std::vector<mc::local_metric> sub;            // each sub-block with all others fixed
    std::vector<float>            sub_inverse;    // [n / sub][sub, sub] inverse of the sub-block's s
    std::vector<mc::group_metric> group;          // each group with all others fixed
    std::vector<float>            group_inverse;  // [n / GROUP][GROUP, GROUP]

    bool prepare();                               // all of it from format, n and s; false: s is not positive definite
};

namespace mc {

// Rows w [rows, n]; blocks in: where to start, out: the result. See mc_quantize_rows.
void quantize_rows(const mc_metric & metric,
                   int               rows,
                   const float *     w,
                   int64_t           ldw,
                   uint8_t *         blocks,
                   int64_t           stride,
                   float *           q,
                   int64_t           ldq,
                   bool              greedy,
                   int               passes);

}  // namespace mc
