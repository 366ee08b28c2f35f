// The K best keys of a row: the scan's scores in 8 bits narrow them down to a few certain candidates, those
// are scored exactly, and the best are kept.
//
// Why the kept set is exact. Let a be a row's low-precision scores and e_b a bound on their error in block b.
// The K-th largest of the maxima over disjoint groups of keys is at most the K-th largest score: at least K
// keys are as good. Every key of block b that lies more than e_b below it is left out; its true score is
// below `bound`. When the K-th best exact score of those that remain is above `bound`, nothing left out can
// belong to the best K. The margin is chosen so that this nearly always holds, and the rows where it does not
// are done again with a wider one.
#pragma once

namespace sparsek {
namespace SPARSEK_KERNEL {

inline constexpr int16_t kForbidden = -32768;
inline constexpr int16_t kLowest = -32767, kHighest = 32767;  // of a score
inline constexpr float kMargins[] = {1.1f, 2.1f, INFINITY};

// The k-th largest of n numbers, n a multiple of 64.
inline int16_t kth_largest(const int16_t* x, int64_t n, int64_t k) {
    int low = kForbidden, high = 32767;  // at least k numbers are >= low
    while (low < high) {
        const int middle = (low + high + 1) >> 1;
        int64_t count = 0;
        for (int64_t i = 0; i < n; i += 64)
            count += count_bits(at_least64(x + i, static_cast<int16_t>(middle)));
        if (count >= k) {
            low = middle;
            if (count == k) break;
        } else {
            high = middle - 1;
        }
    }
    return static_cast<int16_t>(low);
}

// A score as an integer of the same order; -0 becomes 0, for they are equal.
inline int32_t order_of(float score) {
    score += 0.0f;
    const int32_t bits = load_int32(&score);
    return bits ^ static_cast<int32_t>(static_cast<uint32_t>(bits >> 31) >> 1);
}

inline float score_of(int32_t order) {
    const int32_t bits = order ^ static_cast<int32_t>(static_cast<uint32_t>(order >> 31) >> 1);
    float score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
}

// The k-th largest of `count` numbers from `lowest` to `highest`, or one below it that k numbers reach: where
// that many are at least as large, the search need not go on. n: the length with padding.
inline int64_t kth_largest_order(const int32_t* order, int64_t n, int64_t count, int64_t k, int32_t lowest,
                                 int32_t highest) {
    // At least k numbers are >= low, fewer are >= high. Steps go by turns to where it would be if they were
    // spread evenly, which is nearly true, and to the middle.
    int64_t low = lowest, high = static_cast<int64_t>(highest) + 1, n_low = count, n_high = 0;
    for (bool guess = true; high - low > 1 && n_low > k; guess = !guess) {
        const auto share = static_cast<double>(n_low - k) / static_cast<double>(n_low - n_high);
        const auto step = static_cast<int64_t>(static_cast<double>(high - low) * (guess ? share : 0.5));
        const int64_t middle = low + minimum(maximum(step, 1), high - low - 1);
        int64_t found = 0;
        for (int64_t i = 0; i < n; i += 16)
            found += count_bits(at_least16(order + i, static_cast<int32_t>(middle)));
        if (found >= k) {
            low = middle;
            n_low = found;
        } else {
            high = middle;
            n_high = found;
        }
    }
    return low;
}

// Keeps the `k` best of `count` > k listed keys, ties to the lower position, in their order, and moves their
// scores along. Returns the k-th best score.
inline float keep_best(int64_t k, int64_t count, int32_t* index, float* scores, int32_t* order) {
    const int64_t padded = round_up(count, 16);
    int32_t highest_order = INT32_MIN, lowest_order = INT32_MAX;
    for (int64_t i = 0; i < count; ++i) {
        order[i] = order_of(scores[i]);
        if (order[i] > highest_order) highest_order = order[i];
        if (order[i] < lowest_order) lowest_order = order[i];
    }
    for (int64_t i = count; i < padded; ++i) order[i] = INT32_MIN;
    const int64_t low = kth_largest_order(order, padded, count, k, lowest_order, highest_order);
    int64_t above = 0;
    for (int64_t i = 0; i < count; ++i) above += order[i] > low;
    int64_t level = k - above, n = 0;  // so many of those that are equal to `low`
    for (int64_t i = 0; i < padded; i += 16) {
        const uint32_t better = low < INT32_MAX ? at_least16(order + i, static_cast<int32_t>(low + 1)) : 0;
        uint32_t equal = at_least16(order + i, static_cast<int32_t>(low)) & ~better;
        for (; count_bits(equal) > level; equal &= ~(1u << highest_bit(equal))) continue;
        level -= count_bits(equal);
        compress16(index + n, index + i, better | equal);
        n += compress16(scores + n, scores + i, better | equal);
    }
    // The second is taken where the first is NaN.
    F smallest = set1(INFINITY);
    for (int64_t i = 0; i < n; i += 16) {
        const auto lanes = static_cast<uint32_t>(first_bits(minimum(16, n - i)));
        smallest = min(keep_lanes(load(scores + i), lanes, INFINITY), smallest);
    }
    return 0.0f - highest(set1(0.0f) - smallest);
}

// Bounds on the errors of the scan's scores in up to 16 blocks from b on, in its units.
inline F scan_errors(const HeadIndex& index, const Row& row, int64_t b, int64_t lanes) {
    // One unit more, for the bits that the shift cut off and the rounding of this sum.
    return fma(set1(row.query_norm), load_n(index.residual + b, lanes),
               fma(set1(row.query_error), load_n(index.norm + b, lanes), set1(1.5f)));
}

// The best `top_k` of the row's candidates, which lie in the blocks [first, last): their positions and exact
// scores. Returns their number.
template <typename T>
inline int64_t select_row(const Problem& p, const HeadIndex& index, const T* keys, const Row& row,
                          const float* query, int16_t* scores, int64_t first, int64_t last,
                          const SparseWork& w) {
    int64_t total = 0;
    for (int64_t b = first; b < last; ++b) total += count_bits(w.candidates[b]);
    const int64_t k = p.rule.top_k;
    if (k == 0 || total == 0) return 0;
    if (total <= k) {
        const int64_t n = list_bits(first, last, [&](int64_t b) { return w.candidates[b]; }, w.index);
        score_keys(p, keys, query, w.index, 0, n, w.weights);
        return n;
    }
    for (int64_t b = first; b < last; ++b) {
        if (w.candidates[b] != ~0ull) keep64(scores + b * kBlock, w.candidates[b], kForbidden);
    }
    // Maxima over about 5 k groups of equally spaced keys.
    const int64_t stride = minimum(last - first, (5 * k + kBlock - 1) / kBlock);
    for (int64_t g = 0; g < stride; ++g) {
        max_of_blocks(w.maxima + g * kBlock, scores + (first + g) * kBlock, stride * kBlock,
                      (last - first - g + stride - 1) / stride);
    }
    const float level = kth_largest(w.maxima, stride * kBlock, k);
    for (const float margin : kMargins) {
        F smallest = set1(INFINITY);
        for (int64_t b = first; b < last; b += 16) {
            const int64_t lanes = minimum(16, last - b);
            const F error = scan_errors(index, row, b, lanes);
            // The second is taken where the first is NaN: a block without a bound excludes nothing.
            smallest = min(keep_lanes(error, static_cast<uint32_t>(first_bits(lanes)), INFINITY), smallest);
            store(w.thresholds + b, max(set1(level) - set1(margin) * error, set1(kLowest)));
        }
        const float smallest_error = 0.0f - highest(set1(0.0f) - smallest);
        const int64_t n = list_bits(
            first, last,
            [&](int64_t b) {
                return w.candidates[b] &
                       at_least64(scores + b * kBlock, static_cast<int16_t>(w.thresholds[b]));
            },
            w.index);
        if (n < k) continue;
        score_keys(p, keys, query, w.index, 0, n, w.weights);
        if (n == total) {
            if (n > k) keep_best(k, n, w.index, w.weights, w.order);
            return k;
        }
        float kth = INFINITY;
        if (n > k) {
            kth = keep_best(k, n, w.index, w.weights, w.order);
        } else {
            for (int64_t i = 0; i < n; ++i) kth = w.weights[i] < kth ? w.weights[i] : kth;
        }
        const float bound = (level - (margin - 1.0f) * smallest_error) * row.unit + row.offset;
        if (kth > bound) return k;
    }
    return k;  // not reached: an infinite margin keeps every candidate
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
