// The block formats: how their scales and codes are searched, and their codebooks.

#define GGML_COMMON_DECL_CPP
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"
#include "mc-quantize-impl.h"

namespace mc {

namespace {

const block_format FORMATS[] = {
    { GGML_TYPE_Q4_0,    format_kind::scalar,  32,  32, 0,    0,   0,  16,   8,   false, { 0, 0 }, { 0, 0 } },
    { GGML_TYPE_Q5_0,    format_kind::scalar,  32,  32, 0,    0,   0,  32,   16,  false, { 0, 0 }, { 0, 0 } },
    { GGML_TYPE_Q8_0,    format_kind::scalar,  32,  32, 0,    0,   0,  256,  128, false, { 0, 0 }, { 0, 0 } },
    { GGML_TYPE_IQ4_NL,  format_kind::scalar,  32,  32, 0,    0,   0,  16,   -1,  false, { 0, 0 }, { 0, 0 } },
    { GGML_TYPE_Q2_K,    format_kind::scalar,  256, 16, 0,    15,  15, 4,    0,   false, { 6, 6 }, { 2, 2 } },
    { GGML_TYPE_Q3_K,    format_kind::scalar,  256, 16, -32,  31,  0,  8,    4,   false, { 7, 0 }, { 7, 0 } },
    { GGML_TYPE_Q4_K,    format_kind::scalar,  256, 32, 0,    63,  63, 16,   0,   false, { 4, 4 }, { 2, 2 } },
    { GGML_TYPE_Q5_K,    format_kind::scalar,  256, 32, 0,    63,  63, 32,   0,   false, { 2, 2 }, { 1, 1 } },
    { GGML_TYPE_Q6_K,    format_kind::scalar,  256, 16, -128, 127, 0,  64,   32,  false, { 7, 0 }, { 7, 0 } },
    { GGML_TYPE_IQ4_XS,  format_kind::scalar,  256, 32, -32,  31,  0,  16,   -1,  false, { 7, 0 }, { 7, 0 } },
    { GGML_TYPE_IQ2_XXS, format_kind::grid8,   256, 32, 0,    15,  0,  256,  0,   true,  { 2, 0 }, { 2, 0 } },
    { GGML_TYPE_IQ2_XS,  format_kind::grid8,   256, 16, 0,    15,  0,  512,  0,   true,  { 2, 0 }, { 2, 0 } },
    { GGML_TYPE_IQ2_S,   format_kind::grid8,   256, 16, 0,    15,  0,  1024, 0,   false, { 2, 0 }, { 2, 0 } },
    { GGML_TYPE_IQ3_XXS, format_kind::grid4,   256, 32, 0,    15,  0,  256,  0,   true,  { 2, 0 }, { 2, 0 } },
    { GGML_TYPE_IQ3_S,   format_kind::grid4,   256, 32, 0,    15,  0,  512,  0,   false, { 2, 0 }, { 2, 0 } },
    { GGML_TYPE_IQ1_S,   format_kind::ternary, 256, 32, 0,    7,   1,  2048, 0,   false, { 1, 1 }, { 1, 1 } },
    { GGML_TYPE_IQ1_M,   format_kind::ternary, 256, 16, 0,    7,   0,  2048, 0,   false, { 1, 0 }, { 1, 0 } },
};

}  // namespace

const float IQ1_SHIFT = IQ1S_DELTA;

const block_format * find_format(int type) {
    for (const block_format & f : FORMATS) {
        if (f.type == type) {
            return &f;
        }
    }
    return nullptr;
}

scale_mapping scale_mapping_of(const block_format & f) {
    switch (f.type) {
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:
            return { 0.125f, 0.25f };
        case GGML_TYPE_IQ3_XXS:
            return { 0.25f, 0.5f };
        case GGML_TYPE_IQ3_S:
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ1_M:
            return { 1.0f, 2.0f };
        default:
            return f.sc_lo == f.sc_hi ? scale_mapping{ 1.0f, 0.0f } : scale_mapping{ 0.0f, 1.0f };
    }
}

const code_grid<8> & grid8(ggml_type type) {
    static const code_grid<8> xxs(iq2xxs_grid, 256), xs(iq2xs_grid, 512), s(iq2s_grid, 1024), one(iq1s_grid, 2048);
    return type == GGML_TYPE_IQ2_XXS ? xxs : type == GGML_TYPE_IQ2_XS ? xs : type == GGML_TYPE_IQ2_S ? s : one;
}

const code_grid<4> & grid4(ggml_type type) {
    static const code_grid<4> xxs(iq3xxs_grid, 256), s(iq3s_grid, 512);
    return type == GGML_TYPE_IQ3_XXS ? xxs : s;
}

}  // namespace mc
