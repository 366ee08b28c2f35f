// Few query rows, as in generation: quantising the keys would not pay, so every key is scored in full, once
// for all rows of its head. What is left to do for a row is to choose and to attend.
#pragma once

namespace sparsek {
namespace SPARSEK_KERNEL {

// scores[16] of 16 keys with each of kRows queries. kSize: the head size where it is a common one, else 0.
template <typename T, int kRows, int kSize>
inline void score16(const T* const* keys, const float* queries, int64_t query_stride, int64_t head_size,
                    float scale, float* scores, int64_t stride) {
    const int64_t size = kSize > 0 ? kSize : head_size;
    F products[kRows][16];
    for (int i = 0; i < 16; ++i) {
        F acc[kRows];
        for (int r = 0; r < kRows; ++r) acc[r] = set1(0.0f);
        const auto add = [&](F key, int64_t c) {
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) acc[r] = fma(load(queries + r * query_stride + c), key, acc[r]);
        };
        int64_t c = 0;
#pragma GCC unroll 8
        for (; c + 16 <= size; c += 16) add(load(keys[i] + c), c);
        if (c < size) add(load_n(keys[i] + c, size - c), c);
        for (int r = 0; r < kRows; ++r) products[r][i] = acc[r];
    }
    // Scaled last: equal products stay equal, and ties go to the lower position.
    for (int r = 0; r < kRows; ++r) store(scores + r * stride, sums(products[r]) * set1(scale));
}

// The same for any number of rows.
template <typename T, int kSize>
inline void score_all(const T* const* keys, const float* queries, int64_t query_stride, int64_t rows,
                      int64_t size, float scale, float* scores, int64_t stride) {
    const auto step = [&](auto number, int64_t r) {
        score16<T, number.value, kSize>(keys, queries + r * query_stride, query_stride, size, scale,
                                        scores + r * stride, stride);
    };
    int64_t r = 0;
    for (; r + 3 <= rows; r += 3) step(std::integral_constant<int, 3>{}, r);
    if (rows - r == 2) step(std::integral_constant<int, 2>{}, r);
    if (rows - r == 1) step(std::integral_constant<int, 1>{}, r);
}

// Changes whenever the block's keys change, but for an accident: a hash of the first 64 bytes of every key,
// where a rotation by position shows as well as another token does, and of some of its values.
template <typename T>
inline void fingerprint(const Problem& p, const T* keys, const T* values, int64_t b, uint64_t* lanes) {
    std::memset(lanes, 0, kFingerprint * sizeof(uint64_t));
    const auto mix = [&](const T* row, int64_t size) {
        const auto bytes = static_cast<size_t>(size) * sizeof(T);
        uint64_t words[kFingerprint] = {};
        if (bytes >= sizeof words) {
            std::memcpy(words, row, sizeof words);
        } else {
            std::memcpy(words, row, bytes);
        }
        for (int i = 0; i < kFingerprint; ++i) lanes[i] = (lanes[i] << 5 | lanes[i] >> 59) + words[i];
    };
    const int64_t first = b * kBlock;
    for (int64_t j = first; j < first + kBlock; ++j) mix(keys + j * p.k.token_stride, p.head_size);
    for (int64_t j = first; j < first + kBlock; j += 21) mix(values + j * p.v.token_stride, p.value_size);
}

// Brings the mean of a block's values up to date.
template <typename T>
inline void update_mean(const Problem& p, const T* keys, const T* values, int64_t b, const HeadMeans& means) {
    uint64_t now[kFingerprint], *known = means.fingerprints + b * kFingerprint;
    fingerprint(p, keys, values, b, now);
    if (means.known[b] && std::memcmp(now, known, sizeof now) == 0) return;
    block_mean(values, p.v.token_stride, b, p.value_size, means.means);
    std::memcpy(known, now, sizeof now);
    means.known[b] = 1;
}

template <typename T>
inline void prefetch(const T* row, int64_t size) {
    const auto* bytes = reinterpret_cast<const std::byte*>(row);
    for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += 64)
        __builtin_prefetch(bytes + i, 0, 2);
}

struct FewWork {
    FewWork(const Problem& p, Arena& arena)
        : blocks(blocks_of(p.num_keys)),
          query_floats(round_up(p.head_size, 16)),
          queries(arena.take<float>(p.heads * p.num_queries * query_floats)) {}

    int64_t blocks, query_floats;
    float* queries;  // [kv_heads, rows of each, query_floats]
};

// One block of one KV head with the head's rows.
template <typename T>
inline void score_block(const Problem& p, const HeadMeans& means, const Tile& tile, int64_t b,
                        bool look_ahead, const FewWork& w, const float* queries, const Scores& out) {
    const int64_t count = minimum(kBlock, p.num_keys - b * kBlock), stride = w.blocks * kBlock;
    uint64_t any = 0;
    bool whole = false;
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        uint64_t allowed;
        allowed_bits(p, tile.batch, row_of(p, tile, r), b, b + 1, &allowed);
        any |= allowed;
        whole |= allowed == ~0ull;
    }
    if (any == 0) return;
    const T* keys = head_of<T>(p.k, tile.batch, tile.kv_head);
    for (int64_t j = 0; j < count; j += 16) {
        const T* key[16];
        for (int64_t i = 0; i < 16; ++i) {
            key[i] = keys + (b * kBlock + minimum(j + i, count - 1)) * p.k.token_stride;
            if (look_ahead) prefetch(key[i] + kBlock * p.k.token_stride, p.head_size);
        }
        float* scores = out.scores + b * kBlock + j;
        const auto score = [&](auto size) {
            score_all<T, size.value>(key, queries, w.query_floats, tile.num_rows, p.head_size, p.scale,
                                     scores, stride);
        };
        if (p.head_size == 64) {
            score(std::integral_constant<int, 64>{});
        } else if (p.head_size == 128) {
            score(std::integral_constant<int, 128>{});
        } else {
            score(std::integral_constant<int, 0>{});
        }
    }
    for (int64_t r = 0; r < tile.num_rows && p.bias.data != nullptr; ++r)
        add_bias(p, tile.batch, row_of(p, tile, r), b, out.scores + r * stride + b * kBlock);
    if (!whole || !p.rule.wants_means()) return;
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        const float* x = out.scores + r * stride + b * kBlock;
        out.sums[r * w.blocks + b] = sum((load(x) + load(x + 16)) + (load(x + 32) + load(x + 48)));
    }
    if (means.means != nullptr) update_mean(p, keys, head_of<T>(p.v, tile.batch, tile.kv_head), b, means);
}

// See Kernel::score_rows. Block by block, all heads of each: in a cache they lie side by side, and pages and
// lines of memory are fetched once.
template <typename T>
void score_rows(const Problem& p, const HeadMeans* means, int64_t batch, int64_t first, int64_t last,
                std::byte* workspace, const Scores* out) {
    Arena arena(workspace);
    const FewWork w(p, arena);
    const int64_t rows = p.heads / p.kv_heads * p.num_queries, head_floats = rows * w.query_floats;
    for (int64_t h = 0; h < p.kv_heads; ++h)
        load_rows(p, {batch, h, 0, rows}, w.query_floats, w.queries + h * head_floats);
    for (int64_t b = first; b < last; ++b) {
        for (int64_t h = 0; h < p.kv_heads; ++h) {
            score_block<T>(p, means[h], {batch, h, 0, rows}, b, b + 1 < last, w, w.queries + h * head_floats,
                           out[h]);
        }
    }
}

// The candidates whose scores reach the threshold; returns their number.
inline int64_t list_scored(const float* scores, float threshold, int64_t first, int64_t last, int32_t* index,
                           const SparseWork& w) {
    const auto reaching = [&](int64_t b) {
        uint64_t bits = 0;
        for (int j = 0; j < kBlock; j += 16)
            bits |= static_cast<uint64_t>(at_least16(scores + b * kBlock + j, threshold)) << j;
        return bits & w.candidates[b];
    };
    return list_bits(first, last, reaching, index);
}

// The best `top_k` of the row's candidates by the scores given; returns their number.
inline int64_t select_scored(const Problem& p, const float* scores, int64_t first, int64_t last,
                             const SparseWork& w) {
    const int64_t k = p.rule.top_k;
    int64_t total = 0;
    for (int64_t b = first; b < last; ++b) total += count_bits(w.candidates[b]);
    if (k == 0 || total == 0) return 0;
    const auto candidates = [&](int64_t b) { return w.candidates[b]; };
    int64_t n = 0;
    if (total > k) {
        // As in select_row: maxima over about 5 k groups; as many candidates as are wanted reach their k-th.
        const int64_t stride = minimum(last - first, (5 * k + kBlock - 1) / kBlock);
        int32_t lowest = INT32_MAX, highest = INT32_MIN;
        for (int64_t g = 0; g < stride; ++g) {
            for (int64_t j = 0; j < kBlock; j += 16) {
                F most = set1(-INFINITY);
                for (int64_t b = first + g; b < last; b += stride) {
                    const auto lanes = static_cast<uint32_t>(w.candidates[b] >> j) & 0xffff;
                    most = max(keep_lanes(load(scores + b * kBlock + j), lanes, -INFINITY), most);
                }
                store(w.weights + g * kBlock + j, most);
            }
        }
        for (int64_t i = 0; i < stride * kBlock; ++i) {
            w.order[i] = order_of(w.weights[i]);
            lowest = w.order[i] < lowest ? w.order[i] : lowest;
            highest = w.order[i] > highest ? w.order[i] : highest;
        }
        const auto level = static_cast<int32_t>(
            kth_largest_order(w.order, stride * kBlock, stride * kBlock, k, lowest, highest));
        const float threshold = score_of(level);
        n = list_scored(scores, threshold, first, last, w.index, w);
    }
    if (n < k) n = list_bits(first, last, candidates, w.index);  // few, or NaN among them
    for (int64_t i = 0; i < n; ++i) w.weights[i] = scores[w.index[i]];
    if (n > k) keep_best(k, n, w.index, w.weights, w.order);
    return minimum(n, k);
}

// See Kernel::attend_scored.
template <typename T>
void attend_scored(const Problem& p, const float* means, const Tile& tile, std::byte* workspace,
                   const Scores& scored, const Output& out, const SelectionOut* selection) {
    Arena arena(workspace);
    const SparseWork w(p, arena);
    const Row row = row_of(p, tile, 0);
    prepare_rule(p, w);
    allowed_bits(p, tile.batch, row, 0, w.blocks, w.allowed);
    int64_t first = 0, last = w.blocks;
    while (first < last && w.allowed[first] == 0) ++first;
    while (first < last && w.allowed[last - 1] == 0) --last;
    always_bits(p, row, w.allowed, first, last, w);
    for (int64_t b = first; b < last; ++b) w.candidates[b] = w.allowed[b] & ~w.always[b];
    const int64_t whole = p.rule.wants_means() ? whole_blocks(p, w.allowed) : 0;
    for (int64_t b = 0; b < whole; ++b) w.sums[b] = w.allowed[b] == ~0ull ? scored.sums[b] : 0.0f;
    const auto look_up = [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) w.weights[i] = scored.scores[w.index[i]];
        return to;
    };
    const auto list_always = [&](int64_t from) {
        const auto always = [&](int64_t b) { return w.always[b]; };
        return look_up(from, from + list_bits(first, last, always, w.index + from));
    };
    int64_t count = 0;
    if (p.rule.min_share > 0.0f) {
        count = list_shares(p, w.allowed, whole, w, list_always, [&](float least, int64_t from) {
            return look_up(from, from + list_scored(scored.scores, least, first, last, w.index + from, w));
        });
    } else {
        count = select_scored(p, scored.scores, first, last, w);
        if (selection == nullptr) count = list_always(count);
    }
    if (selection != nullptr) {
        write_selection(p, row, tile.batch, count, first, last, w, *selection);
        return;
    }
    const int64_t blocks = means == nullptr ? 0 : whole;
    tail_logits(p, w.allowed, count, blocks, w);
    attend_row(p, head_of<T>(p.v, tile.batch, tile.kv_head), means, row, count, blocks, tile.batch, w, out);
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
