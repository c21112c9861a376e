// The codebook entry nearest to eight columns, in their full 8 x 8 metric, for LANES rows. The choice of signs has
// a row in each lane; the scan over a codebook has an entry in each lane and takes the rows in turn.

#include "mc-quantize-impl.h"

namespace mc {

namespace {

constexpr int ROUNDS = 4;  // of magnitudes and signs in turn

// The least of LANES running minima and the entry that it came from; `at` has the numbers of their vectors.
struct best_entry {
    float cost;
    int   index;
};

best_entry least(vf cost, vi at) {
    const vi lane = lane_numbers();
    vf       m    = cost;
    for (int step = LANES / 2; step; step /= 2) {
        m = lesser(m, shuffle(m, lane ^ step));
    }
    const int l = first_lane(cost == m);
    return { m[0], at[l] * LANES + l };
}

// The entry that minimises price - 2 entry v'; v[i] is at v + i * LANES.
template <int D> int cheapest(const code_grid<D> & grid, const vf * price, const float * v) {
    vf best = splat(INFINITY), twice[D];
    vi at = {}, now = {};
    for (int i = 0; i < D; i++) {
        twice[i] = splat(2.0f * v[i * LANES]);
    }
    for (int k = 0; k < grid.n_vec; k++) {
        const vf * e = &grid.table[(size_t) k * D];
        vf         a = price[k], b = twice[1] * e[1];
        a -= twice[0] * e[0];
        for (int i = 2; i < D; i += 2) {
            a -= twice[i] * e[i];
            b += twice[i + 1] * e[i + 1];
        }
        a -= b;
        at   = a < best ? now : at;
        best = lesser(a, best);
        now += 1;
    }
    return least(best, at).index;
}

struct group_search {
    const block_format & f;
    const group_metric & group;
    vf                   v[GROUP];  // m x'
    group_picks &        p;

    group_search(const block_format & format, const group_metric & g, const vf * x, group_picks & out) :
        f(format),
        group(g),
        p(out) {
        for (int i = 0; i < GROUP; i++) {
            v[i] = vf{};
            for (int j = 0; j < GROUP; j++) {
                v[i] += group.m[i][j] * x[j];
            }
        }
    }

    vf signed_by(vf x, int i) const { return (p.sign & 1 << i) != 0 ? -x : x; }

    // Takes the signs of x. Where the number of minus signs must be even and is not, the sign changes that costs least.
    void start(const vf * x) {
        vi odd = {}, cheap = {};
        vf least_price = splat(INFINITY);
        p.sign         = vi{};
        for (int i = 0; i < GROUP; i++) {
            const vi minus = x[i] < 0.0f;
            const vf price = x[i] * x[i] * group.m[i][i];
            cheap          = price < least_price ? vi{} + (1 << i) : cheap;
            least_price    = lesser(price, least_price);
            p.sign |= minus & 1 << i;
            odd ^= minus;
            p.q[i] = x[i];
        }
        if (f.parity) {
            p.sign ^= odd & cheap;
        }
    }

    // Chooses magnitudes for the signs. Returns the rows in which they changed.
    vi entries8(vi todo) {
        const code_grid<8> & grid = grid8(f.type);
        alignas(64) float    sv[GROUP * LANES];
        for (int i = 0; i < GROUP; i++) {
            *(vf *) (sv + i * LANES) = signed_by(v[i], i);
        }
        const vi pattern = ((p.sign & 128) != 0 ? ~p.sign : p.sign) & (f.parity ? 63 : 127);
        for (int l = 0; l < LANES; l++) {
            if (todo[l]) {
                p.code[0][l] = cheapest<8>(grid, &group.price[(size_t) pattern[l] * grid.n_vec], sv + l);
            }
        }
        for (int i = 0; i < GROUP; i++) {
            p.q[i] = todo ? signed_by(grid.gather(p.code[0], i), i) : p.q[i];
        }
        return vi{};  // the same signs give the same entry
    }

    // One half after the other, each with the other half fixed.
    vi entries4(vi todo) {
        const code_grid<4> & grid    = grid4(f.type);
        vi                   changed = {};
        for (int h = 0; h < 2; h++) {
            alignas(64) float sv[4 * LANES];
            const int         other = 4 * (1 - h);
            for (int i = 0; i < 4; i++) {
                vf left = v[4 * h + i];
                for (int j = other; j < other + 4; j++) {
                    left -= group.m[4 * h + i][j] * p.q[j];
                }
                *(vf *) (sv + i * LANES) = signed_by(left, 4 * h + i);
            }
            const vi four = p.sign >> 4 * h & 15, pattern = ((four & 8) != 0 ? ~four : four) & 7;
            const vi before = p.code[h];
            for (int l = 0; l < LANES; l++) {
                if (todo[l]) {
                    p.code[h][l] = cheapest<4>(grid, &group.price[(size_t) (8 * h + pattern[l]) * grid.n_vec], sv + l);
                }
            }
            changed |= before != p.code[h];
            for (int i = 0; i < 4; i++) {
                p.q[4 * h + i] = todo ? signed_by(grid.gather(p.code[h], i), 4 * h + i) : p.q[4 * h + i];
            }
        }
        return changed;
    }

    // Flips signs (pairs of them where their parity counts) as long as that lowers the form. Returns the rows where it did.
    vi flip_signs(vi todo) {
        vi changed = {};
        for (int round = 0; round < ROUNDS; round++) {
            vf gain[GROUP], best = splat(-1e-6f * group.m[0][0]);
            vi flip = {};
            for (int i = 0; i < GROUP; i++) {  // of q_i -> -q_i
                vf slope = group.m[i][i] * p.q[i] + v[i];
                for (int j = 0; j < GROUP; j++) {
                    slope -= group.m[i][j] * p.q[j];
                }
                gain[i] = 4.0f * p.q[i] * slope;
                if (!f.parity) {
                    flip = gain[i] < best ? vi{} + (1 << i) : flip;
                    best = lesser(gain[i], best);
                }
                for (int j = 0; j < i; j++) {
                    const vf both = gain[i] + gain[j] + 8.0f * group.m[i][j] * p.q[i] * p.q[j];
                    flip          = both < best ? vi{} + (1 << i | 1 << j) : flip;
                    best          = lesser(both, best);
                }
            }
            flip &= todo;
            if (!any(flip)) {
                break;
            }
            p.sign ^= flip;
            changed |= flip != 0;
            for (int i = 0; i < GROUP; i++) {
                p.q[i] = (flip & 1 << i) != 0 ? -p.q[i] : p.q[i];
            }
        }
        return changed;
    }

    // A local minimum of the form: magnitudes and signs in turn.
    void run(vi todo) {
        p.code[0] = p.code[1] = vi{};
        for (int round = 0; round < ROUNDS && any(todo); round++) {
            const vi moved = f.kind == format_kind::grid8 ? entries8(todo) : entries4(todo) | (vi{} - (round == 0));
            todo &= moved | flip_signs(todo);
        }
    }
};

// The least price - 2 entry v' plus the cost of the shift, for several rows (the codebook is larger than the first cache):
// row k is lane lane[k] of v, found[k] for a positive shift and a negative one.
constexpr int TILE = 4;

void cheapest_ternary(const code_grid<8> & grid,
                      const group_metric & group,
                      const vf *           v,
                      const int *          lane,
                      best_entry (*found)[2]) {
    vf    best[TILE][2];
    vi    at[TILE][2] = {}, now = {};
    float twice[TILE][GROUP];
    for (int r = 0; r < TILE; r++) {
        best[r][0] = best[r][1] = splat(INFINITY);
        for (int i = 0; i < GROUP; i++) {
            twice[r][i] = 2.0f * v[i][lane[r]];
        }
    }
    for (int k = 0; k < grid.n_vec; k++) {
        vf e[GROUP];
        for (int i = 0; i < GROUP; i++) {
            e[i] = grid.table[(size_t) k * GROUP + i];
        }
        const vf price = group.price[k], tilt = group.price[grid.n_vec + k];
        for (int r = 0; r < TILE; r++) {
            vf a = price, b = twice[r][1] * e[1];
            a -= twice[r][0] * e[0];
            for (int i = 2; i < GROUP; i += 2) {
                a -= twice[r][i] * e[i];
                b += twice[r][i + 1] * e[i + 1];
            }
            a -= b;
            const vf plus = a + tilt, minus = a - tilt;
            at[r][0]   = plus < best[r][0] ? now : at[r][0];
            best[r][0] = lesser(plus, best[r][0]);
            at[r][1]   = minus < best[r][1] ? now : at[r][1];
            best[r][1] = lesser(minus, best[r][1]);
        }
        now += 1;
    }
    for (int r = 0; r < TILE; r++) {
        found[r][0] = least(best[r][0], at[r][0]);
        found[r][1] = least(best[r][1], at[r][1]);
    }
}

// The nearest ternary entry plus shift.
void nearest_ternary(const block_format & f,
                     const group_metric & group,
                     const vf *           v,
                     vi                   shift,
                     vi                   todo,
                     group_picks &        p) {
    const code_grid<8> & grid = grid8(f.type);
    float                all  = 0;
    vf                   sum  = {};
    for (int i = 0; i < GROUP; i++) {
        sum += v[i];
        for (int j = 0; j < GROUP; j++) {
            all += group.m[i][j];
        }
    }
    int lane[LANES + TILE], count = 0;
    for (int l = 0; l < LANES; l++) {
        if (todo[l]) {
            lane[count++] = l;
        }
    }
    for (int r = count; r < count + TILE && count; r++) {
        lane[r] = lane[count - 1];
    }
    for (int first = 0; first < count; first += TILE) {
        best_entry found[TILE][2];
        cheapest_ternary(grid, group, v, lane + first, found);
        for (int r = 0; r < TILE; r++) {
            const int   l         = lane[first + r];
            const float shifts[2] = { IQ1_SHIFT, -IQ1_SHIFT };
            float       cost[2];
            for (int minus = 0; minus < 2; minus++) {
                cost[minus] = found[r][minus].cost + shifts[minus] * (shifts[minus] * all - 2 * sum[l]);
            }
            const int minus = shift[l] ? shift[l] < 0 : cost[1] < cost[0];
            p.code[0][l] = found[r][minus].index, p.sign[l] = minus;
        }
    }
    for (int i = 0; i < GROUP; i++) {
        p.q[i] = grid.gather(p.code[0], i) + (p.sign != 0 ? splat(-IQ1_SHIFT) : splat(IQ1_SHIFT));
    }
}

}  // namespace

void nearest_entries(const block_format & f,
                     const group_metric & group,
                     const vf *           x,
                     vi                   shift,
                     vi                   todo,
                     group_picks &        p) {
    group_search search(f, group, x, p);
    if (f.kind == format_kind::ternary) {
        p.code[0] = p.code[1] = p.sign = vi{};
        return nearest_ternary(f, group, search.v, shift, todo, p);
    }
    search.start(x);
    search.run(todo);
}

}  // namespace mc
