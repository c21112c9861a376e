// Private to libmc-quantize. What its files are:
//
//   formats.cpp   the block formats: scales, codes, codebooks
//   codec.cpp     blocks to rows and back
//   metric.cpp    the quadratic form of the columns' error, prepared: factors, inverses, prices of codebook entries
//   codebook.cpp  the codebook entry nearest to eight columns, in the full 8 x 8 metric
//   scales.cpp    a sub-block of 16 rows: scales tried, codes with feedback
//   descent.cpp   16 rows: greedy pass, coordinate descent
//   api.cpp       the C API
//
// Vectors have one row in a lane (descent, scales) or one codebook entry in a lane (codebook, metric).
#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace mc {

constexpr int MAX_COLS = 256;
constexpr int MAX_SUBS = 16;
constexpr int MAX_SUB  = 32;   // columns of a sub-block
constexpr int GROUP    = 8;    // columns of a codebook entry (IQ3: of a pair of entries)
constexpr int LANES    = 16;

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

constexpr vi LANE = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };

inline bool any(vi mask) {
#ifdef __AVX512F__
    return _mm512_test_epi32_mask((__m512i) mask, (__m512i) mask) != 0;
#else
    int found = 0;
    for (int l = 0; l < LANES; l++) {
        found |= mask[l];
    }
    return found != 0;
#endif
}

// The first lane that is set; there is one.
inline int first_lane(vi mask) {
#ifdef __AVX512F__
    return __builtin_ctz(_mm512_test_epi32_mask((__m512i) mask, (__m512i) mask));
#else
    int l = 0;
    while (!mask[l]) {
        l++;
    }
    return l;
#endif
}

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

// What is left of x in a half float, by its bits: the compiler may contract a product and a difference.
inline vf to_half(vf x) {
    const vi bits = (vi) x, even = bits >> 13 & 1, rounded = (bits + 0xfff + even) & ~0x1fff;
    const vf size = x < 0.0f ? -x : x, subnormal = (x + 0.75f) - 0.75f;
    return size < 6.103515625e-5f ? subnormal : (vf) rounded;
}

// ---------------------------------------------------------------------------------------------------------- formats

enum class Kind { scalar, grid8, grid4, ternary };

struct Reach {
    int sc, mn;  // how far a scale's (min's) code is searched around what it is
};

struct Format {
    ggml_type type;
    Kind      kind;
    int       block;           // columns of a ggml block
    int       sub;             // columns that share a scale
    int       sc_lo, sc_hi;    // range of a sub-block's scale code; lo = hi where the block's d is the scale
    int       mn_hi;           // largest code of a sub-block's min, 0: none
    int       codes;           // scalar: how many codes; else: entries of the codebook
    int       zero;            // scalar: the code that means 0; -1: the table iq4nl
    bool      parity;          // an even number of minus signs in every group
    Reach     first, later;    // in the greedy pass; in the descent

    bool has_min() const { return kind == Kind::scalar && mn_hi > 0; }
    int  codes_per_sub() const { return kind == Kind::scalar ? sub : kind == Kind::grid4 ? sub / 4 : sub / 8; }
};

const Format * find_format(int type);  // nullptr: not supported

// The scale code sc stands for (offset + slope sc) in units of the block's d.
struct ScaleRule {
    float offset, slope;
};
ScaleRule scale_rule(const Format & f);

extern const float IQ4NL[16];
extern const float IQ1_SHIFT;

// A row's block(s), unpacked.
struct Row {
    float    d[MAX_COLS / 32];   // one for each ggml block; d[0] for super-blocks
    float    dmin;
    int      sc[MAX_SUBS];       // IQ1_S: mn is the shift's sign
    int      mn[MAX_SUBS];
    uint16_t code[MAX_COLS];     // scalar: one a column; grid8, ternary: one a group; grid4: two a group
    uint8_t  sign[MAX_COLS / GROUP];   // grid: bit i: column i is negative; IQ1_M: 1: the shift is negative
};

void read_block(ggml_type type, const uint8_t * block, int i, Row & row);  // block i of the row
void write_block(ggml_type type, uint8_t * block, int i, Row & row);

// A codebook in vectors over entries: [entries / LANES][D].
template <int D> struct Grid {
    int                n_vec = 0;
    std::vector<vf>    table;
    std::vector<float> entry;  // [entries, D]

    template <typename T>
    Grid(const T * packed, int entries) : n_vec(entries / LANES), table((size_t) n_vec * D), entry((size_t) entries * D) {
        for (int k = 0; k < entries; k++) {
            for (int i = 0; i < D; i++) {
                entry[k * D + i]                              = (float) value(packed + k, i);
                table[(size_t) (k / LANES) * D + i][k % LANES] = entry[k * D + i];
            }
        }
    }

    // Column i of an entry in each lane.
    vf gather(vi code, int i) const {
#ifdef __AVX512F__
        return (vf) _mm512_i32gather_ps((__m512i) (code * D + i), entry.data(), 4);
#else
        vf x;
        for (int l = 0; l < LANES; l++) {
            x[l] = entry[code[l] * D + i];
        }
        return x;
#endif
    }

  private:
    static int value(const uint64_t * entry, int i) { return ((const int8_t *) entry)[i]; }
    static int value(const uint32_t * entry, int i) { return ((const uint8_t *) entry)[i]; }
};

const Grid<8> & grid8(ggml_type type);
const Grid<4> & grid4(ggml_type type);

// ----------------------------------------------------------------------------------------------------------- metric

// A group of columns as a codebook sees it: its metric [GROUP, GROUP], and what every entry costs there.
// Entries have magnitudes only: there is a price for every pattern of signs, up to changing them all.
struct GroupMetric {
    float           m[GROUP][GROUP];
    std::vector<vf> price;              // grid8 [patterns][n_vec], grid4 [2][8][n_vec], ternary [2][n_vec]

    void set_prices(const Format & f);  // from m
};

// A range of columns as the codes see it.
struct Local {
    int                      n = 0;
    std::vector<float>       feedback;  // [n, n]: [k, j] how much of column j's error column k > j makes up for
    std::vector<float>       weight;    // [n]: what the square of a column's error costs then
    std::vector<GroupMetric> group;     // codebooks: [n / GROUP], later columns free

    void set(const Format & f, const double * u, int n_cols);  // u' u the inverse metric, u upper triangular
};

// to[k] += sign * sum over j of m[k, at + j] x[j], for columns k in [first, n), a multiple of 8 of them; m [n, n]. count: 16
// or 32 columns x.
void add_product(const float * m, int n, int first, int at, int count, float sign, const vf * x, vf * to);

// ------------------------------------------------------------------------------------------------------------ search

// Eight columns of LANES rows in entries of a codebook, q in units of the scale.
struct Picks {
    vf q[GROUP];
    vi code[2];
    vi sign;
};

// The best found for x, in units of the scale, for the rows of `todo`. shift: +1, -1: the only one allowed of a ternary
// entry, else 0.
void nearest_entries(const Format & f, const GroupMetric & group, const vf * x, vi shift, vi todo, Picks & picks);

// Scales of a sub-block for each of LANES rows: value = a * code value - b; grids: a * (entry + shift).
struct Scales {
    vf sc, mn, a, b, d;
};

// A sub-block of LANES rows quantized.
struct Fit {
    vf     loss;
    Scales scale;
    vf     q[MAX_SUB];
    vb     code[MAX_SUB];       // scalar
    vi     entry[MAX_SUB / 4];  // else
    vi     sign[MAX_SUB / GROUP];
};

// The best found for a sub-block's target t, `now` being the scales that it has; `at`: its first column in `local`.
void fit_sub(
        const Format & f, const Local & local, int at, const vf * t, const Scales & now, vf d, vf dmin, Reach reach, vi active,
        Fit & best);

vf nearest_code(const Format & f, vf x);  // x in units of the scale
vf value_of(const Format & f, vf code);
Scales make_scales(const Format & f, vf d, vf dmin, vf sc, vf mn);

}  // namespace mc

struct mc_metric {
    const mc::Format *           format;
    int                          n;
    std::vector<float>           s;              // [n, n]
    std::vector<float>           sub_sums;       // [n, n / sub]: sums of s over the columns of a sub-block
    mc::Local                    whole;          // for the greedy pass
    std::vector<mc::Local>       sub;            // each sub-block with all others fixed
    std::vector<float>           sub_inverse;    // [n / sub][sub, sub] inverse of the sub-block's s
    std::vector<mc::GroupMetric> group;          // each group with all others fixed
    std::vector<float>           group_inverse;  // [n / GROUP][GROUP, GROUP]

    bool prepare();  // all of it from format, n and s; false: s is not positive definite
};

namespace mc {

// Rows w [rows, n]; blocks in: where to start, out: the result. See mc_quantize_rows.
void quantize_rows(
        const mc_metric & metric, int rows, const float * w, int64_t ldw, uint8_t * blocks, int64_t stride, float * q,
        int64_t ldq, bool greedy, int passes);

}  // namespace mc
