// Blocks to rows and back: the layouts of ggml-common.h, as the dequantize functions in ggml-quants.c read them.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "mc-quantize-impl.h"

namespace mc {

namespace {

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

}  // namespace

void read_block(ggml_type type, const uint8_t * block, int i, Row & row) {
    Codec{ true, row }.block(type, (uint8_t *) block, i);
}

void write_block(ggml_type type, uint8_t * block, int i, Row & row) {
    Codec{ false, row }.block(type, block, i);
}

}  // namespace mc
