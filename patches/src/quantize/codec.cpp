// Between blocks and rows: the layouts of ggml-common.h, as the dequantize functions in ggml-quants.c read them.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "mc-quantize-impl.h"

namespace mc {

namespace {

// Each layout is written down once, as a function of a block and a row, and used in both directions: with block_reader the block is
// const and the row is filled in, with block_writer the row is const and the block is filled in.

template <typename T> uint32_t get_bits(T word, int at, int width) {
    return ((uint32_t) word >> at) & ((1u << width) - 1);
}

template <typename T> void set_bits(T & word, int at, int width, uint32_t value) {
    const T mask = (T) (((1u << width) - 1) << at);
    word         = (T) ((word & ~mask) | ((T) (value << at) & mask));
}

struct block_reader {
    template <typename B> static const B & block(const uint8_t * p) { return *(const B *) p; }

    static const uint8_t * bytes(const uint16_t * p) { return (const uint8_t *) p; }

    template <typename T, typename V> static void field(T word, int at, int width, V & value) {
        value = (V) get_bits(word, at, width);
    }

    // a value whose low and high bits are in two places
    template <typename T, typename U, typename V>
    static void split(T low, int at, int width, U high, int high_at, int high_width, V & value, int bias = 0) {
        value = (V) ((int) (get_bits(low, at, width) | get_bits(high, high_at, high_width) << width) - bias);
    }

    template <typename V> static void byte(int8_t stored, V & value, int bias) { value = (V) (stored + bias); }

    static void half(ggml_half stored, float & value) { value = ggml_fp16_to_fp32(stored); }

    // Seven bits stand for eight signs: the eighth makes the number of minus signs even.
    template <typename T> static void even_signs(T word, int at, uint8_t & sign) {
        const uint32_t seven = get_bits(word, at, 7);
        sign                 = (uint8_t) (seven | (__builtin_popcount(seven) & 1) << 7);
    }

    // 32 bits: the signs of four groups and a scale
    static void signs_and_scale(const uint8_t * p, uint8_t * sign, int & scale) {
        uint32_t word;
        memcpy(&word, p, sizeof(word));
        for (int l = 0; l < 4; l++) {
            even_signs(word, 7 * l, sign[l]);
        }
        field(word, 28, 4, scale);
    }

    // IQ1_M: four words with four scales each, and a quarter of d in the upper bits
    static void scales_and_d(const uint8_t * p, int * scale, float & d) {
        uint16_t word[4];
        memcpy(word, p, sizeof(word));
        uint32_t bits = 0;
        for (int i = 0; i < 4; i++) {
            bits |= get_bits(word[i], 12, 4) << 4 * i;
        }
        half((ggml_half) bits, d);
        for (int s = 0; s < 16; s++) {
            field(word[s / 4], 3 * (s % 4), 3, scale[s]);
        }
    }
};

struct block_writer {
    template <typename B> static B & block(uint8_t * p) { return *(B *) p; }

    static uint8_t * bytes(uint16_t * p) { return (uint8_t *) p; }

    template <typename T, typename V> static void field(T & word, int at, int width, const V & value) {
        set_bits(word, at, width, (uint32_t) value);
    }

    template <typename T, typename U, typename V>
    static void
    split(T & low, int at, int width, U & high, int high_at, int high_width, const V & value, int bias = 0) {
        const int biased = (int) value + bias;
        set_bits(low, at, width, (uint32_t) biased);
        set_bits(high, high_at, high_width, (uint32_t) (biased >> width));
    }

    template <typename V> static void byte(int8_t & stored, const V & value, int bias) {
        stored = (int8_t) (value - bias);
    }

    static void half(ggml_half & stored, const float & value) { stored = ggml_fp32_to_fp16(value); }

    template <typename T> static void even_signs(T & word, int at, const uint8_t & sign) {
        set_bits(word, at, 7, sign);
    }

    static void signs_and_scale(uint8_t * p, const uint8_t * sign, const int & scale) {
        uint32_t word = 0;
        for (int l = 0; l < 4; l++) {
            even_signs(word, 7 * l, sign[l]);
        }
        field(word, 28, 4, scale);
        memcpy(p, &word, sizeof(word));
    }

    static void scales_and_d(uint8_t * p, const int * scale, const float & d) {
        uint16_t  word[4] = {};
        ggml_half bits;
        half(bits, d);
        for (int i = 0; i < 4; i++) {
            set_bits(word[i], 12, 4, (uint32_t) bits >> 4 * i);
        }
        for (int s = 0; s < 16; s++) {
            field(word[s / 4], 3 * (s % 4), 3, scale[s]);
        }
        memcpy(p, word, sizeof(word));
    }
};

template <typename IO, typename Q, typename R> void min_and_scale_k4(Q * q, R & row, int s) {
    if (s < 4) {
        IO::field(q[s], 0, 6, row.sc[s]);
        IO::field(q[s + 4], 0, 6, row.mn[s]);
    } else {
        IO::split(q[s + 4], 0, 4, q[s - 4], 6, 2, row.sc[s]);
        IO::split(q[s + 4], 4, 4, q[s], 6, 2, row.mn[s]);
    }
}

template <typename IO, typename B, typename R> void q2_K(B & b, R & row) {
    IO::half(b.data.data.d, row.d[0]);
    IO::half(b.data.data.dmin, row.dmin);
    for (int s = 0; s < 16; s++) {
        IO::field(b.scales[s], 0, 4, row.sc[s]);
        IO::field(b.scales[s], 4, 4, row.mn[s]);
        for (int l = 0; l < 16; l++) {
            IO::field(b.qs[32 * (s / 8) + 16 * (s % 2) + l], 2 * (s % 8 / 2), 2, row.code[16 * s + l]);
        }
    }
}

template <typename IO, typename B, typename R> void q3_K(B & b, R & row) {
    IO::half(b.d, row.d[0]);
    for (int s = 0; s < 16; s++) {
        IO::split(b.scales[s % 8], 4 * (s / 8), 4, b.scales[8 + s % 4], 2 * (s / 4), 2, row.sc[s], 32);
        for (int l = 0; l < 16; l++) {
            const int byte = 16 * (s % 2) + l;
            IO::split(b.qs[32 * (s / 8) + byte], 2 * (s % 8 / 2), 2, b.hmask[byte], s / 2, 1, row.code[16 * s + l]);
        }
    }
}

template <typename IO, typename B, typename R> void q4_K(B & b, R & row) {
    IO::half(b.data.data.d, row.d[0]);
    IO::half(b.data.data.dmin, row.dmin);
    for (int s = 0; s < 8; s++) {
        min_and_scale_k4<IO>(b.scales, row, s);
        for (int l = 0; l < 32; l++) {
            IO::field(b.qs[32 * (s / 2) + l], 4 * (s % 2), 4, row.code[32 * s + l]);
        }
    }
}

template <typename IO, typename B, typename R> void q5_K(B & b, R & row) {
    IO::half(b.data.data.d, row.d[0]);
    IO::half(b.data.data.dmin, row.dmin);
    for (int s = 0; s < 8; s++) {
        min_and_scale_k4<IO>(b.scales, row, s);
        for (int l = 0; l < 32; l++) {
            IO::split(b.qs[32 * (s / 2) + l], 4 * (s % 2), 4, b.qh[l], s, 1, row.code[32 * s + l]);
        }
    }
}

template <typename IO, typename B, typename R> void q6_K(B & b, R & row) {
    IO::half(b.d, row.d[0]);
    for (int s = 0; s < 16; s++) {
        IO::byte(b.scales[s], row.sc[s], 0);
        for (int l = 0; l < 16; l++) {
            const int n = s / 8, quarter = s % 8 / 2, at = 16 * (s % 2) + l;
            IO::split(b.ql[64 * n + 32 * (quarter % 2) + at], 4 * (quarter / 2), 4, b.qh[32 * n + at], 2 * quarter, 2,
                      row.code[16 * s + l]);
        }
    }
}

template <typename IO, typename B, typename R> void iq4_xs(B & b, R & row) {
    IO::half(b.d, row.d[0]);
    for (int s = 0; s < 8; s++) {
        IO::split(b.scales_l[s / 2], 4 * (s % 2), 4, b.scales_h, 2 * s, 2, row.sc[s], 32);
        for (int l = 0; l < 32; l++) {
            IO::field(b.qs[16 * s + l % 16], 4 * (l / 16), 4, row.code[32 * s + l]);
        }
    }
}

template <typename IO, typename B, typename R> void four_bit(B & b, R & row, int s) {
    IO::half(b.d, row.d[s]);
    for (int l = 0; l < 32; l++) {
        IO::field(b.qs[l % 16], 4 * (l / 16), 4, row.code[32 * s + l]);
    }
}

template <typename IO, typename B, typename R> void q5_0(B & b, R & row, int s) {
    IO::half(b.d, row.d[s]);
    for (int l = 0; l < 32; l++) {
        IO::split(b.qs[l % 16], 4 * (l / 16), 4, b.qh[l / 8], l % 8, 1, row.code[32 * s + l]);
    }
}

template <typename IO, typename B, typename R> void q8_0(B & b, R & row, int s) {
    IO::half(b.d, row.d[s]);
    for (int l = 0; l < 32; l++) {
        IO::byte(b.qs[l], row.code[32 * s + l], 128);
    }
}

template <typename IO, typename B, typename R> void iq2_xxs(B & b, R & row) {
    IO::half(b.d, row.d[0]);
    for (int s = 0; s < 8; s++) {
        auto * p = IO::bytes(b.qs + 4 * s);
        for (int l = 0; l < 4; l++) {
            IO::field(p[l], 0, 8, row.code[4 * s + l]);
        }
        IO::signs_and_scale(p + 4, row.sign + 4 * s, row.sc[s]);
    }
}

template <typename IO, typename B, typename R> void iq2_xs(B & b, R & row) {
    IO::half(b.d, row.d[0]);
    for (int s = 0; s < 16; s++) {
        IO::field(b.scales[s / 2], 4 * (s % 2), 4, row.sc[s]);
    }
    for (int g = 0; g < 32; g++) {
        IO::field(b.qs[g], 0, 9, row.code[g]);
        IO::even_signs(b.qs[g], 9, row.sign[g]);
    }
}

template <typename IO, typename B, typename R> void iq2_s(B & b, R & row) {
    IO::half(b.d, row.d[0]);
    for (int s = 0; s < 16; s++) {
        IO::field(b.scales[s / 2], 4 * (s % 2), 4, row.sc[s]);
    }
    for (int g = 0; g < 32; g++) {
        IO::split(b.qs[g], 0, 8, b.qh[g / 4], 2 * (g % 4), 2, row.code[g]);
        IO::field(b.qs[32 + g], 0, 8, row.sign[g]);
    }
}

template <typename IO, typename B, typename R> void iq3_xxs(B & b, R & row) {
    IO::half(b.d, row.d[0]);
    for (int c = 0; c < 64; c++) {
        IO::field(b.qs[c], 0, 8, row.code[c]);
    }
    for (int s = 0; s < 8; s++) {
        IO::signs_and_scale(b.qs + 64 + 4 * s, row.sign + 4 * s, row.sc[s]);
    }
}

template <typename IO, typename B, typename R> void iq3_s(B & b, R & row) {
    IO::half(b.d, row.d[0]);
    for (int s = 0; s < 8; s++) {
        IO::field(b.scales[s / 2], 4 * (s % 2), 4, row.sc[s]);
    }
    for (int c = 0; c < 64; c++) {
        IO::split(b.qs[c], 0, 8, b.qh[c / 8], c % 8, 1, row.code[c]);
    }
    for (int g = 0; g < 32; g++) {
        IO::field(b.signs[g], 0, 8, row.sign[g]);
    }
}

template <typename IO, typename B, typename R> void iq1_s(B & b, R & row) {
    IO::half(b.d, row.d[0]);
    for (int s = 0; s < 8; s++) {
        IO::field(b.qh[s], 12, 3, row.sc[s]);
        IO::field(b.qh[s], 15, 1, row.mn[s]);
        for (int l = 0; l < 4; l++) {
            IO::split(b.qs[4 * s + l], 0, 8, b.qh[s], 3 * l, 3, row.code[4 * s + l]);
        }
    }
}

template <typename IO, typename B, typename R> void iq1_m(B & b, R & row) {
    IO::scales_and_d(b.scales, row.sc, row.d[0]);
    for (int g = 0; g < 32; g++) {
        IO::split(b.qs[g], 0, 8, b.qh[g / 2], 4 * (g % 2), 3, row.code[g]);
        IO::field(b.qh[g / 2], 4 * (g % 2) + 3, 1, row.sign[g]);
    }
}

template <typename IO, typename P, typename R> void convert_block(ggml_type type, P * p, int i, R & row) {
    switch (type) {
        case GGML_TYPE_Q2_K:
            return q2_K<IO>(IO::template block<block_q2_K>(p), row);
        case GGML_TYPE_Q3_K:
            return q3_K<IO>(IO::template block<block_q3_K>(p), row);
        case GGML_TYPE_Q4_K:
            return q4_K<IO>(IO::template block<block_q4_K>(p), row);
        case GGML_TYPE_Q5_K:
            return q5_K<IO>(IO::template block<block_q5_K>(p), row);
        case GGML_TYPE_Q6_K:
            return q6_K<IO>(IO::template block<block_q6_K>(p), row);
        case GGML_TYPE_IQ4_XS:
            return iq4_xs<IO>(IO::template block<block_iq4_xs>(p), row);
        case GGML_TYPE_IQ4_NL:
            return four_bit<IO>(IO::template block<block_iq4_nl>(p), row, i);
        case GGML_TYPE_Q4_0:
            return four_bit<IO>(IO::template block<block_q4_0>(p), row, i);
        case GGML_TYPE_Q5_0:
            return q5_0<IO>(IO::template block<block_q5_0>(p), row, i);
        case GGML_TYPE_Q8_0:
            return q8_0<IO>(IO::template block<block_q8_0>(p), row, i);
        case GGML_TYPE_IQ2_XXS:
            return iq2_xxs<IO>(IO::template block<block_iq2_xxs>(p), row);
        case GGML_TYPE_IQ2_XS:
            return iq2_xs<IO>(IO::template block<block_iq2_xs>(p), row);
        case GGML_TYPE_IQ2_S:
            return iq2_s<IO>(IO::template block<block_iq2_s>(p), row);
        case GGML_TYPE_IQ3_XXS:
            return iq3_xxs<IO>(IO::template block<block_iq3_xxs>(p), row);
        case GGML_TYPE_IQ3_S:
            return iq3_s<IO>(IO::template block<block_iq3_s>(p), row);
        case GGML_TYPE_IQ1_S:
            return iq1_s<IO>(IO::template block<block_iq1_s>(p), row);
        case GGML_TYPE_IQ1_M:
            return iq1_m<IO>(IO::template block<block_iq1_m>(p), row);
        default:
            return;
    }
}

}  // namespace

void read_block(ggml_type type, const uint8_t * block, int i, block_row & row) {
    convert_block<block_reader>(type, block, i, row);
}

void write_block(ggml_type type, uint8_t * block, int i, const block_row & row) {
    convert_block<block_writer>(type, block, i, row);
}

}  // namespace mc
