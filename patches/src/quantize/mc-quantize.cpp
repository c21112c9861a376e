// Error-compensating rounding (GPTQ, LDLQ) into ggml's block formats.
//
// For a row w and its columns' metric s the quadratic form (w - q) s (w - q)' is minimised over what a block can hold:
// super-block scales, sub-block scales (and mins), codes. First greedily (GPTQ): sub-block after sub-block, group after
// group (one column, or the columns of one codebook entry), each choosing the nearest value to what is left to do and
// leaving its error to the columns after it. Then coordinate descent: super-block scales by least squares, sub-blocks
// with their scale chosen again, single groups. Every step is kept only when it lowers the form.
//
// Columns outside are the caller's: it adds to w what they leave over (mc_gguf/quantize/compensate.py).
// A row depends on nothing but itself and the metric, so the result does not depend on threads.
// Layouts and meaning of the blocks: ggml-common.h, and the dequantize functions in ggml-quants.c.

#define GGML_COMMON_DECL_CPP
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"
#include "ggml.h"

#include "mc-quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int MAX_COLS = 256;
constexpr int MAX_SUBS = 16;
constexpr int GROUP    = 8;  // columns of a codebook entry (IQ3: of a pair of entries)
constexpr int LANES    = 16;

typedef float   vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

vf splat(float x) {
    return x - vf{};
}

// ---------------------------------------------------------------------------------------------------------- formats

enum class Kind { scalar, grid8, grid4, ternary };

struct Format {
    ggml_type type;
    Kind      kind;
    int       block;           // columns of a ggml block
    int       sub;             // columns that share a scale
    int       sc_lo, sc_hi;    // range of a sub-block's scale code; lo = hi where the block's d is the scale
    int       mn_hi;           // largest code of a sub-block's min, 0: none
    int       codes;           // scalar: how many codes; else: entries of the codebook
    int       zero;            // scalar: the code that means 0; -1: kvalues_iq4nl
    bool      parity;          // an even number of minus signs in every group
    int       sc_reach, mn_reach;  // how far a scale's code is searched around what it is
};

const Format FORMATS[] = {
    { GGML_TYPE_Q4_0,    Kind::scalar,   32, 32,    0,   0,  0,   16,  8, false, 0, 0 },
    { GGML_TYPE_Q5_0,    Kind::scalar,   32, 32,    0,   0,  0,   32, 16, false, 0, 0 },
    { GGML_TYPE_Q8_0,    Kind::scalar,   32, 32,    0,   0,  0,  256, 128, false, 0, 0 },
    { GGML_TYPE_IQ4_NL,  Kind::scalar,   32, 32,    0,   0,  0,   16, -1, false, 0, 0 },
    { GGML_TYPE_Q2_K,    Kind::scalar,  256, 16,    0,  15, 15,    4,  0, false, 15, 15 },
    { GGML_TYPE_Q3_K,    Kind::scalar,  256, 16,  -32,  31,  0,    8,  4, false, 7, 0 },
    { GGML_TYPE_Q4_K,    Kind::scalar,  256, 32,    0,  63, 63,   16,  0, false, 4, 4 },
    { GGML_TYPE_Q5_K,    Kind::scalar,  256, 32,    0,  63, 63,   32,  0, false, 2, 2 },
    { GGML_TYPE_Q6_K,    Kind::scalar,  256, 16, -128, 127,  0,   64, 32, false, 7, 0 },
    { GGML_TYPE_IQ4_XS,  Kind::scalar,  256, 32,  -32,  31,  0,   16, -1, false, 7, 0 },
    { GGML_TYPE_IQ2_XXS, Kind::grid8,   256, 32,    0,  15,  0,  256,  0, true,  2, 0 },
    { GGML_TYPE_IQ2_XS,  Kind::grid8,   256, 16,    0,  15,  0,  512,  0, true,  2, 0 },
    { GGML_TYPE_IQ2_S,   Kind::grid8,   256, 16,    0,  15,  0, 1024,  0, false, 2, 0 },
    { GGML_TYPE_IQ3_XXS, Kind::grid4,   256, 32,    0,  15,  0,  256,  0, true,  2, 0 },
    { GGML_TYPE_IQ3_S,   Kind::grid4,   256, 32,    0,  15,  0,  512,  0, false, 2, 0 },
    { GGML_TYPE_IQ1_S,   Kind::ternary, 256, 32,    0,   7,  1, 2048,  0, false, 1, 1 },
    { GGML_TYPE_IQ1_M,   Kind::ternary, 256, 16,    0,   7,  0, 2048,  0, false, 1, 0 },
};

const Format * find_format(int type) {
    for (const Format & f : FORMATS) {
        if (f.type == type) {
            return &f;
        }
    }
    return nullptr;
}

// What the scale code sc stands for, in units of the block's d.
float scale_factor(const Format & f, int sc) {
    switch (f.type) {
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:   return 0.25f * (0.5f + sc);
        case GGML_TYPE_IQ3_XXS: return 0.5f * (0.5f + sc);
        case GGML_TYPE_IQ3_S:
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ1_M:   return 1.0f + 2.0f * sc;
        default:                return f.sc_lo == f.sc_hi ? 1.0f : (float) sc;
    }
}

float code_value(const Format & f, int code) {
    return f.zero < 0 ? (float) kvalues_iq4nl[code] : (float) (code - f.zero);
}

// A row's block(s), unpacked.
struct Row {
    float    d[MAX_COLS / 32];   // one for each ggml block; d[0] for super-blocks
    float    dmin;
    int      sc[MAX_SUBS];       // IQ1_S: mn is the shift's sign
    int      mn[MAX_SUBS];
    uint16_t code[MAX_COLS];     // scalar: one a column; grid8, ternary: one a group; grid4: two a group
    uint8_t  sign[MAX_COLS / GROUP];   // grid: bit i: column i is negative; IQ1_M: 1: the shift is negative
};

// ------------------------------------------------------------------------------------------------------ the codebooks

// A codebook in vectors over entries: [entries / LANES][D].
template <int D> struct Grid {
    int             n_vec = 0;
    std::vector<vf> table;

    template <typename T> Grid(const T * packed, int entries) : n_vec(entries / LANES), table((size_t) n_vec * D) {
        for (int k = 0; k < entries; k++) {
            for (int i = 0; i < D; i++) {
                table[(size_t) (k / LANES) * D + i][k % LANES] = (float) value(packed + k, i);
            }
        }
    }

    float at(int entry, int i) const { return table[(size_t) (entry / LANES) * D + i][entry % LANES]; }

  private:
    static int value(const uint64_t * entry, int i) { return ((const int8_t *) entry)[i]; }
    static int value(const uint32_t * entry, int i) { return ((const uint8_t *) entry)[i]; }
};

const Grid<8> & grid8(ggml_type type) {
    static const Grid<8> xxs(iq2xxs_grid, 256), xs(iq2xs_grid, 512), s(iq2s_grid, 1024), one(iq1s_grid, 2048);
    return type == GGML_TYPE_IQ2_XXS ? xxs : type == GGML_TYPE_IQ2_XS ? xs : type == GGML_TYPE_IQ2_S ? s : one;
}

const Grid<4> & grid4(ggml_type type) {
    static const Grid<4> xxs(iq3xxs_grid, 256), s(iq3s_grid, 512);
    return type == GGML_TYPE_IQ3_XXS ? xxs : s;
}

// ------------------------------------------------------------------------------------------------- packing, unpacking

uint32_t load32(const void * p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}

template <typename T> void put_bits(T & word, int at, int width, uint32_t value) {
    const T mask = (T) (((1u << width) - 1) << at);
    word         = (T) ((word & ~mask) | ((T) (value << at) & mask));
}

// Visits every field of a block: get reads it into the row, otherwise it is written.
struct Codec {
    bool  get;
    Row & row;

    template <typename T, typename V> void field(T & word, int at, int width, V & value) const {
        if (get) {
            value = (V) ((word >> at) & ((1u << width) - 1));
        } else {
            put_bits(word, at, width, (uint32_t) value);
        }
    }
    template <typename T> void biased(T & word, int at, int width, int bias, int & value) const {
        int raw = value + bias;
        field(word, at, width, raw);
        value = raw - bias;
    }
    // A value whose bits lie in two places.
    template <typename T, typename U, typename V>
    void split(T & low, int at, int width, U & high, int high_at, int high_width, V & value, int bias = 0) const {
        int lo = ((int) value + bias) & ((1 << width) - 1), hi = ((int) value + bias) >> width;
        field(low, at, width, lo);
        field(high, high_at, high_width, hi);
        value = (V) ((lo | hi << width) - bias);
    }
    void half(ggml_half & stored, float & value) const {
        if (get) {
            value = ggml_fp16_to_fp32(stored);
        } else {
            stored = ggml_fp32_to_fp16(value);
        }
    }
    void min_and_scale_k4(uint8_t * q, int s) const {
        if (s < 4) {
            field(q[s], 0, 6, row.sc[s]);
            field(q[s + 4], 0, 6, row.mn[s]);
        } else {
            split(q[s + 4], 0, 4, q[s - 4], 6, 2, row.sc[s]);
            split(q[s + 4], 4, 4, q[s], 6, 2, row.mn[s]);
        }
    }

    void q2_K(block_q2_K & b) const {
        half(b.data.data.d, row.d[0]);
        half(b.data.data.dmin, row.dmin);
        for (int s = 0; s < 16; s++) {
            field(b.scales[s], 0, 4, row.sc[s]);
            field(b.scales[s], 4, 4, row.mn[s]);
            for (int l = 0; l < 16; l++) {
                field(b.qs[32 * (s / 8) + 16 * (s % 2) + l], 2 * (s % 8 / 2), 2, row.code[16 * s + l]);
            }
        }
    }
    void q3_K(block_q3_K & b) const {
        half(b.d, row.d[0]);
        for (int s = 0; s < 16; s++) {
            split(b.scales[s % 8], 4 * (s / 8), 4, b.scales[8 + s % 4], 2 * (s / 4), 2, row.sc[s], 32);
            for (int l = 0; l < 16; l++) {
                const int byte = 16 * (s % 2) + l;
                split(b.qs[32 * (s / 8) + byte], 2 * (s % 8 / 2), 2, b.hmask[byte], s / 2, 1, row.code[16 * s + l]);
            }
        }
    }
    void q4_K(block_q4_K & b) const {
        half(b.data.data.d, row.d[0]);
        half(b.data.data.dmin, row.dmin);
        for (int s = 0; s < 8; s++) {
            min_and_scale_k4(b.scales, s);
            for (int l = 0; l < 32; l++) {
                field(b.qs[32 * (s / 2) + l], 4 * (s % 2), 4, row.code[32 * s + l]);
            }
        }
    }
    void q5_K(block_q5_K & b) const {
        half(b.data.data.d, row.d[0]);
        half(b.data.data.dmin, row.dmin);
        for (int s = 0; s < 8; s++) {
            min_and_scale_k4(b.scales, s);
            for (int l = 0; l < 32; l++) {
                split(b.qs[32 * (s / 2) + l], 4 * (s % 2), 4, b.qh[l], s, 1, row.code[32 * s + l]);
            }
        }
    }
    void q6_K(block_q6_K & b) const {
        half(b.d, row.d[0]);
        for (int s = 0; s < 16; s++) {
            int sc = get ? b.scales[s] : row.sc[s];
            (get ? row.sc[s] : sc) = sc;
            b.scales[s]            = (int8_t) sc;
            for (int l = 0; l < 16; l++) {
                const int n = s / 8, quarter = s % 8 / 2, at = 16 * (s % 2) + l;
                split(b.ql[64 * n + 32 * (quarter % 2) + at], 4 * (quarter / 2), 4, b.qh[32 * n + at], 2 * quarter, 2,
                      row.code[16 * s + l]);
            }
        }
    }
    void iq4_xs(block_iq4_xs & b) const {
        half(b.d, row.d[0]);
        for (int s = 0; s < 8; s++) {
            split(b.scales_l[s / 2], 4 * (s % 2), 4, b.scales_h, 2 * s, 2, row.sc[s], 32);
            for (int l = 0; l < 32; l++) {
                field(b.qs[16 * s + l % 16], 4 * (l / 16), 4, row.code[32 * s + l]);
            }
        }
    }
    template <typename B> void four_bit(B & b, int s) const {
        half(b.d, row.d[s]);
        for (int l = 0; l < 32; l++) {
            field(b.qs[l % 16], 4 * (l / 16), 4, row.code[32 * s + l]);
        }
    }
    void q5_0(block_q5_0 & b, int s) const {
        half(b.d, row.d[s]);
        for (int l = 0; l < 32; l++) {
            split(b.qs[l % 16], 4 * (l / 16), 4, b.qh[l / 8], l % 8, 1, row.code[32 * s + l]);
        }
    }
    void q8_0(block_q8_0 & b, int s) const {
        half(b.d, row.d[s]);
        for (int l = 0; l < 32; l++) {
            uint16_t & code = row.code[32 * s + l];
            code            = get ? (uint16_t) (b.qs[l] + 128) : code;
            b.qs[l]         = (int8_t) (code - 128);
        }
    }
    // Seven bits give eight signs: the eighth makes their number even.
    template <typename T> void even_signs(T & word, int at, uint8_t & sign) const {
        uint32_t seven = sign & 127;
        field(word, at, 7, seven);
        sign = (uint8_t) (seven | (__builtin_popcount(seven) & 1) << 7);
    }
    void signs_and_scale(uint8_t * p, int s) const {
        uint32_t word = load32(p);
        for (int l = 0; l < 4; l++) {
            even_signs(word, 7 * l, row.sign[4 * s + l]);
        }
        field(word, 28, 4, row.sc[s]);
        memcpy(p, &word, 4);
    }
    void iq2_xxs(block_iq2_xxs & b) const {
        half(b.d, row.d[0]);
        for (int s = 0; s < 8; s++) {
            uint8_t * p = (uint8_t *) (b.qs + 4 * s);
            for (int l = 0; l < 4; l++) {
                field(p[l], 0, 8, row.code[4 * s + l]);
            }
            signs_and_scale(p + 4, s);
        }
    }
    void iq2_xs(block_iq2_xs & b) const {
        half(b.d, row.d[0]);
        for (int s = 0; s < 16; s++) {
            field(b.scales[s / 2], 4 * (s % 2), 4, row.sc[s]);
        }
        for (int g = 0; g < 32; g++) {
            field(b.qs[g], 0, 9, row.code[g]);
            even_signs(b.qs[g], 9, row.sign[g]);
        }
    }
    void iq2_s(block_iq2_s & b) const {
        half(b.d, row.d[0]);
        for (int s = 0; s < 16; s++) {
            field(b.scales[s / 2], 4 * (s % 2), 4, row.sc[s]);
        }
        for (int g = 0; g < 32; g++) {
            split(b.qs[g], 0, 8, b.qh[g / 4], 2 * (g % 4), 2, row.code[g]);
            field(b.qs[32 + g], 0, 8, row.sign[g]);
        }
    }
    void iq3_xxs(block_iq3_xxs & b) const {
        half(b.d, row.d[0]);
        for (int c = 0; c < 64; c++) {
            field(b.qs[c], 0, 8, row.code[c]);
        }
        for (int s = 0; s < 8; s++) {
            signs_and_scale(b.qs + 64 + 4 * s, s);
        }
    }
    void iq3_s(block_iq3_s & b) const {
        half(b.d, row.d[0]);
        for (int s = 0; s < 8; s++) {
            field(b.scales[s / 2], 4 * (s % 2), 4, row.sc[s]);
        }
        for (int c = 0; c < 64; c++) {
            split(b.qs[c], 0, 8, b.qh[c / 8], c % 8, 1, row.code[c]);
        }
        for (int g = 0; g < 32; g++) {
            field(b.signs[g], 0, 8, row.sign[g]);
        }
    }
    void iq1_s(block_iq1_s & b) const {
        half(b.d, row.d[0]);
        for (int s = 0; s < 8; s++) {
            field(b.qh[s], 12, 3, row.sc[s]);
            field(b.qh[s], 15, 1, row.mn[s]);
            for (int l = 0; l < 4; l++) {
                split(b.qs[4 * s + l], 0, 8, b.qh[s], 3 * l, 3, row.code[4 * s + l]);
            }
        }
    }
    void iq1_m(block_iq1_m & b) const {
        uint16_t sc[4];
        memcpy(sc, b.scales, 8);
        ggml_half d = (ggml_half) (sc[0] >> 12 | (sc[1] >> 8 & 0x00f0) | (sc[2] >> 4 & 0x0f00) | (sc[3] & 0xf000));
        half(d, row.d[0]);
        for (int i = 0; i < 4; i++) {
            put_bits(sc[i], 12, 4, (uint32_t) d >> 4 * i & 15);
        }
        for (int s = 0; s < 16; s++) {
            field(sc[s / 4], 3 * (s % 4), 3, row.sc[s]);
        }
        memcpy(b.scales, sc, 8);
        for (int g = 0; g < 32; g++) {
            split(b.qs[g], 0, 8, b.qh[g / 2], 4 * (g % 2), 3, row.code[g]);
            field(b.qh[g / 2], 4 * (g % 2) + 3, 1, row.sign[g]);
        }
    }

    void block(ggml_type type, uint8_t * p, int i) const {
        switch (type) {
            case GGML_TYPE_Q2_K:    return q2_K(*(block_q2_K *) p);
            case GGML_TYPE_Q3_K:    return q3_K(*(block_q3_K *) p);
            case GGML_TYPE_Q4_K:    return q4_K(*(block_q4_K *) p);
            case GGML_TYPE_Q5_K:    return q5_K(*(block_q5_K *) p);
            case GGML_TYPE_Q6_K:    return q6_K(*(block_q6_K *) p);
            case GGML_TYPE_IQ4_XS:  return iq4_xs(*(block_iq4_xs *) p);
            case GGML_TYPE_IQ4_NL:  return four_bit(*(block_iq4_nl *) p, i);
            case GGML_TYPE_Q4_0:    return four_bit(*(block_q4_0 *) p, i);
            case GGML_TYPE_Q5_0:    return q5_0(*(block_q5_0 *) p, i);
            case GGML_TYPE_Q8_0:    return q8_0(*(block_q8_0 *) p, i);
            case GGML_TYPE_IQ2_XXS: return iq2_xxs(*(block_iq2_xxs *) p);
            case GGML_TYPE_IQ2_XS:  return iq2_xs(*(block_iq2_xs *) p);
            case GGML_TYPE_IQ2_S:   return iq2_s(*(block_iq2_s *) p);
            case GGML_TYPE_IQ3_XXS: return iq3_xxs(*(block_iq3_xxs *) p);
            case GGML_TYPE_IQ3_S:   return iq3_s(*(block_iq3_s *) p);
            case GGML_TYPE_IQ1_S:   return iq1_s(*(block_iq1_s *) p);
            case GGML_TYPE_IQ1_M:   return iq1_m(*(block_iq1_m *) p);
            default:                return;
        }
    }
};

// -------------------------------------------------------------------------------------------------- small linear algebra

// Upper triangular u with inverse(a) = u' u, of a symmetric positive definite a [n, n]; false if it is not.
// a = r r' with r upper triangular (Cholesky from the last column on), u = inverse(r).
bool inverse_factor(const double * a, int n, std::vector<double> & u) {
    std::vector<double> r((size_t) n * n, 0.0);
    for (int j = n - 1; j >= 0; j--) {
        double diagonal = a[(size_t) j * n + j];
        for (int k = j + 1; k < n; k++) {
            diagonal -= r[(size_t) j * n + k] * r[(size_t) j * n + k];
        }
        if (!(diagonal > 0)) {
            return false;
        }
        r[(size_t) j * n + j] = std::sqrt(diagonal);
        for (int i = 0; i < j; i++) {
            double x = a[(size_t) i * n + j];
            for (int k = j + 1; k < n; k++) {
                x -= r[(size_t) i * n + k] * r[(size_t) j * n + k];
            }
            r[(size_t) i * n + j] = x / r[(size_t) j * n + j];
        }
    }
    u.assign((size_t) n * n, 0.0);
    for (int j = 0; j < n; j++) {  // columns of the inverse, by back substitution
        for (int i = j; i >= 0; i--) {
            double x = i == j ? 1.0 : 0.0;
            for (int k = i + 1; k <= j; k++) {
                x -= r[(size_t) i * n + k] * u[(size_t) k * n + j];
            }
            u[(size_t) i * n + j] = x / r[(size_t) i * n + i];
        }
    }
    return true;
}

// A range of columns as the codes see it: `u` the factor of the inverse metric, and for every group its own metric.
struct Local {
    int                n = 0;
    std::vector<float> u;                  // [n, n]: error of a column, as the later ones have to make up for it
    std::vector<float> metric;             // [n / GROUP][GROUP, GROUP], later columns free
    std::vector<float> inverse;            // [n / GROUP][GROUP, GROUP]: inverse of the group's block of u
    std::vector<vf>    entry_cost;         // ternary: [n / GROUP][entries / LANES] the metric of every entry

    void set(const Format & f, const double * u_full, int ld, int at, int width) {
        n = width;
        u.resize((size_t) n * n);
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < n; j++) {
                u[(size_t) i * n + j] = (float) u_full[(size_t) (at + i) * ld + at + j];
            }
        }
        if (f.kind == Kind::scalar) {
            return;
        }
        metric.assign((size_t) n * GROUP, 0.0f);
        inverse.assign((size_t) n * GROUP, 0.0f);
        for (int g = 0; g < n / GROUP; g++) {
            double r[GROUP][GROUP] = {};
            for (int j = 0; j < GROUP; j++) {
                for (int i = j; i >= 0; i--) {
                    double x = i == j ? 1.0 : 0.0;
                    for (int k = i + 1; k <= j; k++) {
                        x -= u_full[(size_t) (at + g * GROUP + i) * ld + at + g * GROUP + k] * r[k][j];
                    }
                    r[i][j] = x / u_full[(size_t) (at + g * GROUP + i) * ld + at + g * GROUP + i];
                }
            }
            for (int i = 0; i < GROUP; i++) {
                for (int j = 0; j < GROUP; j++) {
                    double x = 0;
                    for (int k = std::max(i, j); k < GROUP; k++) {
                        x += r[i][k] * r[j][k];
                    }
                    metric[(size_t) (g * GROUP + i) * GROUP + j]  = (float) x;
                    inverse[(size_t) (g * GROUP + i) * GROUP + j] = (float) r[i][j];
                }
            }
        }
        if (f.kind == Kind::ternary) {
            price_entries(grid8(f.type));
        }
    }

    void price_entries(const Grid<8> & grid) {
        entry_cost.resize((size_t) n / GROUP * grid.n_vec);
        for (int g = 0; g < n / GROUP; g++) {
            const float * m = &metric[(size_t) g * GROUP * GROUP];
            for (int k = 0; k < grid.n_vec; k++) {
                const vf * e    = &grid.table[(size_t) k * GROUP];
                vf         cost = {};
                for (int i = 0; i < GROUP; i++) {
                    vf sum = {};
                    for (int j = 0; j < GROUP; j++) {
                        sum += m[i * GROUP + j] * e[j];
                    }
                    cost += sum * e[i];
                }
                entry_cost[(size_t) g * grid.n_vec + k] = cost;
            }
        }
    }
};

}  // namespace

struct mc_metric {
    const Format *     format;
    int                n;
    std::vector<float> s;             // [n, n]
    Local              whole;         // for the greedy pass
    std::vector<Local> sub;           // each sub-block with all others fixed
    std::vector<float> sub_inverse;   // [n / sub][sub, sub] inverse of the sub-block's s
    std::vector<Local> group;         // each group with all others fixed
    std::vector<float> group_inverse; // [n / GROUP][GROUP, GROUP]
};

namespace {

// ------------------------------------------------------------------------------------------------- nearest codebook entry

struct Pick {
    float    cost;     // q m q' - 2 q m x', q in units of the scale
    uint16_t code[2];
    uint8_t  sign;
    float    q[GROUP];
};

template <int D> struct Entry {
    float cost;
    int   index;
};

template <int D> Entry<D> least(const vf & cost, const vi & index) {
    Entry<D> best = { cost[0], index[0] };
    for (int l = 1; l < LANES; l++) {
        if (cost[l] < best.cost || (cost[l] == best.cost && index[l] < best.index)) {
            best = { cost[l], index[l] };
        }
    }
    return best;
}

// The entry g with the least g m g' - 2 g v'; m [D, D] symmetric.
template <int D> Entry<D> best_entry(const Grid<D> & grid, const float (*m)[D], const float * v) {
    vf best = splat(INFINITY);
    vi index = {}, at;
    for (int l = 0; l < LANES; l++) {
        at[l] = l;
    }
    for (int k = 0; k < grid.n_vec; k++) {
        const vf * e    = &grid.table[(size_t) k * D];
        vf         cost = {};
        for (int i = 0; i < D; i++) {
            vf sum = m[i][i] * e[i] - 2.0f * v[i];
            for (int j = i + 1; j < D; j++) {
                sum += 2.0f * m[i][j] * e[j];
            }
            cost += sum * e[i];
        }
        const vi less = cost < best;
        best          = less ? cost : best;
        index         = less ? at : index;
        at += LANES;
    }
    return least<D>(best, index);
}

// As best_entry with the entries' own cost known.
Entry<8> best_priced(const Grid<8> & grid, const vf * price, const float * v) {
    vf best = splat(INFINITY);
    vi index = {}, at;
    for (int l = 0; l < LANES; l++) {
        at[l] = l;
    }
    for (int k = 0; k < grid.n_vec; k++) {
        const vf * e    = &grid.table[(size_t) k * 8];
        vf         cost = price[k];
        for (int i = 0; i < 8; i++) {
            cost -= 2.0f * v[i] * e[i];
        }
        const vi less = cost < best;
        best          = less ? cost : best;
        index         = less ? at : index;
        at += LANES;
    }
    return least<8>(best, index);
}

// q m q' - 2 q v', v = m x'
float form(const float * m, const float * q, const float * v) {
    float total = 0;
    for (int i = 0; i < GROUP; i++) {
        float sum = -2.0f * v[i];
        for (int j = 0; j < GROUP; j++) {
            sum += m[i * GROUP + j] * q[j];
        }
        total += sum * q[i];
    }
    return total;
}

// Flips signs of q (pairs of them where their parity counts) as long as that lowers the form; true if it did.
bool flip_signs(const Format & f, const float * m, const float * v, float * q, uint8_t & sign) {
    bool changed = false;
    for (int round = 0; round < 4; round++) {
        float slope[GROUP], gain[GROUP];
        for (int i = 0; i < GROUP; i++) {
            float sum = -v[i];
            for (int j = 0; j < GROUP; j++) {
                sum += m[i * GROUP + j] * q[j];
            }
            slope[i] = sum;
            gain[i]  = 4 * q[i] * (q[i] * m[i * GROUP + i] - slope[i]);  // of q_i -> -q_i
        }
        float best = -1e-6f * m[0];
        int   a = -1, b = -1;
        for (int i = 0; i < GROUP; i++) {
            if (!f.parity && gain[i] < best) {
                best = gain[i], a = i, b = -1;
            }
            for (int j = 0; j < i; j++) {
                const float both = gain[i] + gain[j] + 8 * q[i] * q[j] * m[i * GROUP + j];
                if (both < best) {
                    best = both, a = i, b = j;
                }
            }
        }
        if (a < 0) {
            break;
        }
        changed = true;
        for (int i : { a, b }) {
            if (i >= 0) {
                q[i] = -q[i];
                sign ^= (uint8_t) (1 << i);
            }
        }
    }
    return changed;
}

struct Search {
    const Format & f;
    const float *  m;  // [GROUP, GROUP]

    // Magnitudes for given signs.
    void entries8(const float * v, Pick & p) const {
        float sm[8][8], sv[8];
        for (int i = 0; i < 8; i++) {
            const float si = p.sign >> i & 1 ? -1.0f : 1.0f;
            sv[i]          = si * v[i];
            for (int j = 0; j < 8; j++) {
                sm[i][j] = (p.sign >> j & 1 ? -si : si) * m[i * 8 + j];
            }
        }
        const Grid<8> & grid = grid8(f.type);
        p.code[0]            = (uint16_t) best_entry<8>(grid, sm, sv).index;
        for (int i = 0; i < 8; i++) {
            p.q[i] = grid.at(p.code[0], i) * (p.sign >> i & 1 ? -1.0f : 1.0f);
        }
    }

    // One half after the other, the other one as it is in p.q.
    void entries4(const float * v, Pick & p) const {
        const Grid<4> & grid = grid4(f.type);
        for (int h = 0; h < 2; h++) {
            float sm[4][4], sv[4];
            for (int i = 0; i < 4; i++) {
                const float si = p.sign >> (4 * h + i) & 1 ? -1.0f : 1.0f;
                float       x  = v[4 * h + i];
                for (int j = 0; j < 4; j++) {
                    x -= m[(4 * h + i) * 8 + 4 * (1 - h) + j] * p.q[4 * (1 - h) + j];
                    sm[i][j] = (p.sign >> (4 * h + j) & 1 ? -si : si) * m[(4 * h + i) * 8 + 4 * h + j];
                }
                sv[i] = si * x;
            }
            p.code[h] = (uint16_t) best_entry<4>(grid, sm, sv).index;
            for (int i = 0; i < 4; i++) {
                p.q[4 * h + i] = grid.at(p.code[h], i) * (p.sign >> (4 * h + i) & 1 ? -1.0f : 1.0f);
            }
        }
    }

    // A local minimum of the form from the given signs: magnitudes and signs in turn.
    Pick descend(const float * x, const float * v, uint8_t sign) const {
        Pick p = { 0, { 0, 0 }, sign, {} };
        for (int i = 0; i < GROUP; i++) {
            p.q[i] = x[i];
        }
        for (int round = 0; round < 4; round++) {
            const Pick before = p;
            f.kind == Kind::grid8 ? entries8(v, p) : entries4(v, p);
            const bool flipped = flip_signs(f, m, v, p.q, p.sign);
            const bool same    = p.code[0] == before.code[0] && p.code[1] == before.code[1];
            if (!flipped && (f.kind == Kind::grid8 || (round > 0 && same))) {
                break;
            }
        }
        p.cost = form(m, p.q, v);
        return p;
    }

    // The best found for the target x, in units of the scale.
    Pick nearest(const float * x) const {
        float   v[GROUP];
        uint8_t sign = 0;
        for (int i = 0; i < GROUP; i++) {
            float sum = 0;
            for (int j = 0; j < GROUP; j++) {
                sum += m[i * GROUP + j] * x[j];
            }
            v[i] = sum;
            sign |= (uint8_t) ((x[i] < 0) << i);
        }
        if (!f.parity || __builtin_popcount(sign) % 2 == 0) {
            return descend(x, v, sign);
        }
        int   order[2] = { -1, -1 };  // the two signs that cost least to flip
        for (int i = 0; i < GROUP; i++) {
            const auto price = [&](int k) { return x[k] * x[k] * m[k * GROUP + k]; };
            if (order[0] < 0 || price(i) < price(order[0])) {
                order[1] = order[0], order[0] = i;
            } else if (order[1] < 0 || price(i) < price(order[1])) {
                order[1] = i;
            }
        }
        const Pick a = descend(x, v, sign ^ (uint8_t) (1 << order[0]));
        const Pick b = descend(x, v, sign ^ (uint8_t) (1 << order[1]));
        return b.cost < a.cost ? b : a;
    }
};

// The nearest ternary entry plus shift (of either sign, or of the given one: +1, -1).
Pick nearest_ternary(const Format & f, const float * m, const vf * price, const float * x, int shift) {
    const Grid<8> & grid = grid8(f.type);
    Pick            best = { INFINITY, { 0, 0 }, 0, {} };
    for (int s : { 1, -1 }) {
        if (shift && s != shift) {
            continue;
        }
        float       v[GROUP], constant = 0;
        const float delta = s * IQ1S_DELTA;
        for (int i = 0; i < GROUP; i++) {
            float sum = 0;
            for (int j = 0; j < GROUP; j++) {
                sum += m[i * GROUP + j] * (x[j] - delta);
            }
            v[i] = sum;
        }
        for (int i = 0; i < GROUP; i++) {  // of q m q' - 2 q m x' what does not depend on the entry
            float sum = 0;
            for (int j = 0; j < GROUP; j++) {
                sum += m[i * GROUP + j] * (delta - 2 * x[j]);
            }
            constant += delta * sum;
        }
        const Entry<8> e = best_priced(grid, price, v);
        if (e.cost + constant < best.cost) {
            best.cost    = e.cost + constant;
            best.code[0] = (uint16_t) e.index;
            best.sign    = s < 0;
            for (int i = 0; i < GROUP; i++) {
                best.q[i] = grid.at(e.index, i) + delta;
            }
        }
    }
    return best;
}

Pick nearest(const Format & f, const Local & local, int group, const float * x, int shift) {
    const float * m = &local.metric[(size_t) group * GROUP * GROUP];
    if (f.kind == Kind::ternary) {
        return nearest_ternary(f, m, &local.entry_cost[(size_t) group * grid8(f.type).n_vec], x, shift);
    }
    return Search{ f, m }.nearest(x);
}

// ------------------------------------------------------------------------------------------------------- a sub-block

struct Scale {
    int   sc, mn;
    float a, b;   // value = a * code value - b; grids: a * (entry + shift)
    float d;      // the block's d where it is the scale
};

// One sub-block quantized.
struct Fit {
    float    loss = INFINITY;
    Scale    scale;
    uint16_t code[32];
    uint8_t  sign[4];
    float    q[32];
};

Scale make_scale(const Format & f, const Row & row, int sub, int sc, int mn) {
    const float d = row.d[f.block == 32 ? sub : 0];
    const bool  has_min = f.kind == Kind::scalar && f.mn_hi > 0;
    return { sc, mn, d * scale_factor(f, sc), has_min ? row.dmin * mn : 0.0f, d };
}

// Scales to try for a sub-block; the first is what it has.
int list_scales(const Format & f, const Row & row, int sub, Scale * list) {
    int       n   = 0;
    const int sc0 = row.sc[sub], mn0 = row.mn[sub];
    list[n++]     = make_scale(f, row, sub, sc0, mn0);
    if (f.block == 32) {
        for (int step = -7; step <= 7; step++) {
            if (step) {
                Scale s = list[0];
                s.a = s.d = ggml_fp16_to_fp32(ggml_fp32_to_fp16(list[0].d * (1 + 0.02f * step)));
                list[n++] = s;
            }
        }
        return n;
    }
    for (int sc = std::max(f.sc_lo, sc0 - f.sc_reach); sc <= std::min(f.sc_hi, sc0 + f.sc_reach); sc++) {
        for (int mn = std::max(0, mn0 - f.mn_reach); mn <= std::min(f.mn_hi, mn0 + f.mn_reach); mn++) {
            if (sc != sc0 || mn != mn0) {
                list[n++] = make_scale(f, row, sub, sc, mn);
            }
        }
    }
    return n;
}

vf nearest_code(const Format & f, vf x) {  // x in units of the scale
    if (f.zero < 0) {
        vf code = {};
        for (int k = 0; k + 1 < f.codes; k++) {
            code += x > 0.5f * (kvalues_iq4nl[k] + kvalues_iq4nl[k + 1]) ? splat(1) : splat(0);
        }
        return code;
    }
    x += (float) f.zero + 0.5f;
    x = x < 0.5f ? splat(0.5f) : x;
    const float top = f.codes - 0.5f;
    x               = x > top ? splat(top) : x;
    return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
}

vf value_of(const Format & f, vf code) {
    if (f.zero >= 0) {
        return code - (float) f.zero;
    }
    vf value = {};
    for (int l = 0; l < LANES; l++) {
        value[l] = kvalues_iq4nl[(int) code[l]];
    }
    return value;
}

// Columns one after the other with feedback, LANES scales at once.
void fit_scalar(const Format & f, const float * u, int ld, const float * t, int n, const Scale * list, int count, Fit & best) {
    for (int first = 0; first < count; first += LANES) {
        vf a = {}, inverse = {}, b = {}, loss = {}, left[32], code[32];
        for (int l = 0; l < LANES; l++) {
            const Scale & s = list[std::min(first + l, count - 1)];
            a[l] = s.a, b[l] = s.b, inverse[l] = s.a != 0 ? 1 / s.a : 0;
        }
        for (int j = 0; j < n; j++) {
            left[j] = splat(t[j]);
        }
        for (int j = 0; j < n; j++) {
            code[j]        = nearest_code(f, (left[j] + b) * inverse);
            const vf error = (left[j] - (a * value_of(f, code[j]) - b)) * (1 / u[(size_t) j * ld + j]);
            loss += error * error;
            for (int k = j + 1; k < n; k++) {
                left[k] -= error * u[(size_t) j * ld + k];
            }
        }
        for (int l = 0; l < LANES && first + l < count; l++) {
            if (loss[l] < best.loss) {
                best.loss  = loss[l];
                best.scale = list[first + l];
                for (int j = 0; j < n; j++) {
                    best.code[j] = (uint16_t) code[j][l];
                }
            }
        }
    }
    for (int j = 0; j < n; j++) {
        best.q[j] = best.scale.a * code_value(f, best.code[j]) - best.scale.b;
    }
}

// Groups one after the other with feedback, for one scale.
void fit_groups(const Format & f, const Local & local, int at, const float * t, int n, const Scale & scale, Fit & best) {
    Fit fit;
    fit.loss  = 0;
    fit.scale = scale;
    float       left[32];
    const int   ld      = local.n;
    const float inverse = scale.a != 0 ? 1 / scale.a : 0;
    const int   shift   = f.type == GGML_TYPE_IQ1_S ? (scale.mn ? -1 : 1) : 0;
    memcpy(left, t, n * sizeof(float));
    for (int g = 0; g < n / GROUP && fit.loss < best.loss; g++) {
        float x[GROUP], error[GROUP];
        for (int i = 0; i < GROUP; i++) {
            x[i] = left[g * GROUP + i] * inverse;
        }
        const int  number = at / GROUP + g;
        const Pick p      = nearest(f, local, number, x, shift);
        fit.sign[g]       = p.sign;
        if (f.kind == Kind::grid4) {
            fit.code[2 * g] = p.code[0], fit.code[2 * g + 1] = p.code[1];
        } else {
            fit.code[g] = p.code[0];
        }
        const float * r = &local.inverse[(size_t) number * GROUP * GROUP];
        for (int i = 0; i < GROUP; i++) {
            fit.q[g * GROUP + i] = scale.a * p.q[i];
            x[i]                 = left[g * GROUP + i] - fit.q[g * GROUP + i];
        }
        for (int i = 0; i < GROUP; i++) {
            error[i] = 0;
            for (int k = 0; k <= i; k++) {
                error[i] += x[k] * r[k * GROUP + i];
            }
            fit.loss += error[i] * error[i];
        }
        for (int i = 0; i < GROUP; i++) {
            const float * row = &local.u[(size_t) (at + g * GROUP + i) * ld + at];
            for (int k = (g + 1) * GROUP; k < n; k++) {
                left[k] -= error[i] * row[k];
            }
        }
    }
    if (fit.loss < best.loss) {
        best = fit;
    }
}

// The best codes found for a sub-block's target t, over the given scales; `at` is its first column in `local`.
Fit fit_sub(const Format & f, const Local & local, int at, const float * t, int n, const Scale * list, int count) {
    Fit best;
    if (f.kind == Kind::scalar) {
        fit_scalar(f, &local.u[(size_t) at * local.n + at], local.n, t, n, list, count, best);
    } else {
        for (int i = 0; i < count; i++) {
            fit_groups(f, local, at, t, n, list[i], best);
        }
    }
    return best;
}

// ------------------------------------------------------------------------------------------------------------- a row

struct Work {
    const mc_metric & metric;
    const Format &    f;
    int               n, n_sub;
    const float *     w;
    Row               row;
    float             q[MAX_COLS];
    float             slope[MAX_COLS];  // s (w - q)
    float             loss = 0;

    Work(const mc_metric & m, const float * weights) :
        metric(m), f(*m.format), n(m.n), n_sub(m.n / m.format->sub), w(weights), row() {}

    void store(int sub, const Fit & fit) {
        row.sc[sub] = fit.scale.sc;
        row.mn[sub] = fit.scale.mn;
        if (f.block == 32) {
            row.d[sub] = fit.scale.d;
        }
        const int groups = f.sub / GROUP, per = f.kind == Kind::scalar ? f.sub : f.kind == Kind::grid4 ? 2 * groups : groups;
        memcpy(row.code + sub * per, fit.code, per * sizeof(uint16_t));
        if (f.kind != Kind::scalar) {
            memcpy(row.sign + sub * groups, fit.sign, groups);
        }
        memcpy(q + sub * f.sub, fit.q, f.sub * sizeof(float));
    }

    // Weights that the row's codes stand for.
    void values(const Row & r, float * out) const {
        for (int c = 0; c < n; c++) {
            const int   sub = c / f.sub, g = c / GROUP, i = c % GROUP;
            const Scale s = make_scale(f, r, sub, r.sc[sub], r.mn[sub]);
            switch (f.kind) {
                case Kind::scalar: out[c] = s.a * code_value(f, r.code[c]) - s.b; break;
                case Kind::grid8:  out[c] = s.a * grid8(f.type).at(r.code[g], i) * (r.sign[g] >> i & 1 ? -1.0f : 1.0f); break;
                case Kind::grid4:
                    out[c] = s.a * grid4(f.type).at(r.code[2 * g + i / 4], i % 4) * (r.sign[g] >> i & 1 ? -1.0f : 1.0f);
                    break;
                case Kind::ternary: {
                    const bool minus = f.type == GGML_TYPE_IQ1_S ? r.mn[sub] : r.sign[g];
                    out[c]           = s.a * (grid8(f.type).at(r.code[g], i) + (minus ? -IQ1S_DELTA : IQ1S_DELTA));
                    break;
                }
            }
        }
    }

    void greedy() {
        Scale list[1024];
        float left[MAX_COLS];
        memcpy(left, w, n * sizeof(float));
        const float * u = metric.whole.u.data();
        for (int sub = 0; sub < n_sub; sub++) {
            const int at = sub * f.sub, end = at + f.sub;
            const Fit fit = fit_sub(f, metric.whole, at, left + at, f.sub, list, list_scales(f, row, sub, list));
            store(sub, fit);
            for (int j = at; j < end; j++) {
                const float   error = (left[j] - q[j]) / u[(size_t) j * n + j];
                const float * r     = u + (size_t) j * n;
                for (int k = j + 1; k < n; k++) {
                    left[k] -= error * r[k];
                }
            }
        }
    }

    // Slope and loss of the current q.
    void evaluate() {
        float e[MAX_COLS];
        for (int c = 0; c < n; c++) {
            e[c]     = w[c] - q[c];
            slope[c] = 0;
        }
        for (int j = 0; j < n; j++) {
            const float * r = &metric.s[(size_t) j * n];
            for (int c = 0; c < n; c++) {
                slope[c] += e[j] * r[c];
            }
        }
        loss = 0;
        for (int c = 0; c < n; c++) {
            loss += e[c] * slope[c];
        }
    }

    // New weights in columns [at, at + count); `gain` is by how much that lowers the loss.
    void change(int at, int count, const float * fresh, float gain) {
        for (int j = at; j < at + count; j++) {
            const float delta = q[j] - fresh[j - at];
            if (delta != 0) {
                const float * r = &metric.s[(size_t) j * n];
                for (int c = 0; c < n; c++) {
                    slope[c] += delta * r[c];
                }
            }
        }
        memcpy(q + at, fresh, count * sizeof(float));
        loss -= gain;
    }

    // Target of columns [at, at + count) when all others stay: w + inverse(s_bb) s_b,other e_other; and the loss of the
    // current q against it, in the metric s_bb.
    float target(int at, int count, const float * inverse, float * t) const {
        float outside[32], e[32], own = 0;
        for (int i = 0; i < count; i++) {
            e[i] = w[at + i] - q[at + i];
        }
        for (int i = 0; i < count; i++) {
            const float * r   = &metric.s[(size_t) (at + i) * n + at];
            float         sum = slope[at + i];
            for (int j = 0; j < count; j++) {
                sum -= r[j] * e[j];
            }
            outside[i] = sum;
        }
        for (int i = 0; i < count; i++) {
            float sum = w[at + i];
            for (int j = 0; j < count; j++) {
                sum += inverse[i * count + j] * outside[j];
            }
            t[i] = sum;
        }
        for (int i = 0; i < count; i++) {
            const float * r   = &metric.s[(size_t) (at + i) * n + at];
            float         sum = 0;
            for (int j = 0; j < count; j++) {
                sum += r[j] * (t[j] - q[at + j]);
            }
            own += sum * (t[i] - q[at + i]);
        }
        return own;
    }

    void improve_subs() {
        Scale list[1024];
        float t[32];
        for (int sub = 0; sub < n_sub; sub++) {
            const int   at  = sub * f.sub;
            const float own = target(at, f.sub, &metric.sub_inverse[(size_t) sub * f.sub * f.sub], t);
            const Fit   fit = fit_sub(f, metric.sub[sub], 0, t, f.sub, list, list_scales(f, row, sub, list));
            if (fit.loss < own * (1 - 1e-5f)) {
                float fresh[32];
                memcpy(fresh, fit.q, f.sub * sizeof(float));
                change(at, f.sub, fresh, own - fit.loss);
                store(sub, fit);
            }
        }
    }

    void improve_columns() {
        for (int c = 0; c < n; c++) {
            const int   sub = c / f.sub;
            const Scale s   = make_scale(f, row, sub, row.sc[sub], row.mn[sub]);
            if (s.a == 0) {
                continue;
            }
            const float diagonal = metric.s[(size_t) c * n + c];
            const float t        = q[c] + slope[c] / diagonal;
            const int   code     = nearest_one(f, (t + s.b) / s.a);
            if (code != row.code[c]) {
                const float fresh = s.a * code_value(f, code) - s.b;
                const float gain  = diagonal * ((t - q[c]) * (t - q[c]) - (t - fresh) * (t - fresh));
                if (gain > 0) {
                    change(c, 1, &fresh, gain);
                    row.code[c] = (uint16_t) code;
                }
            }
        }
    }

    static int nearest_one(const Format & f, float x) {
        if (f.zero >= 0) {
            return std::clamp((int) std::lround(std::clamp(x, -1000.0f, 1000.0f)) + f.zero, 0, f.codes - 1);
        }
        int code = 0;
        while (code + 1 < f.codes && x > 0.5f * (kvalues_iq4nl[code] + kvalues_iq4nl[code + 1])) {
            code++;
        }
        return code;
    }

    void improve_groups() {
        for (int g = 0; g < n / GROUP; g++) {
            const int   at = g * GROUP, sub = at / f.sub;
            const Scale s  = make_scale(f, row, sub, row.sc[sub], row.mn[sub]);
            if (s.a == 0) {
                continue;
            }
            float       t[GROUP], x[GROUP], fresh[GROUP];
            const float own = target(at, GROUP, &metric.group_inverse[(size_t) g * GROUP * GROUP], t);
            for (int i = 0; i < GROUP; i++) {
                x[i] = t[i] / s.a;
            }
            const int  shift = f.type == GGML_TYPE_IQ1_S ? (row.mn[sub] ? -1 : 1) : 0;
            const Pick p     = nearest(f, metric.group[g], 0, x, shift);
            float      after = 0;
            for (int i = 0; i < GROUP; i++) {
                fresh[i] = s.a * p.q[i];
            }
            for (int i = 0; i < GROUP; i++) {
                float sum = 0;
                for (int j = 0; j < GROUP; j++) {
                    sum += metric.s[(size_t) (at + i) * n + at + j] * (t[j] - fresh[j]);
                }
                after += sum * (t[i] - fresh[i]);
            }
            if (after < own * (1 - 1e-5f)) {
                change(at, GROUP, fresh, own - after);
                row.sign[g] = p.sign;
                if (f.kind == Kind::grid4) {
                    row.code[2 * g] = p.code[0], row.code[2 * g + 1] = p.code[1];
                } else {
                    row.code[g] = p.code[0];
                }
            }
        }
    }

    // Super-block scales d (and dmin) by least squares, the codes as they are.
    void refit() {
        if (f.block == 32) {
            return;
        }
        Row unit = row;
        unit.d[0] = 1, unit.dmin = 0;
        float p[MAX_COLS], r[MAX_COLS] = {}, sp[MAX_COLS] = {}, sr[MAX_COLS] = {};
        values(unit, p);
        const bool has_min = f.kind == Kind::scalar && f.mn_hi > 0;
        for (int c = 0; c < n && has_min; c++) {
            r[c] = -(float) row.mn[c / f.sub];
        }
        for (int j = 0; j < n; j++) {
            const float * s = &metric.s[(size_t) j * n];
            for (int c = 0; c < n; c++) {
                sp[c] += p[j] * s[c];
            }
            if (has_min) {
                for (int c = 0; c < n; c++) {
                    sr[c] += r[j] * s[c];
                }
            }
        }
        double pp = 0, pr = 0, rr = 0, pe = 0, re = 0;  // products with the error w - q
        for (int c = 0; c < n; c++) {
            pp += (double) p[c] * sp[c];
            pr += (double) p[c] * sr[c];
            rr += (double) r[c] * sr[c];
            pe += (double) p[c] * slope[c];
            re += (double) r[c] * slope[c];
        }
        if (!(pp > 0)) {
            return;
        }
        const double det = pp * rr - pr * pr;
        double       dd = pe / pp, dm = 0;
        if (det > 1e-6 * pp * rr) {
            dd = (pe * rr - re * pr) / det;
            dm = (re * pp - pe * pr) / det;
        }
        Row fresh  = row;
        fresh.d[0] = ggml_fp16_to_fp32(ggml_fp32_to_fp16(row.d[0] + (float) dd));
        fresh.dmin = ggml_fp16_to_fp32(ggml_fp32_to_fp16(row.dmin + (float) dm));
        if (!std::isfinite(fresh.d[0]) || !std::isfinite(fresh.dmin) || (fresh.d[0] == row.d[0] && fresh.dmin == row.dmin)) {
            return;
        }
        const double ed = fresh.d[0] - row.d[0], em = fresh.dmin - row.dmin;
        const double gain = 2 * ed * pe + 2 * em * re - ed * ed * pp - 2 * ed * em * pr - em * em * rr;
        if (gain > 0) {
            row = fresh;
            values(row, q);
            evaluate();
        }
    }

    void run(uint8_t * blocks, float * out, bool from_scratch, int passes) {
        const size_t bytes = ggml_type_size(f.type);
        for (int b = 0; b < n / f.block; b++) {
            Codec{ true, row }.block(f.type, blocks + b * bytes, b);
        }
        if (from_scratch) {
            greedy();
        }
        values(row, q);
        if (passes) {
            evaluate();
        }
        for (int pass = 0; pass < passes; pass++) {
            const float before = loss;
            refit();
            improve_subs();
            f.kind == Kind::scalar ? improve_columns() : improve_groups();
            if (!(loss < before * (1 - 1e-3f))) {
                break;
            }
        }
        values(row, q);
        for (int b = 0; b < n / f.block; b++) {
            Codec{ false, row }.block(f.type, blocks + b * bytes, b);
        }
        memcpy(out, q, n * sizeof(float));
    }
};

// Inverse of the metric of `count` columns at `at`, and how the codes see them.
bool prepare(const Format & f, const double * s, int n, int at, int count, Local & local, float * inverse) {
    std::vector<double> own((size_t) count * count), u;
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < count; j++) {
            own[(size_t) i * count + j] = s[(size_t) (at + i) * n + at + j];
        }
    }
    if (!inverse_factor(own.data(), count, u)) {
        return false;
    }
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < count; j++) {
            double sum = 0;
            for (int k = 0; k <= std::min(i, j); k++) {
                sum += u[(size_t) k * count + i] * u[(size_t) k * count + j];
            }
            inverse[(size_t) i * count + j] = (float) sum;
        }
    }
    local.set(f, u.data(), count, 0, count);
    return true;
}

}  // namespace

int mc_quantize_supports(int type) {
    return find_format(type) != nullptr;
}

mc_metric * mc_metric_create(int type, int n, const float * s) {
    const Format * f = find_format(type);
    if (!f || n < f->block || n > MAX_COLS || n % f->block) {
        return nullptr;
    }
    auto metric    = std::make_unique<mc_metric>();
    metric->format = f;
    metric->n      = n;
    metric->s.assign(s, s + (size_t) n * n);
    const std::vector<double> full(s, s + (size_t) n * n);
    std::vector<double>       u;
    if (!inverse_factor(full.data(), n, u)) {
        return nullptr;
    }
    metric->whole.set(*f, u.data(), n, 0, n);
    metric->sub.resize(n / f->sub);
    metric->sub_inverse.resize((size_t) n * f->sub);
    for (int i = 0; i < n / f->sub; i++) {
        float * inverse = &metric->sub_inverse[(size_t) i * f->sub * f->sub];
        if (!prepare(*f, full.data(), n, i * f->sub, f->sub, metric->sub[i], inverse)) {
            return nullptr;
        }
    }
    if (f->kind != Kind::scalar) {
        metric->group.resize(n / GROUP);
        metric->group_inverse.resize((size_t) n * GROUP);
        for (int g = 0; g < n / GROUP; g++) {
            float * inverse = &metric->group_inverse[(size_t) g * GROUP * GROUP];
            if (!prepare(*f, full.data(), n, g * GROUP, GROUP, metric->group[g], inverse)) {
                return nullptr;
            }
        }
    }
    return metric.release();
}

void mc_metric_free(mc_metric * metric) {
    delete metric;
}

void mc_quantize_rows(
        const mc_metric * metric, int64_t rows, const float * w, int64_t ldw, uint8_t * blocks, int64_t stride, float * q,
        int64_t ldq, int greedy, int passes) {
    for (int64_t i = 0; i < rows; i++) {
        Work(*metric, w + i * ldw).run(blocks + i * stride, q + i * ldq, greedy != 0, passes);
    }
}

void mc_scale_rows(int type, int64_t rows, int64_t n, uint8_t * blocks, int64_t stride, const float * factor) {
    const Format * f = find_format(type);
    if (!f) {
        return;
    }
    const size_t bytes = ggml_type_size(f->type);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t b = 0; b < n / f->block; b++) {
            uint8_t * block = blocks + i * stride + b * bytes;
            Row       row   = {};
            Codec{ true, row }.block(f->type, block, 0);
            row.d[0] *= factor[i];
            row.dmin *= factor[i];
            Codec{ false, row }.block(f->type, block, 0);
        }
    }
}
