// Mixtures: the moments of the finest sets are merged to those of every pattern, and mixed by what a gate says of each.
// All of it is computed in double, on one thread: it takes about 10 ns for each set and pattern.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bind.h"

constexpr int64_t MOST_WAYS = 64;  // patterns of a mixture, as many as a word has bits

// The way of one pattern: in which of its sets each of the finest sets lies, and the moments of its sets.
struct Way {
    std::vector<int32_t> at;  // empty: the finest sets are its sets
    int64_t sets = 0;
    bool runs = false;  // its moments are running statistics, and depend on nothing
    int64_t shape[MOST + 1] = {};
    int dims = 0;
    std::vector<double> n, mean, low, m2;
    std::vector<double> var, rate;  // rate = 1 / sqrt(var + eps), where results are mixed

    int64_t place(int64_t s) const { return at.empty() ? s : at[size_t(s)]; }
};

// Calls f(i, index) for each of `total` elements of some axes, of which each goes so far in the index.
template <class F>
void walk(const int64_t* size, const int64_t* step, int axes, int64_t total, F f) {
    int64_t index[MOST] = {}, first = 0;
    const int64_t inner = axes ? size[axes - 1] : 1, by = axes ? step[axes - 1] : 0;
    for (int64_t i = 0; i < total; i += inner) {
        for (int64_t j = 0; j < inner; ++j) f(i + j, first + j * by);
        for (int a = axes - 2; a >= 0; --a) {
            first += step[a];
            if (++index[a] < size[a]) break;
            first -= step[a] * size[a], index[a] = 0;
        }
    }
}

// Logits as the gate gave them, and for each set where its own begin.
struct Logits {
    std::vector<double> value, gradient;
    int axes = 0;
    int64_t size[MOST] = {}, step[MOST] = {};  // of the finest sets
    bool same = true;                      // all sets share one row
};

struct Mixture {
    int64_t total = 0;  // finest sets
    bool weighs = false, results = false;
    double eps = 0;
    std::vector<double> n, mean, low, m2;  // of the finest sets
    std::vector<Way> ways;
    Logits of_means, of_vars;
    bool apart = false;  // variances have logits of their own
    bool alike = false;  // all sets have the same shares of moments, as one row of logits gives where all is known

    // As `pool` in statistics.py: deviations from one of the set, so that equal values have none, then from the mean.
    void merge(Way& w) const {
        w.n.assign(size_t(w.sets), 0), w.mean.assign(size_t(w.sets), 0), w.low.assign(size_t(w.sets), 0);
        w.m2.assign(size_t(w.sets), 0);
        std::vector<double> own_rest(size_t(w.sets), 0);
        double *wn = w.n.data(), *high = w.mean.data(), *lower = w.low.data(), *square = w.m2.data(), *rest = own_rest.data();
        const double *count = n.data(), *means = mean.data(), *lows = low.data(), *squares = m2.data();
        const int32_t* at = w.at.data();
        const int64_t all = total;
        for (int64_t s = 0; s < all; ++s) {
            const int64_t j = at[s];
            if (!(count[s] > 0)) continue;
            if (wn[j] == 0) high[j] = means[s], lower[j] = lows[s];
            wn[j] += count[s];
            rest[j] += count[s] * ((means[s] - high[j]) + (lows[s] - lower[j]));
        }
        for (int64_t j = 0; j < w.sets; ++j)
            if (wn[j] > 0) rest[j] /= wn[j];
        for (int64_t s = 0; s < all; ++s) {
            const int64_t j = at[s];
            if (!(count[s] > 0)) continue;
            const double d = ((means[s] - high[j]) + (lows[s] - lower[j])) - rest[j];
            square[j] += squares[s] + count[s] * d * d;
        }
        for (int64_t j = 0; j < w.sets; ++j) {
            const double whole = high[j] + rest[j];
            lower[j] += (high[j] - whole) + rest[j];
            high[j] = whole;
        }
    }

    // The moments of all patterns.
    void prepare() {
        alike = !results && of_means.same && (!apart || of_vars.same);
        for (Way& w : ways) {
            if (w.at.empty() && !w.runs) w.n = n, w.mean = mean, w.low = low, w.m2 = m2, w.sets = total;
            else if (!w.runs) merge(w);
            w.var.resize(size_t(w.sets));
            bool every = true;
            double* var = w.var.data();
            const double *count = w.n.data(), *square = w.m2.data();
            for (int64_t j = 0; j < w.sets; ++j) {
                var[j] = count[j] > 0 ? square[j] / count[j] : 0;
                every = every & (weighs ? (count[j] > 0) & (square[j] > 0) : count[j] > 1);
            }
            alike = alike && every;
            if (!results) continue;
            w.rate.resize(size_t(w.sets));
            for (size_t j = 0; j < size_t(w.sets); ++j) {
                const double square = w.var[j] + eps;
                w.rate[j] = square > 0 ? 1 / std::sqrt(square) : square <= 0 ? 0 : square;
            }
        }
    }

    // Softmax of one row of logits over those patterns that are known. It is kept while row and patterns are the same.
    struct Shares {
        double of[MOST_WAYS];
        int64_t row = -1;
        uint64_t known = 0;

        void take(const Logits& logits, int64_t at, uint64_t bits, int ways) {
            if (at == row && bits == known) return;
            row = at, known = bits;
            const double* value = logits.value.data() + at;
            double most = -INFINITY, sum = 0;
            for (int k = 0; k < ways; ++k)
                if (bits >> k & 1) most = std::max(most, value[k]);
            for (int k = 0; k < ways; ++k) sum += of[k] = bits >> k & 1 ? std::exp(value[k] - most) : 0;
            for (int k = 0; k < ways; ++k) of[k] = sum > 0 || sum != sum ? of[k] / sum : 0;
        }
    };

    // Goes from row to row of logits.
    struct Rows {
        const Logits& logits;
        int64_t at = 0, index[MOST] = {};
        explicit Rows(const Logits& logits) : logits(logits) {}
        void next() {
            if (logits.same) return;
            for (int a = logits.axes - 1; a >= 0; --a) {
                at += logits.step[a];
                if (++index[a] < logits.size[a]) return;
                at -= logits.step[a] * logits.size[a], index[a] = 0;
            }
        }
    };

    struct One {  // what there is of one of the finest sets
        int64_t place[MOST_WAYS];
        const double *w, *v;  // shares of means, or of results; of variances
        uint64_t known;
        int64_t row, var_row;
    };

    // Calls f(s, what there is of the set) for each of the finest sets.
    template <class F>
    void each(F f) const {
        const int count = int(ways.size());
        Rows rows(of_means), var_rows(of_vars);
        Shares w, v;
        One one;
        for (int64_t s = 0; s < total; ++s, rows.next(), var_rows.next()) {
            uint64_t some = 0, known = 0;
            for (int k = 0; k < count; ++k) {
                const int64_t j = one.place[k] = ways[size_t(k)].place(s);
                const double n_of = ways[size_t(k)].n[size_t(j)];
                const bool has = n_of > 0;
                some |= uint64_t(has) << k;
                known |= uint64_t(has && (weighs ? ways[size_t(k)].m2[size_t(j)] > 0 : n_of > 1)) << k;
            }
            one.known = known ? known : some;
            one.row = rows.at, one.var_row = var_rows.at;
            w.take(of_means, one.row, one.known, count);
            if (apart) v.take(of_vars, one.var_row, one.known, count);
            one.w = w.of, one.v = apart ? v.of : w.of;
            f(s, one);
        }
    }

    // Of results, the weights of means: w / sigma, of which `rate` is the sum. Without any sigma they are all the same.
    double weigh(const One& one, double* share) const {
        double rate = 0;
        int known = 0;
        const int count = int(ways.size());
        for (int k = 0; k < count; ++k) {
            share[k] = one.known >> k & 1 ? one.w[k] * ways[size_t(k)].rate[size_t(one.place[k])] : 0;
            rate += share[k], known += one.known >> k & 1;
        }
        for (int k = 0; k < count; ++k) {
            if (rate > 0 || rate != rate) share[k] /= rate;
            else share[k] = one.known >> k & 1 ? 1. / known : 0;
        }
        return rate;
    }

    struct Mixed {
        double count, shift, rest, var;  // the mean is shift + rest
    };

    Mixed mixed(const One& one, const double* share, double rate) const {
        Mixed m{0, 0, 0, 0};
        bool first = true;
        for (int k = 0; k < int(ways.size()); ++k) {
            if (!(one.known >> k & 1)) continue;
            const Way& way = ways[size_t(k)];
            const size_t j = size_t(one.place[k]);
            if (first) m.shift = way.mean[j], first = false;
            m.count += share[k] * way.n[j];
            m.rest += share[k] * ((way.mean[j] - m.shift) + way.low[j]);
            if (!results) m.var += one.v[k] * way.var[j];
        }
        if (results) m.var = rate > 0 ? std::max(1 / (rate * rate) - eps, 0.) : rate != rate ? rate : 0;
        return m;
    }

    // Calls f(set of the pattern, set) for all finest sets.
    template <class F>
    void along(const Way& way, F f) const {
        const int64_t all = total;
        const int32_t* at = way.at.data();
        if (way.at.empty())
            for (int64_t s = 0; s < all; ++s) f(s, s);
        else
            for (int64_t s = 0; s < all; ++s) f(int64_t(at[s]), s);
    }

    // What `mixed` says, pattern by pattern, where all sets have the same shares.
    struct Alike {
        Shares w, v;
        std::vector<double> count, shift, rest, var;
    };

    Alike mixed_alike() const {
        Alike m;
        const int ways_ = int(ways.size());
        const uint64_t bits = ways_ < 64 ? (uint64_t(1) << ways_) - 1 : ~uint64_t(0);
        m.w.take(of_means, 0, bits, ways_), m.v.take(apart ? of_vars : of_means, 0, bits, ways_);
        for (auto* field : {&m.count, &m.shift, &m.rest, &m.var}) field->assign(size_t(total), 0);
        double *count = m.count.data(), *shift = m.shift.data(), *rest = m.rest.data(), *var = m.var.data();
        for (int k = 0; k < ways_; ++k) {
            const Way& way = ways[size_t(k)];
            const double *n_of = way.n.data(), *high = way.mean.data(), *lower = way.low.data(), *of_var = way.var.data();
            const double w_k = m.w.of[k], v_k = m.v.of[k];
            if (k == 0) along(way, [&](int64_t j, int64_t s) { shift[s] = high[j]; });
            along(way, [&](int64_t j, int64_t s) {
                count[s] += w_k * n_of[j], rest[s] += w_k * ((high[j] - shift[s]) + lower[j]), var[s] += v_k * of_var[j];
            });
        }
        return m;
    }

    template <class T>
    void forward(T* to_count, T* to_mean, T* to_m2, T* to_low) const {
        auto put = [=](int64_t s, const Mixed& m) {
            const T high = T(m.shift + m.rest), count = T(m.count);
            to_count[s] = count, to_mean[s] = high, to_m2[s] = T(m.var * double(count));
            to_low[s] = T((m.shift - double(high)) + m.rest);
        };
        if (alike) {
            const Alike m = mixed_alike();
            const double *count = m.count.data(), *shift = m.shift.data(), *rest = m.rest.data(), *var = m.var.data();
            for (int64_t s = 0, all = total; s < all; ++s) put(s, Mixed{count[s], shift[s], rest[s], var[s]});
            return;
        }
        double weighed[MOST_WAYS];
        each([&](int64_t s, const One& one) {
            const double rate = results ? weigh(one, weighed) : 0;
            put(s, mixed(one, results ? weighed : one.w, rate));
        });
    }

    // From the gradients of mean and M2 to those of the finest mean and M2, and of the logits. The count is a constant.
    void backward(const std::vector<double>& of_mean, const std::vector<double>& of_m2, double* to_mean, double* to_m2) {
        const int count = int(ways.size());
        std::vector<std::vector<double>> g_mean(ways.size()), g_var(ways.size());
        for (size_t k = 0; k < ways.size(); ++k)
            if (!ways[k].runs) g_mean[k].assign(size_t(ways[k].sets), 0), g_var[k].assign(size_t(ways[k].sets), 0);
        of_means.gradient.assign(of_means.value.size(), 0), of_vars.gradient.assign(of_vars.value.size(), 0);
        if (alike) {
            const Alike m = mixed_alike();
            const double *g = of_mean.data(), *g2 = of_m2.data();
            const double *of_count = m.count.data(), *shift = m.shift.data(), *rest = m.rest.data(), *var = m.var.data();
            for (int k = 0; k < count; ++k) {
                const Way& way = ways[size_t(k)];
                const double *high = way.mean.data(), *lower = way.low.data(), *of_var = way.var.data();
                const double w_k = m.w.of[k], v_k = m.v.of[k];
                double of_w = 0, of_v = 0, *to_g = g_mean[size_t(k)].data(), *to_g2 = g_var[size_t(k)].data();
                along(way, [&](int64_t j, int64_t s) {
                    of_w += g[s] * (((high[j] - shift[s]) + lower[j]) - rest[s]);
                    of_v += g2[s] * of_count[s] * (of_var[j] - var[s]);
                });
                of_means.gradient[size_t(k)] += w_k * of_w;
                (apart ? of_vars : of_means).gradient[size_t(k)] += v_k * of_v;
                if (way.runs) continue;
                along(way, [&](int64_t j, int64_t s) { to_g[j] += w_k * g[s], to_g2[j] += v_k * (g2[s] * of_count[s]); });
            }
        }
        double weighed[MOST_WAYS], g_share[MOST_WAYS];
        if (!alike) each([&](int64_t s, const One& one) {
            const double rate = results ? weigh(one, weighed) : 0;
            const double* share = results ? weighed : one.w;
            const Mixed m = mixed(one, share, rate);
            const double g = of_mean[size_t(s)], g_of_var = of_m2[size_t(s)] * m.count;
            // Where the variance is clamped to 0 it is a constant, as without any sigma.
            const double g_rate = results && rate > 0 && 1 / (rate * rate) - eps >= 0 ? -2 * g_of_var / (rate * rate * rate) : 0;
            double* gradient = of_means.gradient.data() + one.row;
            double* var_gradient = apart ? of_vars.gradient.data() + one.var_row : gradient;
            double all = 0;
            for (int k = 0; k < count; ++k) {
                g_share[k] = 0;
                if (!(one.known >> k & 1)) continue;
                const Way& way = ways[size_t(k)];
                const size_t j = size_t(one.place[k]);
                const double away = ((way.mean[j] - m.shift) + way.low[j]) - m.rest;
                double of_var;
                if (results) {
                    const double g_product = rate > 0 ? g * away / rate + g_rate : 0, r = way.rate[j];
                    of_var = -.5 * g_product * one.w[k] * r * r * r;
                    g_share[k] = g_product * r;
                    all += one.w[k] * g_share[k];
                } else {
                    of_var = one.v[k] * g_of_var;
                    gradient[k] += one.w[k] * away * g;
                    var_gradient[k] += one.v[k] * (way.var[j] - m.var) * g_of_var;
                }
                if (!way.runs) g_mean[size_t(k)][j] += share[k] * g, g_var[size_t(k)][j] += of_var;
            }
            for (int k = 0; results && k < count; ++k)
                if (one.known >> k & 1) gradient[k] += one.w[k] * (g_share[k] - all);
        });
        std::fill_n(to_mean, total, 0.), std::fill_n(to_m2, total, 0.);
        for (size_t k = 0; k < ways.size(); ++k) {
            const Way& way = ways[k];
            if (way.runs) continue;
            double *g = g_mean[k].data(), *g2 = g_var[k].data();
            const double *of_n = way.n.data(), *high = way.mean.data(), *lower = way.low.data();
            const double *own_n = n.data(), *own = mean.data(), *own_low = low.data();
            for (int64_t j = 0; j < way.sets; ++j)
                if (of_n[j] > 0) g[j] /= of_n[j], g2[j] /= of_n[j];
            along(way, [&](int64_t j, int64_t s) {
                if (!(own_n[s] > 0)) return;
                to_mean[s] += own_n[s] * (g[j] + 2 * g2[j] * ((own[s] - high[j]) + (own_low[s] - lower[j])));
                to_m2[s] += g2[j];
            });
        }
    }
};
