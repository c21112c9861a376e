// The quadratic form of the columns' error, prepared for a format.

#include "mc-quantize-impl.h"

#include <algorithm>

namespace mc {

namespace {

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
    for (int i = n - 1; i >= 0; i--) {  // rows of the inverse, by back substitution
        double * row = &u[(size_t) i * n];
        row[i]       = 1.0;
        for (int k = i + 1; k < n; k++) {
            const double factor = r[(size_t) i * n + k];
            for (int j = k; j < n; j++) {
                row[j] -= factor * u[(size_t) k * n + j];
            }
        }
        for (int j = i; j < n; j++) {
            row[j] /= r[(size_t) i * n + i];
        }
    }
    return true;
}

template <int COUNT> void add_columns(const float * m, int n, int first, int at, float sign, const vf * x, vf * to) {
    vf scaled[COUNT];
    for (int j = 0; j < COUNT; j++) {
        scaled[j] = sign * x[j];
    }
    for (int k = first; k < n; k += 8) {
        const float * row = m + (size_t) k * n + at;
        vf            sum[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            sum[i] = to[k + i];
        }
        for (int j = 0; j < COUNT; j++) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                sum[i] += scaled[j] * row[(size_t) i * n + j];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            to[k + i] = sum[i];
        }
    }
}

// The cost e m e' of every entry with the signs `sign`.
template <int D> void price_entries(const code_grid<D> & grid, const float * m, int ld, uint32_t sign, vf * out) {
    float signed_m[D][D];
    for (int i = 0; i < D; i++) {
        for (int j = 0; j < D; j++) {
            signed_m[i][j] = ((sign >> i ^ sign >> j) & 1 ? -1.0f : 1.0f) * m[i * ld + j] * (i == j ? 1.0f : 2.0f);
        }
    }
    for (int k = 0; k < grid.n_vec; k++) {
        const vf * e    = &grid.table[(size_t) k * D];
        vf         cost = {};
        for (int i = 0; i < D; i++) {
            vf sum = signed_m[i][i] * e[i];
            for (int j = i + 1; j < D; j++) {
                sum += signed_m[i][j] * e[j];
            }
            cost += sum * e[i];
        }
        out[k] = cost;
    }
}

// Inverse of the metric of `count` columns at `at`, and its factor.
bool inverse_of(const double * s, int n, int at, int count, float * inverse, std::vector<double> & u) {
    std::vector<double> own((size_t) count * count);
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
    return true;
}

// u [ld, ld] from the group's first row and column on: the factor of the inverse metric.
void set_group(const block_format & f, const double * u, int ld, group_metric & group) {
    double r[GROUP][GROUP] = {};  // inverse of the group's own part
    for (int j = 0; j < GROUP; j++) {
        for (int i = j; i >= 0; i--) {
            double x = i == j ? 1.0 : 0.0;
            for (int k = i + 1; k <= j; k++) {
                x -= u[i * ld + k] * r[k][j];
            }
            r[i][j] = x / u[i * ld + i];
        }
    }
    for (int i = 0; i < GROUP; i++) {
        for (int j = 0; j < GROUP; j++) {
            double x = 0;
            for (int k = std::max(i, j); k < GROUP; k++) {
                x += r[i][k] * r[j][k];
            }
            group.m[i][j] = (float) x;
        }
    }
    group.set_prices(f);
}

}  // namespace

void add_product(const float * m, int n, int first, int at, int count, float sign, const vf * x, vf * to) {
    (count == 16 ? add_columns<16> : add_columns<32>) (m, n, first, at, sign, x, to);
}

void group_metric::set_prices(const block_format & f) {
    const float * own = (const float *) m;
    if (f.kind == format_kind::ternary) {  // e m e', and what a shift of all columns adds to it
        const code_grid<8> & grid = grid8(f.type);
        price.resize((size_t) 2 * grid.n_vec);
        price_entries(grid, own, GROUP, 0, price.data());
        for (int k = 0; k < grid.n_vec; k++) {
            vf tilt = {};
            for (int i = 0; i < GROUP; i++) {
                float sum = 0;
                for (int j = 0; j < GROUP; j++) {
                    sum += m[i][j];
                }
                tilt += 2.0f * IQ1_SHIFT * sum * grid.table[(size_t) k * GROUP + i];
            }
            price[grid.n_vec + k] = tilt;
        }
    } else if (f.kind == format_kind::grid4) {
        const code_grid<4> & grid = grid4(f.type);
        price.resize((size_t) 16 * grid.n_vec);
        for (int h = 0; h < 2; h++) {
            for (uint32_t sign = 0; sign < 8; sign++) {
                price_entries(grid, own + 4 * h * (GROUP + 1), GROUP, sign,
                              &price[(size_t) (8 * h + sign) * grid.n_vec]);
            }
        }
    } else {
        const code_grid<8> & grid     = grid8(f.type);
        const uint32_t       patterns = f.parity ? 64 : 128;
        price.resize((size_t) patterns * grid.n_vec);
        for (uint32_t p = 0; p < patterns; p++) {
            const uint32_t seventh = f.parity ? (uint32_t) (__builtin_popcount(p) & 1) << 6 : 0;
            price_entries(grid, own, GROUP, p | seventh, &price[(size_t) p * grid.n_vec]);
        }
    }
}

void local_metric::set(const block_format & f, const double * u, int n_cols) {
    n = n_cols;
    feedback.assign((size_t) n * n, 0.0f);
    weight.resize(n);
    for (int j = 0; j < n; j++) {
        const double diagonal = u[(size_t) j * n + j];
        weight[j]             = (float) (1 / (diagonal * diagonal));
        for (int k = j + 1; k < n; k++) {
            feedback[(size_t) k * n + j] = (float) (u[(size_t) j * n + k] / diagonal);
        }
    }
    if (f.kind == format_kind::scalar) {
        return;
    }
    group.resize(n / GROUP);
    for (int g = 0; g < n / GROUP; g++) {
        set_group(f, u + (size_t) g * GROUP * (n + 1), n, group[g]);
    }
}

}  // namespace mc

using namespace mc;

bool mc_metric::prepare() {
    const block_format &      f = *format;
    const std::vector<double> full(s.begin(), s.end());
    std::vector<double>       u;
    if (!inverse_factor(full.data(), n, u)) {
        return false;
    }
    whole.set(f, u.data(), n);
    const int n_sub = n / f.sub;
    sub.resize(n_sub);
    sub_inverse.resize((size_t) n * f.sub);
    sub_sums.assign((size_t) n * n_sub, 0.0f);
    for (int i = 0; i < n_sub; i++) {
        if (!inverse_of(full.data(), n, i * f.sub, f.sub, &sub_inverse[(size_t) i * f.sub * f.sub], u)) {
            return false;
        }
        sub[i].set(f, u.data(), f.sub);
        for (int c = 0; c < n; c++) {
            for (int j = 0; j < f.sub; j++) {
                sub_sums[(size_t) c * n_sub + i] += s[(size_t) c * n + i * f.sub + j];
            }
        }
    }
    if (f.kind == format_kind::scalar) {
        return true;
    }
    group.resize(n / GROUP);
    group_inverse.resize((size_t) n * GROUP);
    for (int g = 0; g < n / GROUP; g++) {
        if (!inverse_of(full.data(), n, g * GROUP, GROUP, &group_inverse[(size_t) g * GROUP * GROUP], u)) {
            return false;
        }
        set_group(f, u.data(), GROUP, group[g]);
    }
    return true;
}
