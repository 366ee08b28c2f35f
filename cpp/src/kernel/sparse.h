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
          thresholds(arena.take<int16_t>(blocks)),
          index(arena.take<int32_t>(padded_keys + 16)),
          order(arena.take<int32_t>(padded_keys + 16)),
          weights(arena.take<float>(padded_keys + 16)),
          tail(arena.take<float>(blocks + 16)),
          tail_sums(arena.take<float>(blocks + 16)),
          queries(arena.take<float>(kTileRows * query_floats)),
          quantised(arena.take<int8_t>(kTileRows * query_bytes)),
          out(arena.take<float>(round_up(p.value_size, 16))) {}

    int64_t blocks, padded_keys, query_bytes, query_floats;
    int16_t* scores;       // [rows, padded_keys]
    uint64_t* allowed;     // [rows, blocks], bits
    uint64_t* always;      // of one row, as all below
    uint64_t* candidates;  // allowed and not always kept
    uint64_t* strided;     // multiples of the stride
    int16_t* maxima;
    int16_t* thresholds;
    int32_t* index;  // kept or candidate positions
    int32_t* order;  // their scores as integers of the same order
    float* weights;  // their scores, then their weights
    float* tail;
    float* tail_sums;
    float* queries;
    int8_t* quantised;
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

// Bits of the keys that a row may see.
inline void allowed_bits(const Problem& p, int64_t batch, const Row& row, int64_t blocks, uint64_t* bits) {
    const int64_t seen = p.is_causal ? minimum(p.num_keys, maximum(0, row.position + 1)) : p.num_keys;
    for (int64_t b = 0; b < blocks; ++b) bits[b] = first_bits(maximum(0, minimum(kBlock, seen - b * kBlock)));
    if (p.mask.data == nullptr) return;
    const Mask& m = p.mask;
    const uint8_t* bytes =
        m.data + batch * m.batch_stride + row.head * m.head_stride + row.query * m.query_stride;
    for (int64_t b = 0; b < blocks && b * kBlock < seen; ++b) {
        const int64_t count = minimum(kBlock, p.num_keys - b * kBlock);
        uint64_t word = 0;
        if (m.key_stride == 1 && count == kBlock) {
            word = nonzero64(bytes + b * kBlock);
        } else {
            for (int64_t j = 0; j < count; ++j) {
                word |= static_cast<uint64_t>(bytes[(b * kBlock + j) * m.key_stride] != 0) << j;
            }
        }
        bits[b] &= word;
    }
}

// Bits of the keys that are kept whatever their score.
inline void always_bits(const Problem& p, const Row& row, const uint64_t* allowed, const SparseWork& w) {
    std::memset(w.always, 0, static_cast<size_t>(w.blocks) * sizeof(uint64_t));
    const int64_t sink_blocks = minimum(w.blocks, blocks_of(minimum(p.rule.sinks, p.num_keys)));
    for (int64_t b = 0; b < sink_blocks; ++b)
        w.always[b] = allowed[b] & first_bits(p.rule.sinks - b * kBlock);
    int64_t room = p.rule.window;
    const int64_t last = minimum(row.position, p.num_keys - 1);
    for (int64_t b = last / kBlock; last >= 0 && b >= 0 && room > 0; --b) {
        uint64_t word = allowed[b] & first_bits(last - b * kBlock + 1);
        while (count_bits(word) > room) word &= word - 1;
        room -= count_bits(word);
        w.always[b] |= word;
    }
    if (p.rule.stride > 0) {
        for (int64_t b = 0; b < w.blocks; ++b) w.always[b] |= allowed[b] & w.strided[b];
    }
}

// The row's query in float, and, times the scale of the scores, in 8 bits.
template <typename T>
inline void quantise_query(const Problem& p, int64_t batch, const KeyIndex& index, float largest_norm,
                           Row* row, float* query, int8_t* quantised, int64_t bytes) {
    const T* q = head_of<T>(p.q, batch, row->head) + row->query * p.q.token_stride;
    float offset = 0.0f, widest = 0.0f;
    for (int64_t d = 0; d < p.head_size; ++d) {
        query[d] = to_float(q[d]);
        offset += query[d] * p.scale * index.center[d];
        const float x = __builtin_fabsf(query[d] * p.scale * index.scale[d]);
        widest = x <= widest ? widest : x;
    }
    const float step = widest > 0.0f ? widest / kQueryMax : 1.0f;
    float norm = 0.0f, error = 0.0f, kept = 0.0f;
    int32_t total = 0;
    for (int64_t d = 0; d < bytes; ++d) {
        const float x = d < p.head_size ? query[d] * p.scale * index.scale[d] / step : 0.0f;
        float r = __builtin_rintf(x);
        if (!(r >= -kQueryMax && r <= kQueryMax)) r = 0.0f;
        quantised[d] = static_cast<int8_t>(r);
        total += static_cast<int32_t>(r);
        norm += x * x;
        error += (x - r) * (x - r);
        kept += r * r;
    }
    const float largest = __builtin_sqrtf(kept) * largest_norm;
    row->shift = 0;
    while (row->shift < 16 && __builtin_ldexpf(largest, -row->shift) > kScoreRange) ++row->shift;
    row->start = -128 * total;
    row->unit = __builtin_ldexpf(step, row->shift);
    row->offset = offset;
    row->query_norm = __builtin_ldexpf(__builtin_sqrtf(norm), -row->shift);
    row->query_error = __builtin_ldexpf(__builtin_sqrtf(error), -row->shift);
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

// Positions of the set bits that `keep(block)` leaves, in rising order; returns their number.
template <typename Keep>
inline int64_t list_bits(int64_t first, int64_t last, Keep keep, int32_t* out) {
    int64_t n = 0;
    for (int64_t b = first; b < last; ++b) {
        for (uint64_t word = keep(b); word != 0; word &= word - 1) {
            out[n++] = static_cast<int32_t>(b * kBlock + lowest_bit(word));
        }
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

// Keeps the `k` best of `count` > k listed keys, ties to the lower position, in their order, and moves their
// scores along. Returns the k-th best score.
inline float keep_best(int64_t k, int64_t count, int32_t* index, float* scores, int32_t* order) {
    const int64_t padded = round_up(count, 16);
    int32_t highest_order = INT32_MIN, lowest_order = INT32_MAX;
    for (int64_t i = 0; i < count; ++i) {
        const float score = scores[i] + 0.0f;  // -0 becomes 0: they are equal
        const int32_t bits = load_int32(&score);
        order[i] = bits ^ static_cast<int32_t>(static_cast<uint32_t>(bits >> 31) >> 1);
        if (order[i] > highest_order) highest_order = order[i];
        if (order[i] < lowest_order) lowest_order = order[i];
    }
    for (int64_t i = count; i < padded; ++i) order[i] = INT32_MIN;
    int64_t low = lowest_order, high = highest_order;
    while (low < high) {
        const int64_t middle = (low + high + 1) >> 1;
        int64_t n = 0;
        for (int64_t i = 0; i < padded; i += 16)
            n += count_bits(at_least16(order + i, static_cast<int32_t>(middle)));
        if (n >= k) {
            low = middle;
            if (n == k) break;
        } else {
            high = middle - 1;
        }
    }
    int64_t above = 0;
    for (int64_t i = 0; i < count; ++i) above += order[i] > low;
    int64_t level = k - above, n = 0;
    float kth = INFINITY;
    for (int64_t i = 0; i < count; ++i) {
        const bool equal = order[i] == low && level > 0;
        if (order[i] <= low && !equal) continue;
        level -= equal;
        index[n] = index[i];
        scores[n] = scores[i];
        if (!(scores[n] > kth)) kth = scores[n];
        ++n;
    }
    return kth;
}

// The best `top_k` of the row's candidates: their positions and exact scores. Returns their number.
template <typename T>
inline int64_t select_row(const Problem& p, const KeyIndex& index, const T* keys, const Row& row,
                          const float* query, int16_t* scores, const SparseWork& w) {
    int64_t first = w.blocks, last = 0, total = 0;
    for (int64_t b = 0; b < w.blocks; ++b) {
        if (w.candidates[b] == 0) continue;
        total += count_bits(w.candidates[b]);
        if (first > b) first = b;
        last = b + 1;
    }
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
        std::memcpy(w.maxima + g * kBlock, scores + (first + g) * kBlock, kBlock * sizeof(int16_t));
        for (int64_t b = first + g + stride; b < last; b += stride) {
            max64(w.maxima + g * kBlock, w.maxima + g * kBlock, scores + b * kBlock);
        }
    }
    const float level = kth_largest(w.maxima, stride * kBlock, k);
    for (const float margin : kMargins) {
        float smallest_error = INFINITY;
        for (int64_t b = first; b < last; ++b) {
            // One unit more, for the bits that the shift cut off and the rounding of this sum.
            const float error = row.query_norm * index.residual[b] + row.query_error * index.norm[b] + 1.5f;
            const float threshold = level - margin * error;
            w.thresholds[b] = threshold > kLowest ? static_cast<int16_t>(threshold) : kLowest;
            smallest_error = error < smallest_error ? error : smallest_error;
        }
        const int64_t n = list_bits(
            first, last,
            [&](int64_t b) { return w.candidates[b] & at_least64(scores + b * kBlock, w.thresholds[b]); },
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

// What the kept keys leave out, as one logit per complete and wholly allowed block; returns the number of
// blocks.
template <typename T>
inline int64_t tail_logits(const Problem& p, const KeyIndex& index, const float* query,
                           const uint64_t* allowed, int64_t count, const SparseWork& w) {
    int64_t blocks = p.num_keys / kBlock;
    while (blocks > 0 && allowed[blocks - 1] != ~0ull) --blocks;
    if (blocks == 0) return 0;
    int32_t* kept = w.order;
    std::memset(kept, 0, static_cast<size_t>(blocks) * sizeof(int32_t));
    std::memset(w.tail_sums, 0, static_cast<size_t>(blocks) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t b = w.index[i] / kBlock;
        if (b >= blocks) continue;
        ++kept[b];
        w.tail_sums[b] += w.weights[i];
    }
    for (int64_t b = 0; b < blocks; b += 16) {
        const float* rows[16];
        for (int64_t j = 0; j < 16; ++j) rows[j] = index.key_mean + minimum(b + j, blocks - 1) * p.head_size;
        store(w.tail + b, dots(query, rows, p.head_size) * set1(p.scale));
    }
    for (int64_t b = 0; b < blocks; ++b) {
        const auto dropped = static_cast<float>(kBlock - kept[b]);
        const bool summarised = allowed[b] == ~0ull && kept[b] < kBlock;
        const float mean = (kBlock * w.tail[b] - w.tail_sums[b]) / dropped;
        w.tail[b] = summarised ? __builtin_logf(dropped) + capped(mean, p.softcap) : -INFINITY;
    }
    return blocks;
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

// Softmax over the `count` kept keys and the tail, into the row of the output.
template <typename T>
inline void attend_row(const Problem& p, const KeyIndex& index, const T* values, const Row& row,
                       int64_t count, int64_t blocks, int64_t batch, const SparseWork& w, T* out) {
    T* result = out + ((batch * p.heads + row.head) * p.num_queries + row.query) * p.value_size;
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
        w.tail, blocks, [&](int64_t b) { return index.value_mean + b * p.value_size; }, p.value_size, w.out);
    const float inverse = count + blocks == 0 ? 0.0f : 1.0f / total;
    for (int64_t d = 0; d < p.value_size; ++d) from_float(w.out[d] * inverse, result + d);
}

inline void write_selection(const Problem& p, const Row& row, int64_t batch, int64_t count,
                            const SparseWork& w, const SelectionOut& out) {
    const int64_t at = (batch * p.heads + row.head) * p.num_queries + row.query;
    int32_t* indices = out.indices + at * out.width;
    // The chosen keys join the always-kept ones as bits, which puts all in order.
    for (int64_t i = 0; i < count; ++i) w.always[w.index[i] / kBlock] |= 1ull << (w.index[i] % kBlock);
    const int64_t n = list_bits(0, w.blocks, [&](int64_t b) { return w.always[b]; }, indices);
    for (int64_t i = n; i < out.width; ++i) indices[i] = -1;
    out.counts[at] = static_cast<int32_t>(n);
}

template <typename T>
void sparse_tile(const Problem& p, const KeyIndex& index, const Tile& tile, std::byte* workspace, void* out,
                 const SelectionOut* selection) {
    Arena arena(workspace);
    const SparseWork w(p, arena);
    const int64_t group = p.heads / p.kv_heads;
    const T* keys = head_of<T>(p.k, tile.batch, tile.kv_head);
    const T* values = selection ? nullptr : head_of<T>(p.v, tile.batch, tile.kv_head);

    float largest_norm = 0.0f;
    for (int64_t b = 0; b < w.blocks; ++b)
        largest_norm = index.norm[b] > largest_norm ? index.norm[b] : largest_norm;
    if (p.rule.stride > 0) {
        std::memset(w.strided, 0, static_cast<size_t>(w.blocks) * sizeof(uint64_t));
        for (int64_t j = 0; j < p.num_keys; j += p.rule.stride) w.strided[j / kBlock] |= 1ull << (j % kBlock);
    }
    std::memset(w.queries, 0, static_cast<size_t>(kTileRows * w.query_floats) * sizeof(float));
    Row rows[kTileRows];
    int32_t start[kTileRows], shift[kTileRows];
    int64_t first = w.blocks, last = 0;
    for (int r = 0; r < kTileRows; ++r) {
        // Rows beyond the last repeat it: the scan always takes all.
        const int64_t number = tile.first_row + minimum(r, tile.num_rows - 1);
        Row& row = rows[r];
        row.query = number / group;
        row.head = tile.kv_head * group + number % group;
        row.position = p.first_position + row.query;
        quantise_query<T>(p, tile.batch, index, largest_norm, &row, w.queries + r * w.query_floats,
                          w.quantised + r * w.query_bytes, w.query_bytes);
        start[r] = row.start;
        shift[r] = row.shift;
        uint64_t* allowed = w.allowed + r * w.blocks;
        allowed_bits(p, tile.batch, row, w.blocks, allowed);
        for (int64_t b = 0; b < w.blocks; ++b) {
            if (allowed[b] == 0) continue;
            first = minimum(first, b);
            last = maximum(last, b + 1);
        }
    }
    if ((last - first) * kBlock > p.rule.top_k) {
        for (int64_t b = first; b < last; ++b) {
            for (int r = 0; r < kTileRows; r += kScanRows) {
                scan_block(index.packed + b * kBlock * w.query_bytes, w.quantised + r * w.query_bytes,
                           w.query_bytes, start + r, shift + r, w.query_bytes / 4,
                           w.scores + r * w.padded_keys + b * kBlock, w.padded_keys);
            }
        }
    }
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        const uint64_t* allowed = w.allowed + r * w.blocks;
        const float* query = w.queries + r * w.query_floats;
        always_bits(p, rows[r], allowed, w);
        for (int64_t b = 0; b < w.blocks; ++b) w.candidates[b] = allowed[b] & ~w.always[b];
        int64_t count = select_row(p, index, keys, rows[r], query, w.scores + r * w.padded_keys, w);
        if (selection != nullptr) {
            write_selection(p, rows[r], tile.batch, count, w, *selection);
            continue;
        }
        const int64_t chosen = count;
        count += list_bits(0, w.blocks, [&](int64_t b) { return w.always[b]; }, w.index + chosen);
        if (count > chosen) score_keys(p, keys, query, w.index, chosen / 16 * 16, count, w.weights);
        const int64_t blocks = p.rule.centroid_tail ? tail_logits<T>(p, index, query, allowed, count, w) : 0;
        attend_row(p, index, values, rows[r], count, blocks, tile.batch, w, static_cast<T*>(out));
    }
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
