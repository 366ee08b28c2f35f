// Attention of one row over the keys that it keeps, and the tail: the means of what they leave out.
#pragma once

namespace sparsek {
namespace SPARSEK_KERNEL {

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
inline int64_t whole_blocks(const Problem& p, const uint64_t* allowed) {
    int64_t blocks = p.num_keys / kBlock;
    while (blocks > 0 && allowed[blocks - 1] != ~0ull) --blocks;
    return blocks;
}

// What the `count` listed keys leave out, as one logit per complete and wholly allowed block, from `w.sums`.
inline void tail_logits(const Problem& p, const uint64_t* allowed, int64_t count, int64_t blocks,
                        const SparseWork& w) {
    std::memset(w.kept, 0, static_cast<size_t>(blocks) * sizeof(int32_t));
    std::memset(w.kept_sums, 0, static_cast<size_t>(blocks) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t b = w.index[i] / kBlock;
        if (b >= blocks) continue;
        ++w.kept[b];
        w.kept_sums[b] += w.weights[i];
    }
    for (int64_t b = 0; b < blocks; ++b) {
        const auto dropped = static_cast<float>(kBlock - w.kept[b]);
        w.tail[b] = (w.sums[b] - w.kept_sums[b]) / (dropped > 0.0f ? dropped : 1.0f);
    }
    if (p.softcap > 0.0f) {
        for (int64_t b = 0; b < blocks; b += 16) store(w.tail + b, capped(load(w.tail + b), p.softcap));
    }
    for (int64_t b = 0; b < blocks; ++b) {
        w.tail[b] = allowed[b] == ~0ull ? w.tail[b] + w.logarithms[kBlock - w.kept[b]] : -INFINITY;
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

// exp of the head's attention sink less `peak`, which is infinity where the sink outweighs all else.
inline float sink_weight(const Problem& p, const Row& row, float peak) {
    return p.sink_logits == nullptr ? 0.0f : __builtin_expf(p.sink_logits[row.head] - peak);
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
    const float total =
        exponentials(w.weights, count, peak) + exponentials(w.tail, blocks, peak) + sink_weight(p, row, peak);
    for (int64_t d = 0; d < round_up(p.value_size, 16); ++d) w.out[d] = 0.0f;
    add_weighted<T>(
        w.weights, count, [&](int64_t i) { return values + w.index[i] * p.v.token_stride; }, p.value_size,
        w.out);
    add_weighted<float>(
        w.tail, blocks, [&](int64_t b) { return means + b * p.value_size; }, p.value_size, w.out);
    const float inverse = count + blocks == 0 ? 0.0f : 1.0f / total;
    store_row(p, batch, row, w.out, inverse, out);
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
