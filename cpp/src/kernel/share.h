// The keys with a share of the row's softmax.
//
// A key has the share `min_share` when its score is at least the log-sum-exp of all scores plus
// log(min_share). That sum is estimated before any but the always-kept keys are scored: these exactly, and
// the other keys of each whole block by their number times exp of their mean score. By Jensen's inequality
// that is never above the true sum, and neither is the least score that follows, so what is kept contains all
// that has the share. Given the least score no search is needed: the scan's error bounds leave out what is
// certainly below it, and the keys that remain are scored exactly. (A softcap comes after the mean, as in the
// tail: then the sum is nearly a lower bound.)
#pragma once

namespace sparsek {
namespace SPARSEK_KERNEL {

// The first n of 16 numbers, the others -inf.
inline F first_lanes(F x, int64_t n) {
    return keep_lanes(x, static_cast<uint32_t>(first_bits(minimum(16, n))), -INFINITY);
}

// log of the sum of exp of the scores: of the `count` listed keys, and of the means of what they leave out of
// whole blocks. -inf where there are none.
inline float log_total(const Problem& p, const uint64_t* allowed, int64_t count, int64_t blocks,
                       const SparseWork& w) {
    tail_logits(p, allowed, count, blocks, w);
    const auto score = [&](int64_t i) {
        const F x = load(w.weights + i);
        return first_lanes(p.softcap > 0.0f ? capped(x, p.softcap) : x, count - i);
    };
    const auto mean = [&](int64_t b) { return first_lanes(load(w.tail + b), blocks - b); };
    F most = set1(-INFINITY), total = set1(0.0f);
    for (int64_t i = 0; i < count; i += 16) most = max(score(i), most);
    for (int64_t b = 0; b < blocks; b += 16) most = max(mean(b), most);
    const float peak = highest(most);
    if (!(peak > -INFINITY)) return -INFINITY;
    for (int64_t i = 0; i < count; i += 16) total = total + exp(score(i) - set1(peak));
    for (int64_t b = 0; b < blocks; b += 16) total = total + exp(mean(b) - set1(peak));
    return peak + __builtin_logf(sum(total));
}

// The least score, before the softcap, of a key with the share; the always-kept keys are listed.
inline float least_score(const Problem& p, const uint64_t* allowed, int64_t always, int64_t blocks,
                         const SparseWork& w) {
    const float least = log_total(p, allowed, always, blocks, w) + __builtin_logf(p.rule.min_share);
    if (p.softcap <= 0.0f) return least;
    const float x = least / p.softcap;
    return x >= 1.0f ? INFINITY : x <= -1.0f ? -INFINITY : p.softcap * __builtin_atanhf(x);
}

// Adds the candidates whose score can be `least` to the `count` listed keys; returns how many are listed.
inline int64_t list_reaching(const HeadIndex& index, const Row& row, const int16_t* scores, float least,
                             int64_t first, int64_t last, int64_t count, const SparseWork& w) {
    const F level = set1((least - row.offset) / row.unit);
    for (int64_t b = first; b < last; b += 16) {
        // The second is taken where the first is NaN: a block without a bound excludes nothing.
        const F lowest = max(level - scan_errors(index, row, b, minimum(16, last - b)), set1(kLowest));
        store(w.thresholds + b, min(lowest, set1(kHighest)));
    }
    const auto reaching = [&](int64_t b) {
        return w.candidates[b] & at_least64(scores + b * kBlock, static_cast<int16_t>(w.thresholds[b]));
    };
    return count + list_bits(first, last, reaching, w.index + count);
}

// Of the keys listed from `always` on those that reach `least`, at most `top_k` of them; returns how many
// keys are listed then.
inline int64_t keep_shares(const Problem& p, float least, int64_t always, int64_t count,
                           const SparseWork& w) {
    int64_t n = always;
    for (int64_t i = always; i < count; i += 16) {
        const uint32_t bits =
            at_least16(w.weights + i, least) & static_cast<uint32_t>(first_bits(minimum(16, count - i)));
        compress16(w.index + n, w.index + i, bits);
        n += compress16(w.weights + n, w.weights + i, bits);
    }
    if (n - always <= p.rule.top_k) return n;
    if (p.rule.top_k > 0) keep_best(p.rule.top_k, n - always, w.index + always, w.weights + always, w.order);
    return always + p.rule.top_k;
}

// Lists what a row keeps; returns how many keys. list_always(from) and list_reaching(least, from) append to
// the list, with exact scores, the keys that are kept anyway and the candidates that may reach the least
// score.
template <typename ListAlways, typename ListReaching>
inline int64_t list_shares(const Problem& p, const uint64_t* allowed, int64_t blocks, const SparseWork& w,
                           ListAlways list_always, ListReaching list_reaching) {
    const int64_t always = list_always(0);
    const float least = least_score(p, allowed, always, blocks, w);
    return keep_shares(p, least, always, list_reaching(least, always), w);
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
