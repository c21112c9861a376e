// LANES rows, one in a lane: the greedy pass over sub-blocks, then coordinate descent.

#include "mc-quantize-impl.h"

#include <algorithm>

namespace mc {

namespace {

struct row_batch {
    const mc_metric &    metric;
    const block_format & f;
    int                  n, n_sub;
    vf                   w[MAX_COLS];
    vf                   q[MAX_COLS];
    vf                   slope[MAX_COLS];   // s (w - q)
    vf                   target[MAX_COLS];  // s w
    vf                   loss, before;
    vi                   active;
    vf                   d[MAX_COLS / 32], dmin;
    vf                   sc[MAX_SUBS], mn[MAX_SUBS];
    vb                   code[MAX_COLS];                               // scalar
    vi                   entry[MAX_COLS / 4], sign[MAX_COLS / GROUP];  // else

    explicit row_batch(const mc_metric & m) : metric(m), f(*m.format), n(m.n), n_sub(m.n / m.format->sub) {}

    vf d_of(int sub) const { return d[f.block == 32 ? sub : 0]; }

    sub_scales scales(int sub) const { return make_scales(f, d_of(sub), dmin, sc[sub], mn[sub]); }

    void load(int count, const float * weights, int64_t ldw, const uint8_t * blocks, int64_t stride) {
        const int entries = n_sub * f.codes_per_sub();
        for (int l = 0; l < LANES; l++) {
            const int i   = std::min(l, count - 1);
            block_row row = {};
            for (int b = 0; b < n / f.block; b++) {
                read_block(f.type, blocks + i * stride + b * ggml_type_size(f.type), b, row);
                d[b][l] = row.d[b];
            }
            dmin[l] = row.dmin;
            for (int s = 0; s < n_sub; s++) {
                sc[s][l] = (float) row.sc[s], mn[s][l] = (float) row.mn[s];
            }
            for (int c = 0; c < n; c++) {
                w[c][l]    = weights[i * ldw + c];
                code[c][l] = (uint8_t) row.code[c];
            }
            for (int c = 0; c < entries && f.kind != format_kind::scalar; c++) {
                entry[c][l] = row.code[c];
            }
            for (int g = 0; g < n / GROUP; g++) {
                sign[g][l] = row.sign[g];
            }
        }
    }

    void store(int count, uint8_t * blocks, int64_t stride, float * out, int64_t ldq) {
        const int entries = n_sub * f.codes_per_sub();
        values();
        for (int l = 0; l < count; l++) {
            block_row row = {};
            row.dmin      = dmin[l];
            for (int s = 0; s < n_sub; s++) {
                row.sc[s] = (int) sc[s][l], row.mn[s] = (int) mn[s][l];
            }
            for (int c = 0; c < n; c++) {
                out[l * ldq + c] = q[c][l];
            }
            for (int c = 0; c < entries; c++) {
                row.code[c] = f.kind == format_kind::scalar ? code[c][l] : (uint16_t) entry[c][l];
            }
            for (int g = 0; g < n / GROUP; g++) {
                row.sign[g] = (uint8_t) sign[g][l];
            }
            for (int b = 0; b < n / f.block; b++) {
                row.d[b] = d[b][l];
                write_block(f.type, blocks + l * stride + b * ggml_type_size(f.type), b, row);
            }
        }
    }

    // q, the weights that the codes stand for.
    void values() {
        for (int sub = 0; sub < n_sub; sub++) {
            const sub_scales s = scales(sub);
            for (int c = sub * f.sub; c < (sub + 1) * f.sub; c++) {
                q[c] = f.kind == format_kind::scalar ?
                           s.a * value_of(f, __builtin_convertvector(__builtin_convertvector(code[c], vi), vf)) - s.b :
                           s.a * entry_values(sub, c);
            }
        }
    }

    vf entry_values(int sub, int c) const {
        const int g = c / GROUP, i = c % GROUP;
        if (f.kind == format_kind::ternary) {
            const vi minus = f.type == GGML_TYPE_IQ1_S ? mn[sub] != 0.0f : sign[g] != 0;
            return grid8(f.type).gather(entry[g], i) + (minus ? splat(-IQ1_SHIFT) : splat(IQ1_SHIFT));
        }
        const vf size = f.kind == format_kind::grid8 ? grid8(f.type).gather(entry[g], i) :
                                                       grid4(f.type).gather(entry[c / 4], i % 4);
        return (sign[g] & 1 << i) != 0 ? -size : size;
    }

    void add(const float * m, int first, int at, float sign, const vf * x, vf * to) const {
        add_product(m, n, first, at, f.sub, sign, x, to);
    }

    // Takes over the fit in the rows of `mask`.
    void keep(int sub, const sub_fit & fit, vi mask) {
        const int at = sub * f.sub, per = f.codes_per_sub();
        sc[sub] = mask ? fit.scale.sc : sc[sub];
        mn[sub] = mask ? fit.scale.mn : mn[sub];
        if (f.block == 32) {
            d[sub] = mask ? fit.scale.d : d[sub];
        }
        for (int c = 0; c < f.sub; c++) {
            q[at + c] = mask ? fit.q[c] : q[at + c];
        }
        if (f.kind == format_kind::scalar) {
            const vb narrow = __builtin_convertvector(mask, vb);
            for (int c = 0; c < f.sub; c++) {
                code[at + c] = (fit.code[c] & narrow) | (code[at + c] & ~narrow);
            }
            return;
        }
        for (int c = 0; c < per; c++) {
            entry[sub * per + c] = mask ? fit.entry[c] : entry[sub * per + c];
        }
        for (int g = 0; g < f.sub / GROUP; g++) {
            sign[at / GROUP + g] = mask ? fit.sign[g] : sign[at / GROUP + g];
        }
    }

    void start_greedy() { memcpy(slope, w, sizeof(w)); }

    // New codes for a sub-block, whose error goes to the columns after it. `slope` holds the targets of the columns that are left.
    void greedy(int sub) {
        const int     at = sub * f.sub, end = at + f.sub;
        const float * feedback = metric.whole.feedback.data();
        sub_fit       fit      = {};
        fit_sub(f, metric.whole, at, slope + at, scales(sub), d_of(sub), dmin, f.first, vi{} - 1, fit);
        keep(sub, fit, vi{} - 1);
        vf error[MAX_SUB];
        for (int j = at; j < end; j++) {
            error[j - at] = slope[j] - q[j];
            for (int k = j + 1; k < end; k++) {
                slope[k] -= error[j - at] * feedback[(size_t) k * n + j];
            }
        }
        add(feedback, end, at, -1, error, slope);
    }

    void start_descent() {
        values();
        vf error[MAX_COLS];
        for (int c = 0; c < n; c++) {
            error[c] = w[c] - q[c];
            slope[c] = target[c] = vf{};
        }
        for (int at = 0; at < n; at += f.sub) {
            add(metric.s.data(), 0, at, 1, error + at, slope);
            add(metric.s.data(), 0, at, 1, w + at, target);
        }
        loss = vf{};
        for (int c = 0; c < n; c++) {
            loss += error[c] * slope[c];
        }
        active = vi{} - 1;
    }

    // Super-block scales d (and dmin) by least squares, the codes as they are: along p = (q - dmin r) / d and r = -mn.
    void refit() {
        before = loss;
        if (f.block == 32) {
            return;
        }
        vf       pp = {}, pr = {}, rr = {}, pe = {}, re = {};
        const vf inverse = inverse_or_zero(d[0]);
        vf       sr[MAX_COLS], sp[MAX_COLS];
        for (int c = 0; c < n; c++) {
            vf sum = {}, r = {};
            if (f.has_min()) {
                r = -mn[c / f.sub];
                for (int s = 0; s < n_sub; s++) {
                    sum -= mn[s] * metric.sub_sums[(size_t) c * n_sub + s];
                }
            }
            const vf p = (q[c] - dmin * r) * inverse;
            sr[c]      = sum;
            sp[c]      = (target[c] - slope[c] - dmin * sum) * inverse;
            pp += p * sp[c], pr += p * sum, rr += r * sum, pe += p * slope[c], re += r * slope[c];
        }
        const vf det = pp * rr - pr * pr, safe = greater(pp, splat(1e-30f));
        const vi both = det > 1e-4f * pp * rr;
        const vf dd = both ? (pe * rr - re * pr) / det : pe / safe, dm = both ? (re * pp - pe * pr) / det : splat(0);
        const vf fresh_d = to_half(d[0] + dd), fresh_min = f.has_min() ? to_half(dmin + dm) : dmin;
        const vf ed = fresh_d - d[0], em = fresh_min - dmin;
        const vf gain = 2 * ed * pe + 2 * em * re - ed * ed * pp - 2 * ed * em * pr - em * em * rr;
        const vf top  = splat(65504.0f);
        const vi held = (fresh_d < top) & (-fresh_d < top) & (fresh_min < top) & (-fresh_min < top);
        const vi mask = active & (pp > 0.0f) & (gain > 0.0f) & held;
        if (!any(mask)) {
            return;
        }
        const vf zero = {}, step_d = mask ? ed : zero, step_min = mask ? em : zero;
        d[0] += step_d;
        dmin += step_min;
        loss -= mask ? gain : zero;
        for (int c = 0; c < n; c++) {
            slope[c] -= step_d * sp[c] + step_min * sr[c];
        }
        values();
    }

    // Chooses the scale of a sub-block again, with all others fixed.
    void improve_sub(int sub) {
        const int     at      = sub * f.sub;
        const float * inverse = &metric.sub_inverse[(size_t) sub * f.sub * f.sub];
        vf            t[MAX_SUB], old[MAX_SUB], own = {};
        for (int i = 0; i < f.sub; i++) {
            vf step = {};
            for (int j = 0; j < f.sub; j++) {
                step += inverse[i * f.sub + j] * slope[at + j];
            }
            old[i] = q[at + i];
            t[i]   = old[i] + step;
            own += step * slope[at + i];
        }
        sub_fit fit = {};
        fit_sub(f, metric.sub[sub], 0, t, scales(sub), d_of(sub), dmin, f.later, active, fit);
        const vi better = active & (fit.loss < own * (1 - 1e-5f));
        if (any(better)) {
            keep(sub, fit, better);
            loss -= better ? own - fit.loss : vf{};
            moved(sub, old);
        }
    }

    // The codes of a sub-block, column by column or group by group.
    void improve_codes(int sub) {
        vf near[MAX_SUB], old[MAX_SUB];  // near: the slope of its columns
        memcpy(near, slope + sub * f.sub, f.sub * sizeof(vf));
        memcpy(old, q + sub * f.sub, f.sub * sizeof(vf));
        f.kind == format_kind::scalar ? improve_columns(sub, near) : improve_groups(sub, near);
        moved(sub, old);
    }

    // Updates the slope of all columns after those of a sub-block changed from `old`.
    void moved(int sub, const vf * old) {
        vf change[MAX_SUB];
        vi any_change = {};
        for (int i = 0; i < f.sub; i++) {
            change[i] = old[i] - q[sub * f.sub + i];
            any_change |= change[i] != 0.0f;
        }
        if (any(any_change)) {
            add(metric.s.data(), 0, sub * f.sub, 1, change, slope);
        }
    }

    void improve_columns(int sub, vf * near) {
        const int        at      = sub * f.sub;
        const sub_scales s       = scales(sub);
        const vi         usable  = active & (s.a != 0.0f);
        const vf         inverse = inverse_or_zero(s.a);
        for (int i = 0; i < f.sub; i++) {
            const int   c        = at + i;
            const float diagonal = metric.s[(size_t) c * n + c];
            const vf    step = near[i] * (1 / diagonal), t = q[c] + step;
            const vf    best = nearest_code(f, (t + s.b) * inverse), fresh = s.a * value_of(f, best) - s.b;
            const vf    gain = diagonal * (step * step - (t - fresh) * (t - fresh));
            const vi    mask = usable & (gain > 0.0f) & (fresh != q[c]);
            if (!any(mask)) {
                continue;
            }
            const vb narrow = __builtin_convertvector(mask, vb);
            const vf delta  = mask ? q[c] - fresh : vf{};
            code[c] = (__builtin_convertvector(__builtin_convertvector(best, vi), vb) & narrow) | (code[c] & ~narrow);
            q[c]    = mask ? fresh : q[c];
            loss -= mask ? gain : vf{};
            for (int k = i + 1; k < f.sub; k++) {
                near[k] += delta * metric.s[(size_t) (at + k) * n + c];
            }
        }
    }

    void improve_groups(int sub, vf * near) {
        const int        per     = f.kind == format_kind::grid4 ? 2 : 1;
        const sub_scales s       = scales(sub);
        const vi         shift   = f.type == GGML_TYPE_IQ1_S ? (s.mn != 0.0f ? vi{} - 1 : vi{} + 1) : vi{};
        const vi         usable  = active & (s.a != 0.0f);
        const vf         inverse = inverse_or_zero(s.a);
        for (int g = 0; g < f.sub / GROUP; g++) {
            const int     at = sub * f.sub + g * GROUP, number = at / GROUP;
            const float * own_inverse = &metric.group_inverse[(size_t) number * GROUP * GROUP];
            const auto &  m           = metric.group[number].m;
            vf            t[GROUP], x[GROUP], gain = {};
            for (int i = 0; i < GROUP; i++) {
                vf step = {};
                for (int j = 0; j < GROUP; j++) {
                    step += own_inverse[i * GROUP + j] * near[g * GROUP + j];
                }
                t[i] = q[at + i] + step;
                x[i] = t[i] * inverse;
                gain += step * near[g * GROUP + i];
            }
            group_picks p;
            nearest_entries(f, metric.group[number], x, shift, usable, p);
            const vf own = gain;
            vf       error[GROUP];
            for (int i = 0; i < GROUP; i++) {
                error[i] = t[i] - s.a * p.q[i];
                vf image = m[i][i] * error[i];
                for (int j = 0; j < i; j++) {
                    image += 2.0f * m[i][j] * error[j];
                }
                gain -= image * error[i];
            }
            const vi better = usable & (gain > 1e-5f * own);
            if (!any(better)) {
                continue;
            }
            loss -= better ? gain : vf{};
            sign[number] = better ? p.sign : sign[number];
            for (int i = 0; i < per; i++) {
                entry[per * number + i] = better ? p.code[i] : entry[per * number + i];
            }
            for (int i = 0; i < GROUP; i++) {
                const vf delta = better ? q[at + i] - s.a * p.q[i] : vf{};
                q[at + i]      = better ? s.a * p.q[i] : q[at + i];
                for (int k = (g + 1) * GROUP; k < f.sub; k++) {
                    near[k] += delta * metric.s[(size_t) (sub * f.sub + k) * n + at + i];
                }
            }
        }
    }

    void end_pass() { active &= loss < before * (1 - 1e-3f); }
};

}  // namespace

void quantize_rows(const mc_metric & metric,
                   int               rows,
                   const float *     w,
                   int64_t           ldw,
                   uint8_t *         blocks,
                   int64_t           stride,
                   float *           q,
                   int64_t           ldq,
                   bool              greedy,
                   int               passes) {
    std::vector<row_batch> all((rows + LANES - 1) / LANES, row_batch(metric));
    const auto             each = [&](auto && act) {
        for (size_t i = 0; i < all.size(); i++) {
            act(all[i], (int) i * LANES);
        }
    };
    each([&](row_batch & r, int first) {
        r.load(std::min(LANES, rows - first), w + first * ldw, ldw, blocks + first * stride, stride);
        r.start_greedy();
    });
    const int n_sub = metric.n / metric.format->sub;
    for (int sub = 0; greedy && sub < n_sub; sub++) {
        each([&](row_batch & r, int) { r.greedy(sub); });
    }
    if (passes) {
        each([&](row_batch & r, int) { r.start_descent(); });
    }
    for (int pass = 0; pass < passes; pass++) {
        each([&](row_batch & r, int) { r.refit(); });
        for (auto step : { &row_batch::improve_sub, &row_batch::improve_codes }) {
            for (int sub = 0; sub < n_sub; sub++) {
                each([&](row_batch & r, int) {
                    if (any(r.active)) {
                        (r.*step)(sub);
                    }
                });
            }
        }
        each([&](row_batch & r, int) { r.end_pass(); });
    }
    each([&](row_batch & r, int first) {
        r.store(std::min(LANES, rows - first), blocks + first * stride, stride, q + first * ldq, ldq);
    });
}

}  // namespace mc
