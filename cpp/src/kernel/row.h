// One query row: what it may see and what it keeps anyway, and the scratch memory for its work.
#pragma once

namespace sparsek {
namespace SPARSEK_KERNEL {

inline constexpr uint16_t kMinusInfinity = 0xfc00;  // in half precision

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
          sums(arena.take<float>(blocks + 16)),
          kept(arena.take<int32_t>(blocks)),
          kept_sums(arena.take<float>(blocks)),
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
    int32_t* index;    // kept or candidate positions
    int32_t* order;    // their scores as integers of the same order
    float* weights;    // their scores, then their weights
    float* tail;       // logits of blocks
    float* sums;       // of the scores of their keys
    int32_t* kept;     // how many of their keys are listed
    float* kept_sums;  // and the sums of these keys' scores
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

inline MaskKind kind_of(uint16_t half) {
    const int magnitude = half & 0x7fff;
    if (half == kMinusInfinity || magnitude == 0) return MaskKind::forbids;
    return magnitude >= 0x7c00 ? MaskKind::bad : MaskKind::adds;
}

// See Kernel::pack_mask.
inline MaskKind pack_mask(const Problem& p, int64_t batch, int64_t head, int64_t query, uint64_t* bits) {
    const Mask& m = p.mask;
    const int64_t at = batch * m.batch_stride + head * m.head_stride + query * m.query_stride;
    MaskKind kind = MaskKind::forbids;
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
            if (whole) bits[b] = ~equal64(x, kMinusInfinity);
            for (int64_t j = 0; !whole && j < count; ++j)
                bits[b] |= static_cast<uint64_t>(x[j] != kMinusInfinity) << j;
            if (whole && equal64(x, 0) == bits[b]) continue;
            for (int64_t j = 0; j < count; ++j) {
                const MaskKind own = kind_of(x[j]);
                kind = own > kind ? own : kind;
            }
        }
    }
    return kind;
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

// Scores of a row with the keys of block b become final, in place: capped, and with the mask's numbers.
inline void add_bias(const Problem& p, int64_t batch, const Row& row, int64_t b, float* scores) {
    const Mask& m = p.bias;
    const auto* numbers = static_cast<const Half*>(m.data) + batch * m.batch_stride +
                          row.head * m.head_stride + row.query * m.query_stride;
    const F slope = set1(p.slopes != nullptr ? p.slopes[row.head] : 1.0f);
    for (int64_t j = 0; j < kBlock && b * kBlock + j < p.num_keys; j += 16) {
        const int64_t key = b * kBlock + j;
        const F x = load(scores + j);
        store(scores + j, fma(slope, load_n(numbers + key, minimum(16, p.num_keys - key)),
                              p.softcap > 0.0f ? capped(x, p.softcap) : x));
    }
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

inline void write_selection(const Problem& p, const Row& row, int64_t batch, int64_t count, int64_t first,
                            int64_t last, const SparseWork& w, const SelectionOut& out) {
    const int64_t at = (batch * p.heads + row.head) * out.num_queries + out.first_query + row.query;
    // The chosen keys join the always-kept ones as bits, which puts all in order.
    for (int64_t i = 0; i < count; ++i) w.always[w.index[i] / kBlock] |= 1ull << (w.index[i] % kBlock);
    const int64_t n = list_bits(first, last, [&](int64_t b) { return w.always[b]; }, w.index);
    out.counts[at] = static_cast<int32_t>(n);
    if (out.indices == nullptr) return;
    int32_t* indices = out.indices + at * out.width;
    std::memcpy(indices, w.index, static_cast<size_t>(n) * sizeof(int32_t));
    for (int64_t i = n; i < out.width; ++i) indices[i] = -1;
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

// What of the rule is the same for all rows.
inline void prepare_rule(const Problem& p, const SparseWork& w) {
    if (p.rule.stride > 0) {
        std::memset(w.strided, 0, static_cast<size_t>(w.blocks) * sizeof(uint64_t));
        for (int64_t j = 0; j < p.num_keys; j += p.rule.stride) w.strided[j / kBlock] |= 1ull << (j % kBlock);
    }
    if (p.rule.wants_means()) {
        w.logarithms[0] = -INFINITY;
        for (int n = 1; n <= kBlock; ++n) w.logarithms[n] = __builtin_logf(static_cast<float>(n));
    }
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
