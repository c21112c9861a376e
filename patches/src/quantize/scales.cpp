// A sub-block of LANES rows: the scales to try and, for each of them, the codes, column by column or group by group with feedback.
// Each lane holds a row; the search for a codebook entry uses its lanes for entries and takes the rows in turn.

#define GGML_COMMON_DECL_CPP
#define GGML_COMMON_IMPL_CPP
#include "ggml-common.h"
#include "mc-quantize-impl.h"

#include <algorithm>

namespace mc {

namespace {

// nearest_code and value_of for evenly spaced codes and for kvalues_iq4nl (TABLE).
template <bool TABLE> struct scalar_codes {
    float       top, zero;
    small_table values;     // TABLE
    small_table threshold;  // TABLE: [k] is between the values k - 1 and k

    explicit scalar_codes(const block_format & f) :
        top((float) f.codes - 1),
        zero((float) f.zero),
        values(),
        threshold() {
        for (int k = 0; k < 16; k++) {
            values.entry[k]    = kvalues_iq4nl[k];
            threshold.entry[k] = k > 0 ? 0.5f * (kvalues_iq4nl[k - 1] + kvalues_iq4nl[k]) : -INFINITY;
        }
    }

    vf nearest(vf x) const {
        if (!TABLE) {
            return nearest_integer(greater(lesser(x + zero, splat(top)), splat(0)));
        }
        vi code = {};
        for (int step = 8; step; step /= 2) {
            const vi more = code + step;
            code          = x > threshold.at(more) ? more : code;
        }
        return __builtin_convertvector(code, vf);
    }

    vf value(vf code) const { return TABLE ? values.at(__builtin_convertvector(code, vi)) : code - zero; }
};

// Chooses the codes of N columns with feedback, for one scale in each row. Returns the loss, or INFINITY as soon as every row
// exceeds `limit`. KEEP: also stores codes and values.
template <int N, bool TABLE> struct column_fit {
    const scalar_codes<TABLE> codes;
    const float *             feedback;
    const float *             weight;
    int                       ld;

    template <bool KEEP> vf fit(const vf * t, vf a, vf b, vf limit, vf * q, vb * code) const {
        const vf inverse = inverse_or_zero(a);
        vf       left[N], loss = {};
        for (int j = 0; j < N; j++) {
            left[j] = t[j];
        }
#pragma GCC unroll 32
        for (int j = 0; j < N; j++) {
            const vf c     = codes.nearest((left[j] + b) * inverse);
            const vf value = a * codes.value(c) - b;
            const vf error = left[j] - value;
            loss += weight[j] * (error * error);
            if (KEEP) {
                q[j]    = value;
                code[j] = __builtin_convertvector(__builtin_convertvector(c, vi), vb);
            }
#pragma GCC unroll 32
            for (int k = j + 1; k < N; k++) {
                left[k] -= error * feedback[(size_t) k * ld + j];
            }
            if (!KEEP && j % 8 == 7 && j + 1 < N && !any(loss < limit)) {
                return splat(INFINITY);
            }
        }
        return loss;
    }
};

// Calls visit(scale, rows that may use it) for every scale to try; the first is the current one.
template <typename Visit>
void each_scale(const block_format & f, const sub_scales & now, vf d, vf dmin, search_reach reach, Visit visit) {
    visit(now, vi{} - 1);
    if (f.block == 32) {
        for (int step = -7; step <= 7; step++) {
            if (step) {
                const vf fresh = to_half(now.d * (1 + 0.02f * step));
                visit(sub_scales{ now.sc, now.mn, fresh, now.b, fresh }, vi{} - 1);
            }
        }
        return;
    }
    for (int i = -reach.sc; i <= reach.sc; i++) {
        const vf sc       = now.sc + (float) i;
        const vi possible = (sc >= (float) f.sc_lo) & (sc <= (float) f.sc_hi);
        for (int j = -reach.mn; j <= reach.mn; j++) {
            const vf mn   = now.mn + (float) j;
            const vi mask = possible & (mn >= 0.0f) & (mn <= (float) f.mn_hi);
            if ((i || j) && any(mask)) {
                visit(make_scales(f, d, dmin, mask ? sc : now.sc, mask ? mn : now.mn), mask);
            }
        }
    }
}

template <int N, bool TABLE>
void fit_columns(const block_format & f,
                 const local_metric & local,
                 int                  at,
                 const vf *           t,
                 const sub_scales &   now,
                 vf                   d,
                 vf                   dmin,
                 search_reach         reach,
                 vi                   active,
                 sub_fit &            best) {
    const float *              feedback = &local.feedback[(size_t) at * (local.n + 1)];
    const column_fit<N, TABLE> columns  = { scalar_codes<TABLE>(f), feedback, &local.weight[at], local.n };
    best.scale                          = now;
    best.loss                           = active ? splat(INFINITY) : splat(-INFINITY);
    each_scale(f, now, d, dmin, reach, [&](const sub_scales & s, vi) {
        const vf loss = columns.template fit<false>(t, s.a, s.b, best.loss, nullptr, nullptr);
        const vi less = loss < best.loss;
        best.loss     = less ? loss : best.loss;
        best.scale.sc = less ? s.sc : best.scale.sc;
        best.scale.mn = less ? s.mn : best.scale.mn;
        best.scale.a  = less ? s.a : best.scale.a;
        best.scale.b  = less ? s.b : best.scale.b;
        best.scale.d  = less ? s.d : best.scale.d;
    });
    best.loss = active ? best.loss : splat(INFINITY);
    columns.template fit<true>(t, best.scale.a, best.scale.b, best.loss, best.q, best.code);
}

// Groups one after the other with feedback.
void fit_groups(const block_format & f,
                const local_metric & local,
                int                  at,
                const vf *           t,
                const sub_scales &   s,
                vi                   todo,
                sub_fit &            best) {
    if (!any(todo)) {
        return;
    }
    sub_fit   fit;
    const vf  inverse = inverse_or_zero(s.a);
    const vi  shift   = f.type == GGML_TYPE_IQ1_S ? (s.mn != 0.0f ? vi{} - 1 : vi{} + 1) : vi{};
    const int per     = f.kind == format_kind::grid4 ? 2 : 1;
    vf        left[MAX_SUB];
    fit.loss = vf{};
    for (int j = 0; j < f.sub; j++) {
        left[j] = t[j];
    }
    for (int g = 0; g < f.sub / GROUP; g++) {
        const group_metric & group = local.group[at / GROUP + g];
        vf                   x[GROUP], error[GROUP];
        group_picks          p;
        for (int i = 0; i < GROUP; i++) {
            x[i] = left[g * GROUP + i] * inverse;
        }
        nearest_entries(f, group, x, shift, todo, p);
        fit.sign[g] = p.sign;
        for (int i = 0; i < per; i++) {
            fit.entry[per * g + i] = p.code[i];
        }
        for (int i = 0; i < GROUP; i++) {
            const int j          = g * GROUP + i;
            fit.q[j]             = s.a * p.q[i];
            error[i]             = left[j] - fit.q[j];
            const float * column = &local.feedback[(size_t) at * (local.n + 1) + j];
            for (int k = j + 1; k < f.sub; k++) {
                left[k] -= error[i] * column[(size_t) k * local.n];
            }
            fit.loss += local.weight[at + j] * error[i] * error[i];
        }
        todo &= fit.loss < best.loss;
        if (!any(todo)) {
            return;
        }
    }
    best.loss     = todo ? fit.loss : best.loss;
    best.scale.sc = todo ? s.sc : best.scale.sc;
    best.scale.mn = todo ? s.mn : best.scale.mn;
    for (int j = 0; j < f.sub; j++) {
        best.q[j] = todo ? fit.q[j] : best.q[j];
    }
    for (int g = 0; g < f.sub / GROUP; g++) {
        best.sign[g] = todo ? fit.sign[g] : best.sign[g];
        for (int i = per * g; i < per * (g + 1); i++) {
            best.entry[i] = todo ? fit.entry[i] : best.entry[i];
        }
    }
}

void fit_entries(const block_format & f,
                 const local_metric & local,
                 int                  at,
                 const vf *           t,
                 const sub_scales &   now,
                 vf                   d,
                 vf                   dmin,
                 search_reach         reach,
                 vi                   active,
                 sub_fit &            best) {
    best.scale = now;
    best.loss  = splat(INFINITY);
    each_scale(f, now, d, dmin, reach,
               [&](const sub_scales & s, vi mask) { fit_groups(f, local, at, t, s, active & mask, best); });
}

}  // namespace

vf nearest_code(const block_format & f, vf x) {
    return f.zero < 0 ? scalar_codes<true>(f).nearest(x) : scalar_codes<false>(f).nearest(x);
}

vf value_of(const block_format & f, vf code) {
    return f.zero < 0 ? scalar_codes<true>(f).value(code) : scalar_codes<false>(f).value(code);
}

sub_scales make_scales(const block_format & f, vf d, vf dmin, vf sc, vf mn) {
    const scale_mapping rule = scale_mapping_of(f);
    return { sc, mn, d * (rule.offset + rule.slope * sc), f.has_min() ? dmin * mn : splat(0), d };
}

void fit_sub(const block_format & f,
             const local_metric & local,
             int                  at,
             const vf *           t,
             const sub_scales &   now,
             vf                   d,
             vf                   dmin,
             search_reach         reach,
             vi                   active,
             sub_fit &            best) {
    const auto fit = f.kind != format_kind::scalar ? fit_entries :
                     f.sub == 16                   ? fit_columns<16, false> :
                     f.zero < 0                    ? fit_columns<32, true> :
                                                     fit_columns<32, false>;
    fit(f, local, at, t, now, d, dmin, reach, active, best);
}

}  // namespace mc
