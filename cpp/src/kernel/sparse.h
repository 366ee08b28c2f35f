// One tile of query rows: scan all keys in 8 bits, narrow them down to a few certain candidates, rescore
// those exactly, keep the best, attend.
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

inline constexpr uint16_t kMinusInfinity = 0xfc00;  // in half precision
inline constexpr int16_t kForbidden = -32768;
inline constexpr int16_t kLowest = -32767;  // of a score
inline constexpr float kScoreRange = 32000.0f;
inline constexpr float kMargins[] = {1.1f, 2.1f, INFINITY};

// Hands out aligned pieces of a thread's scratch memory; with a null start it only counts.
class Arena {
   public:
    explicit Arena(std::byte* start) : start_(start) {}
    template <typename T>
    T* take(int64_t count) {
        T* piece = start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + used_);
        used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    size_t used() const { return used_; }

   private:
    std::byte* start_;
    size_t used_ = 0;
};

struct SparseWork {
    SparseWork(const Problem& p, Arena& arena)
        : blocks(blocks_of(p.num_keys)),
          padded_keys(blocks * kBlock),
          query_bytes(round_up(p.head_size, 4)),
          query_floats(round_up(p.head_size, 16)),
          scores(arena.take<int16_t>(kTileRows * padded_keys)),
          allowed(arena.take<uint64_t>(kTileRows * blocks)),
          always(arena.take<uint64_t>(blocks)),
          candidates(arena.take<uint64_t>(blocks)),
          strided(arena.take<uint64_t>(blocks)),
          maxima(arena.take<int16_t>(padded_keys)),
          thresholds(arena.take<float>(blocks + 16)),
          index(arena.take<int32_t>(padded_keys + 32)),
          order(arena.take<int32_t>(padded_keys + 16)),
          weights(arena.take<float>(padded_keys + 16)),
          tail(arena.take<float>(blocks + 16)),
          tail_sums(arena.take<float>(blocks + 16)),
          queries(arena.take<float>(kTileRows * query_floats)),
          quantised(arena.take<int8_t>(kTileRows * query_bytes)),
          logarithms(arena.take<float>(kBlock + 1)),
          out(arena.take<float>(round_up(p.value_size, 16))) {}

    int64_t blocks, padded_keys, query_bytes, query_floats;
    int16_t* scores;       // [rows, padded_keys]
    uint64_t* allowed;     // [rows, blocks], bits
    uint64_t* always;      // of one row, as all below
    uint64_t* candidates;  // allowed and not always kept
    uint64_t* strided;     // multiples of the stride
    int16_t* maxima;
    float* thresholds;
    int32_t* index;  // kept or candidate positions
    int32_t* order;  // their scores as integers of the same order
    float* weights;  // their scores, then their weights
    float* tail;
    float* tail_sums;
    float* queries;
    int8_t* quantised;
    float* logarithms;  // of 0 to 64
    float* out;
};

struct Row {
    int64_t query, head, position;
    float unit;         // of the integer scores
    float offset;       // score = unit * integer + offset
    float query_norm;   // of the scaled query, in units
    float query_error;  // norm of what its rounding took away, in units
    int32_t start, shift;
};

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// See Kernel::pack_mask.
inline bool pack_mask(const Problem& p, int64_t batch, int64_t head, int64_t query, uint64_t* bits) {
    const Mask& m = p.mask;
    const int64_t at = batch * m.batch_stride + head * m.head_stride + query * m.query_stride;
    bool good = true;
    for (int64_t b = 0; b < blocks_of(p.num_keys); ++b) {
        const int64_t first = b * kBlock, count = minimum(kBlock, p.num_keys - first);
        const bool whole = m.key_stride == 1 && count == kBlock;
        bits[b] = 0;
        if (m.form == Mask::Form::bytes) {
            const uint8_t* x = static_cast<const uint8_t*>(m.data) + at + first * m.key_stride;
            if (whole) bits[b] = nonzero64(x);
            for (int64_t j = 0; !whole && j < count; ++j)
                bits[b] |= static_cast<uint64_t>(x[j * m.key_stride] != 0) << j;
        } else {
            const uint16_t* x = static_cast<const uint16_t*>(m.data) + at + first * m.key_stride;
            uint64_t forbidden = 0;
            if (whole) {
                bits[b] = equal64(x, 0);
                forbidden = equal64(x, kMinusInfinity);
            }
            for (int64_t j = 0; !whole && j < count; ++j) {
                bits[b] |= static_cast<uint64_t>(x[j * m.key_stride] == 0) << j;
                forbidden |= static_cast<uint64_t>(x[j * m.key_stride] == kMinusInfinity) << j;
            }
            good &= (bits[b] | forbidden) == first_bits(count);
        }
    }
    return good;
}

// Bits of the keys that a row may see in the blocks [first, last), from bits[0] on.
inline void allowed_bits(const Problem& p, int64_t batch, const Row& row, int64_t first, int64_t last,
                         uint64_t* bits) {
    const int64_t seen = p.is_causal ? minimum(p.num_keys, maximum(0, row.position + 1)) : p.num_keys;
    for (int64_t b = first; b < last; ++b)
        bits[b - first] = first_bits(maximum(0, minimum(kBlock, seen - b * kBlock)));
    const Mask& m = p.mask;
    if (m.data == nullptr) return;
    const uint64_t* words = static_cast<const uint64_t*>(m.data) + batch * m.batch_stride +
                            row.head * m.head_stride + row.query * m.query_stride;
    for (int64_t b = first; b < last; ++b) bits[b - first] &= words[b];
}

// One row of q in float.
inline void load_query(const Problem& p, int64_t batch, const Row& row, float* query) {
    const int64_t at = batch * p.q.batch_stride + row.head * p.q.head_stride + row.query * p.q.token_stride;
    const auto load_as = [&](const auto* type) {
        const auto* q = static_cast<decltype(type)>(p.q.data) + at;
        for (int64_t d = 0; d < p.head_size; ++d) query[d] = to_float(q[d]);
    };
    if (p.query_dtype == DType::f32) load_as(static_cast<const float*>(nullptr));
    if (p.query_dtype == DType::f16) load_as(static_cast<const Half*>(nullptr));
    if (p.query_dtype == DType::bf16) load_as(static_cast<const BFloat*>(nullptr));
}

// One row of the output: `values` times `factor`.
inline void store_row(const Problem& p, int64_t batch, const Row& row, const float* values, float factor,
                      const Output& out) {
    const int64_t at = batch * out.batch_stride + row.head * out.head_stride + row.query * out.token_stride;
    const auto store_as = [&](auto* type) {
        auto* to = static_cast<decltype(type)>(out.data) + at;
        for (int64_t d = 0; d < p.value_size; ++d) from_float(values[d] * factor, to + d);
    };
    if (p.query_dtype == DType::f32) store_as(static_cast<float*>(nullptr));
    if (p.query_dtype == DType::f16) store_as(static_cast<Half*>(nullptr));
    if (p.query_dtype == DType::bf16) store_as(static_cast<BFloat*>(nullptr));
}

// Blocks [first, end) and [again, last) are those that may have a key which is kept whatever its score.
struct Spans {
    int64_t end, again;
};

// Bits of the keys that are kept whatever their score, in the blocks [first, last).
inline Spans always_bits(const Problem& p, const Row& row, const uint64_t* allowed, int64_t first,
                         int64_t last, const SparseWork& w) {
    for (int64_t b = first; b < last; ++b) w.always[b] = 0;
    for (int64_t b = first; b < last && b * kBlock < p.rule.sinks; ++b)
        w.always[b] = allowed[b] & first_bits(p.rule.sinks - b * kBlock);
    const int64_t end = maximum(first, minimum(last, blocks_of(minimum(p.rule.sinks, p.num_keys))));
    int64_t room = p.rule.window, again = last;
    const int64_t newest = minimum(row.position, p.num_keys - 1);
    for (int64_t b = minimum(newest / kBlock, last - 1); newest >= 0 && b >= first && room > 0; --b) {
        uint64_t word = allowed[b] & first_bits(newest - b * kBlock + 1);
        while (count_bits(word) > room) word &= word - 1;
        room -= count_bits(word);
        w.always[b] |= word;
        again = b;
    }
    if (p.rule.stride > 0) {
        for (int64_t b = first; b < last; ++b) w.always[b] |= allowed[b] & w.strided[b];
        return {last, last};
    }
    return {end, maximum(end, again)};
}

// The row's query, padded with zeros, times the scale of the scores, in 8 bits.
inline void quantise_query(const Problem& p, const HeadIndex& index, float largest_norm, const float* query,
                           Row* row, int8_t* quantised, int64_t bytes) {
    const auto lanes_at = [&](int64_t c) { return minimum(16, p.head_size - c); };
    F offsets = set1(0.0f), widest = set1(0.0f);
    for (int64_t c = 0; c < p.head_size; c += 16) {
        const F scaled = load(query + c) * set1(p.scale);
        offsets = fma(scaled, load_n(index.center + c, lanes_at(c)), offsets);
        const F channel = scaled * load_n(index.scale + c, lanes_at(c));
        widest = max(max(channel, set1(0.0f) - channel), widest);
    }
    const float range = highest(widest);
    const float step = range > 0.0f && range < 1e30f ? range / kQueryMax : 1.0f;
    F norms = set1(0.0f), errors = set1(0.0f), kept = set1(0.0f);
    int32_t total = 0;
    for (int64_t c = 0; c < p.head_size; c += 16) {
        const F x = load(query + c) * load_n(index.scale + c, lanes_at(c)) * set1(p.scale / step);
        const F r = max(min(round(x), set1(kQueryMax)), set1(-kQueryMax));
        norms = fma(x, x, norms);
        errors = fma(x - r, x - r, errors);
        kept = fma(r, r, kept);
        float lanes[16];
        store(lanes, r);
        for (int64_t i = 0; i < minimum(16, bytes - c); ++i) {
            const auto byte = static_cast<int8_t>(lanes[i]);
            quantised[c + i] = byte;
            total += byte;
        }
    }
    const float largest = __builtin_sqrtf(sum(kept)) * largest_norm;
    float unit = 1.0f;
    row->shift = 0;
    for (; row->shift < 16 && largest > kScoreRange * unit; unit *= 2.0f) ++row->shift;
    row->start = -128 * total;
    row->unit = step * unit;
    row->offset = sum(offsets);
    row->query_norm = __builtin_sqrtf(sum(norms)) / unit;
    row->query_error = __builtin_sqrtf(sum(errors)) / unit;
}

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

// Positions of the set bits that `keep(block)` leaves, in rising order; returns their number. Writes up to
// three numbers beyond them.
template <typename Keep>
inline int64_t list_bits(int64_t first, int64_t last, Keep keep, int32_t* out) {
    int64_t n = 0;
    constexpr uint64_t kEnd = 1ull << 63;  // lowest_bit is defined for a word that has a bit
    for (int64_t b = first; b < last; ++b) {
        uint64_t word = keep(b);
        const int count = count_bits(word);
        const auto start = static_cast<int32_t>(b * kBlock);
        // Three at once without asking how many there are: a wrong guess costs more than a write too many.
        for (int i = 0; i < 3; ++i, word &= word - 1) out[n + i] = start + lowest_bit(word | kEnd);
        for (int i = 3; i < count; ++i, word &= word - 1) out[n + i] = start + lowest_bit(word);
        n += count;
    }
    return n;
}

// Exact scores of the listed keys, before the softcap; the list is padded to a multiple of 16 by repetition.
template <typename T>
inline void score_keys(const Problem& p, const T* keys, const float* query, int32_t* index, int64_t first,
                       int64_t count, float* scores) {
    const int64_t padded = round_up(count, 16);
    for (int64_t i = count; i < padded; ++i) index[i] = index[count - 1];
    for (int64_t i = first; i < padded; i += 16) {
        const T* rows[16];
        for (int j = 0; j < 16; ++j) rows[j] = keys + index[i + j] * p.k.token_stride;
        // Scaled last: equal products stay equal, and ties go to the lower position.
        store(scores + i, dots(query, rows, p.head_size) * set1(p.scale));
    }
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
            // One unit more, for the bits that the shift cut off and the rounding of this sum.
            const F error = fma(set1(row.query_norm), load_n(index.residual + b, lanes),
                                fma(set1(row.query_error), load_n(index.norm + b, lanes), set1(1.5f)));
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

// The sums of the scores of all 64 keys, for the first `blocks` blocks.
inline void score_sums(const Problem& p, const HeadIndex& index, const float* query, int64_t blocks,
                       float* sums) {
    for (int64_t b = 0; b < blocks; b += 16) {
        const float* rows[16];
        for (int64_t j = 0; j < 16; ++j) rows[j] = index.key_mean + minimum(b + j, blocks - 1) * p.head_size;
        store(sums + b, dots(query, rows, p.head_size) * set1(kBlock * p.scale));
    }
}

// The complete and wholly allowed blocks lie among the first so many.
inline int64_t tail_blocks(const Problem& p, const uint64_t* allowed) {
    int64_t blocks = p.rule.centroid_tail ? p.num_keys / kBlock : 0;
    while (blocks > 0 && allowed[blocks - 1] != ~0ull) --blocks;
    return blocks;
}

// What the kept keys leave out, as one logit per complete and wholly allowed block; on entry `w.tail` has the
// sums of the blocks' scores.
inline void tail_logits(const Problem& p, const uint64_t* allowed, int64_t count, int64_t blocks,
                        const SparseWork& w) {
    int32_t* kept = w.order;
    std::memset(kept, 0, static_cast<size_t>(blocks) * sizeof(int32_t));
    std::memset(w.tail_sums, 0, static_cast<size_t>(blocks) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t b = w.index[i] / kBlock;
        if (b >= blocks) continue;
        ++kept[b];
        w.tail_sums[b] += w.weights[i];
    }
    for (int64_t b = 0; b < blocks; ++b) {
        const auto dropped = static_cast<float>(kBlock - kept[b]);
        w.tail[b] = (w.tail[b] - w.tail_sums[b]) / (dropped > 0.0f ? dropped : 1.0f);
    }
    if (p.softcap > 0.0f) {
        for (int64_t b = 0; b < blocks; b += 16) store(w.tail + b, capped(load(w.tail + b), p.softcap));
    }
    for (int64_t b = 0; b < blocks; ++b) {
        w.tail[b] = allowed[b] == ~0ull ? w.tail[b] + w.logarithms[kBlock - kept[b]] : -INFINITY;
    }
}

// Exponentials of the first `count` numbers less `peak`, in place; the padding becomes 0. Returns their sum.
inline float exponentials(float* x, int64_t count, float peak) {
    const int64_t padded = round_up(count, 16);
    for (int64_t i = count; i < padded; ++i) x[i] = -INFINITY;
    F total = set1(0.0f);
    for (int64_t i = 0; i < padded; i += 16) {
        const F e = exp(load(x + i) - set1(peak));
        store(x + i, e);
        total = total + e;
    }
    return sum(total);
}

inline float largest_of(const float* x, int64_t count, float start) {
    for (int64_t i = 0; i < count; ++i) start = x[i] > start ? x[i] : start;
    return start;
}

// Softmax over the `count` kept keys and the tail, into the row of the output. `means`: of the blocks'
// values.
template <typename T>
inline void attend_row(const Problem& p, const T* values, const float* means, const Row& row, int64_t count,
                       int64_t blocks, int64_t batch, const SparseWork& w, const Output& out) {
    if (p.softcap > 0.0f) {
        for (int64_t i = 0; i < count; i += 16) store(w.weights + i, capped(load(w.weights + i), p.softcap));
    }
    const float peak = largest_of(w.tail, blocks, largest_of(w.weights, count, -INFINITY));
    const float total = exponentials(w.weights, count, peak) + exponentials(w.tail, blocks, peak);
    for (int64_t d = 0; d < round_up(p.value_size, 16); ++d) w.out[d] = 0.0f;
    add_weighted<T>(
        w.weights, count, [&](int64_t i) { return values + w.index[i] * p.v.token_stride; }, p.value_size,
        w.out);
    add_weighted<float>(
        w.tail, blocks, [&](int64_t b) { return means + b * p.value_size; }, p.value_size, w.out);
    const float inverse = count + blocks == 0 ? 0.0f : 1.0f / total;
    store_row(p, batch, row, w.out, inverse, out);
}

inline void write_selection(const Problem& p, const Row& row, int64_t batch, int64_t count, int64_t first,
                            int64_t last, const SparseWork& w, const SelectionOut& out) {
    const int64_t at = (batch * p.heads + row.head) * p.num_queries + row.query;
    int32_t* indices = out.indices + at * out.width;
    // The chosen keys join the always-kept ones as bits, which puts all in order.
    for (int64_t i = 0; i < count; ++i) w.always[w.index[i] / kBlock] |= 1ull << (w.index[i] % kBlock);
    const int64_t n = list_bits(first, last, [&](int64_t b) { return w.always[b]; }, w.index);
    std::memcpy(indices, w.index, static_cast<size_t>(n) * sizeof(int32_t));
    for (int64_t i = n; i < out.width; ++i) indices[i] = -1;
    out.counts[at] = static_cast<int32_t>(n);
}

inline Row row_of(const Problem& p, const Tile& tile, int64_t r) {
    const int64_t group = p.heads / p.kv_heads, number = tile.first_row + r;
    Row row{};
    row.query = number / group;
    row.head = tile.kv_head * group + number % group;
    row.position = p.first_position + row.query;
    return row;
}

// The tile's queries in float, padded with zeros to `stride` floats.
inline void load_rows(const Problem& p, const Tile& tile, int64_t stride, float* queries) {
    std::memset(queries, 0, static_cast<size_t>(tile.num_rows * stride) * sizeof(float));
    for (int64_t r = 0; r < tile.num_rows; ++r)
        load_query(p, tile.batch, row_of(p, tile, r), queries + r * stride);
}

// The tile's queries, in float and in 8 bits.
inline void prepare_rows(const Problem& p, const HeadIndex& index, const Tile& tile, const SparseWork& w,
                         Row* rows) {
    float largest_norm = 0.0f;
    for (int64_t b = 0; b < w.blocks; ++b)
        largest_norm = index.norm[b] > largest_norm ? index.norm[b] : largest_norm;
    load_rows(p, tile, w.query_floats, w.queries);
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        rows[r] = row_of(p, tile, r);
        quantise_query(p, index, largest_norm, w.queries + r * w.query_floats, rows + r,
                       w.quantised + r * w.query_bytes, w.query_bytes);
    }
}

inline void scan_rows(const HeadIndex& index, int64_t num_rows, Row* rows, int64_t first, int64_t last,
                      const SparseWork& w, int16_t* scores) {
    int32_t start[kTileRows], shift[kTileRows];
    const int64_t padded_rows = round_up(num_rows, kScanRows);
    for (int64_t r = 0; r < padded_rows; ++r) {
        const int64_t from = minimum(r, num_rows - 1);  // those beyond the last repeat it
        start[r] = rows[from].start;
        shift[r] = rows[from].shift;
        if (r > from) {
            std::memcpy(w.quantised + r * w.query_bytes, w.quantised + from * w.query_bytes,
                        static_cast<size_t>(w.query_bytes));
        }
    }
    for (int64_t b = first; b < last; ++b) {
        for (int64_t r = 0; r < padded_rows; r += kScanRows) {
            scan_block(index.packed + b * kBlock * w.query_bytes, w.quantised + r * w.query_bytes,
                       w.query_bytes, start + r, shift + r, w.query_bytes / 4,
                       scores + r * w.padded_keys + b * kBlock, w.padded_keys);
        }
    }
}

template <typename T>
void scan_tile(const Problem& p, const HeadIndex& index, const Tile& tile, int64_t first, int64_t last,
               std::byte* workspace, int16_t* scores) {
    Arena arena(workspace);
    const SparseWork w(p, arena);
    Row rows[kTileRows];
    prepare_rows(p, index, tile, w, rows);
    scan_rows(index, tile.num_rows, rows, first, last, w, scores);
}

// What of the rule is the same for all rows.
inline void prepare_rule(const Problem& p, const SparseWork& w) {
    if (p.rule.stride > 0) {
        std::memset(w.strided, 0, static_cast<size_t>(w.blocks) * sizeof(uint64_t));
        for (int64_t j = 0; j < p.num_keys; j += p.rule.stride) w.strided[j / kBlock] |= 1ull << (j % kBlock);
    }
    if (p.rule.centroid_tail) {
        w.logarithms[0] = -INFINITY;
        for (int n = 1; n <= kBlock; ++n) w.logarithms[n] = __builtin_logf(static_cast<float>(n));
    }
}

template <typename T>
void sparse_tile(const Problem& p, const HeadIndex& index, const Tile& tile, std::byte* workspace,
                 int16_t* scores, const Output& out, const SelectionOut* selection) {
    Arena arena(workspace);
    const SparseWork w(p, arena);
    const T* keys = head_of<T>(p.k, tile.batch, tile.kv_head);
    const T* values = selection ? nullptr : head_of<T>(p.v, tile.batch, tile.kv_head);

    prepare_rule(p, w);
    Row rows[kTileRows];
    prepare_rows(p, index, tile, w, rows);
    int64_t first = w.blocks, last = 0;
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        uint64_t* allowed = w.allowed + r * w.blocks;
        allowed_bits(p, tile.batch, rows[r], 0, w.blocks, allowed);
        for (int64_t b = 0; b < w.blocks; ++b) {
            if (allowed[b] == 0) continue;
            first = minimum(first, b);
            last = maximum(last, b + 1);
        }
    }
    if (scores == nullptr) {
        scores = w.scores;
        if ((last - first) * kBlock > p.rule.top_k)
            scan_rows(index, tile.num_rows, rows, first, last, w, scores);
    }
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        const uint64_t* allowed = w.allowed + r * w.blocks;
        const float* query = w.queries + r * w.query_floats;
        const Spans spans = always_bits(p, rows[r], allowed, first, last, w);
        for (int64_t b = first; b < last; ++b) w.candidates[b] = allowed[b] & ~w.always[b];
        int64_t count =
            select_row(p, index, keys, rows[r], query, scores + r * w.padded_keys, first, last, w);
        if (selection != nullptr) {
            write_selection(p, rows[r], tile.batch, count, first, last, w, *selection);
            continue;
        }
        const int64_t chosen = count;
        const auto always = [&](int64_t b) { return w.always[b]; };
        count += list_bits(first, spans.end, always, w.index + count);
        count += list_bits(spans.again, last, always, w.index + count);
        if (count > chosen) score_keys(p, keys, query, w.index, chosen / 16 * 16, count, w.weights);
        const int64_t blocks = tail_blocks(p, allowed);
        score_sums(p, index, query, blocks, w.tail);
        tail_logits(p, allowed, count, blocks, w);
        attend_row(p, values, index.value_mean, rows[r], count, blocks, tile.batch, w, out);
    }
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
