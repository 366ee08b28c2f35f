// Dense attention for one tile of query rows, block by block with a running softmax, as FlashAttention does.
#pragma once

namespace sparsek {
namespace SPARSEK_KERNEL {

struct DenseWork {
    DenseWork(const Problem& p, Arena& arena)
        : blocks(blocks_of(p.num_keys)),
          values(round_up(p.value_size, 16)),
          queries(arena.take<float>(kDenseTileRows * p.head_size)),
          keys(arena.take<float>(kBlock * p.head_size)),
          block_values(arena.take<float>(kBlock * values)),
          scores(arena.take<float>(kDenseTileRows * kBlock)),
          out(arena.take<float>(kDenseTileRows * values)),
          peak(arena.take<float>(kDenseTileRows)),
          total(arena.take<float>(kDenseTileRows)),
          allowed(arena.take<uint64_t>(kDenseTileRows * blocks)) {}

    int64_t blocks, values;
    float* queries;       // [rows, head_size], scaled
    float* keys;          // [head_size, 64]: one block, transposed
    float* block_values;  // [64, values]
    float* scores;        // [rows, 64]
    float* out;           // [rows, values]
    float* peak;          // [rows]
    float* total;         // [rows]
    uint64_t* allowed;    // [rows, blocks], bits
};

// c[kRows, 16 kVectors] (+)= a[kRows, depth] b[depth, ...]; strides in floats.
template <int kRows, int kVectors, bool kAdd>
inline void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                     float* c, int64_t c_stride) {
    F acc[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) acc[r][v] = kAdd ? load(c + r * c_stride + 16 * v) : set1(0.0f);
    }
    for (int64_t d = 0; d < depth; ++d, b += b_stride) {
        F x[kVectors];
        for (int v = 0; v < kVectors; ++v) x[v] = load(b + 16 * v);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const F y = set1(a[r * a_stride + d]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x[v], y, acc[r][v]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + 16 * v, acc[r][v]);
    }
}

// The same for any number of columns that is a multiple of 16.
template <bool kAdd>
inline void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                          float* c, int64_t c_stride, int64_t columns) {
    int64_t j = 0;
    for (; j + 16 * kDenseVectors <= columns; j += 16 * kDenseVectors) {
        multiply<kDenseRows, kDenseVectors, kAdd>(a, a_stride, b + j, b_stride, depth, c + j, c_stride);
    }
    for (; j < columns; j += 16)
        multiply<kDenseRows, 1, kAdd>(a, a_stride, b + j, b_stride, depth, c + j, c_stride);
}

// A block of keys, transposed, and of values, both in float and padded with zeros. Returns whether all values
// are finite.
template <typename T>
inline bool pack_block(const Problem& p, const T* keys, const T* values, int64_t block, int64_t count,
                       const DenseWork& w) {
    const auto row = [&](const T* rows, int64_t stride, int64_t j) {
        return rows + (block * kBlock + j) * stride;
    };
    for (int64_t c = 0; c < p.head_size; c += 16) {
        const int64_t n = minimum(16, p.head_size - c);
        for (int64_t j = 0; j < kBlock; j += 16) {
            F x[16];
            for (int64_t i = 0; i < 16; ++i) {
                x[i] = j + i < count ? load_n(row(keys, p.k.token_stride, j + i) + c, n) : set1(0.0f);
            }
            transpose(x);
            for (int64_t i = 0; i < n; ++i) store(w.keys + (c + i) * kBlock + j, x[i]);
        }
    }
    F zeros = set1(0.0f);
    for (int64_t j = 0; j < kBlock; ++j) {
        for (int64_t c = 0; c < w.values; c += 16) {
            const int64_t n = minimum(16, p.value_size - c);
            const F x = j < count ? load_n(row(values, p.v.token_stride, j) + c, n) : set1(0.0f);
            store(w.block_values + j * w.values + c, x);
            zeros = fma(x, set1(0.0f), zeros);  // NaN from NaN and infinity
        }
    }
    return sum(zeros) == 0.0f;
}

// out += the values of the allowed keys by their weights. A forbidden one has no part in it: in a product it
// would have the weight zero, and zero times infinity is NaN.
inline void add_allowed(const float* weights, uint64_t allowed, const DenseWork& w, float* out) {
    for (; allowed != 0; allowed &= allowed - 1) {
        const int64_t j = __builtin_ctzll(allowed);
        for (int64_t d = 0; d < w.values; d += 16) {
            store(out + d, fma(load(w.block_values + j * w.values + d), set1(weights[j]), load(out + d)));
        }
    }
}

// One row of scores becomes weights, its sums are brought up to date; returns the factor for what is there.
inline float soften(float* scores, uint64_t allowed, float softcap, float* peak, float* total) {
    F block_peak = set1(-INFINITY);
    for (int j = 0; j < kBlock; j += 16) {
        F x = load(scores + j);
        if (softcap > 0.0f) x = capped(x, softcap);
        if (allowed != ~0ull) x = keep_lanes(x, static_cast<uint32_t>(allowed >> j) & 0xffff, -INFINITY);
        store(scores + j, x);
        block_peak = max(block_peak, x);
    }
    const float block_highest = highest(block_peak);
    const float before = *peak;
    const float now = block_highest > before ? block_highest : before;
    const float shift = now == -INFINITY ? 0.0f : now;
    F block_total = set1(0.0f);
    for (int j = 0; j < kBlock; j += 16) {
        const F e = exp(load(scores + j) - set1(shift));
        store(scores + j, e);
        block_total = block_total + e;
    }
    const float factor = before == now ? 1.0f : __builtin_expf(before - shift);
    *peak = now;
    *total = *total * factor + sum(block_total);
    return factor;
}

template <typename T>
void dense_tile(const Problem& p, const Tile& tile, std::byte* workspace, const Output& out) {
    Arena arena(workspace);
    const DenseWork w(p, arena);
    const T* keys = head_of<T>(p.k, tile.batch, tile.kv_head);
    const T* values = head_of<T>(p.v, tile.batch, tile.kv_head);

    const float softcap = p.bias.data != nullptr ? 0.0f : p.softcap;  // a bias comes after it
    const int64_t padded_rows = round_up(tile.num_rows, kDenseRows);
    Row rows[kDenseTileRows];
    std::memset(w.out, 0, static_cast<size_t>(padded_rows * w.values) * sizeof(float));
    int64_t first = w.blocks, last = 0;
    for (int64_t r = 0; r < padded_rows; ++r) {
        const Row& row = rows[r] = row_of(p, tile, minimum(r, tile.num_rows - 1));
        float* query = w.queries + r * p.head_size;
        load_query(p, tile.batch, row, query);
        for (int64_t d = 0; d < p.head_size; ++d) query[d] *= p.scale;
        w.peak[r] = -INFINITY;
        w.total[r] = 0.0f;
        uint64_t* allowed = w.allowed + r * w.blocks;
        allowed_bits(p, tile.batch, row, 0, w.blocks, allowed);
        for (int64_t b = 0; b < w.blocks; ++b) {
            if (allowed[b] == 0) continue;
            first = minimum(first, b);
            last = maximum(last, b + 1);
        }
    }
    for (int64_t b = first; b < last; ++b) {
        const int64_t count = minimum(kBlock, p.num_keys - b * kBlock);
        const bool finite = pack_block(p, keys, values, b, count, w);
        for (int64_t r = 0; r < padded_rows; r += kDenseRows) {
            uint64_t any = 0;
            for (int64_t i = r; i < r + kDenseRows; ++i) any |= w.allowed[i * w.blocks + b];
            if (any == 0) continue;
            float* scores = w.scores + r * kBlock;
            multiply_rows<false>(w.queries + r * p.head_size, p.head_size, w.keys, kBlock, p.head_size,
                                 scores, kBlock, kBlock);
            for (int64_t i = 0; i < kDenseRows; ++i) {
                if (p.bias.data != nullptr) add_bias(p, tile.batch, rows[r + i], b, scores + i * kBlock);
                const float factor = soften(scores + i * kBlock, w.allowed[(r + i) * w.blocks + b], softcap,
                                            w.peak + r + i, w.total + r + i);
                if (factor == 1.0f) continue;
                float* o = w.out + (r + i) * w.values;
                for (int64_t d = 0; d < w.values; d += 16) store(o + d, load(o + d) * set1(factor));
            }
            if (finite) {
                multiply_rows<true>(scores, kBlock, w.block_values, w.values, kBlock, w.out + r * w.values,
                                    w.values, w.values);
                continue;
            }
            for (int64_t i = r; i < r + kDenseRows; ++i) {
                add_allowed(w.scores + i * kBlock, w.allowed[i * w.blocks + b], w, w.out + i * w.values);
            }
        }
    }
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        const float sum = w.total[r] + sink_weight(p, rows[r], w.peak[r]);
        const float inverse = w.total[r] == 0.0f ? 0.0f : 1.0f / sum;
        store_row(p, tile.batch, rows[r], w.out + r * w.values, inverse, out);
    }
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
