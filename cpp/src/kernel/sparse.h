// One tile of query rows: the scan of all keys in 8 bits, and for each row what it keeps and its attention.
#pragma once

namespace sparsek {
namespace SPARSEK_KERNEL {

inline constexpr float kScoreRange = 32000.0f;

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
        if (p.rule.min_share > 0.0f || (last - first) * kBlock > p.rule.top_k)
            scan_rows(index, tile.num_rows, rows, first, last, w, scores);
    }
    for (int64_t r = 0; r < tile.num_rows; ++r) {
        const uint64_t* allowed = w.allowed + r * w.blocks;
        const float* query = w.queries + r * w.query_floats;
        const Spans spans = always_bits(p, rows[r], allowed, first, last, w);
        for (int64_t b = first; b < last; ++b) w.candidates[b] = allowed[b] & ~w.always[b];
        int16_t* scanned = scores + r * w.padded_keys;
        const int64_t whole = p.rule.wants_means() ? whole_blocks(p, allowed) : 0;
        if (whole > 0) score_sums(p, index, query, whole, w.sums);
        const auto list_always = [&](int64_t from) {
            const auto always = [&](int64_t b) { return w.always[b]; };
            int64_t to = from + list_bits(first, spans.end, always, w.index + from);
            to += list_bits(spans.again, last, always, w.index + to);
            if (to > from) score_keys(p, keys, query, w.index, from / 16 * 16, to, w.weights);
            return to;
        };
        int64_t count = 0;
        if (p.rule.min_share > 0.0f) {
            count = list_shares(p, allowed, whole, w, list_always, [&](float least, int64_t from) {
                const int64_t to = list_reaching(index, rows[r], scanned, least, first, last, from, w);
                if (to > from) score_keys(p, keys, query, w.index, from / 16 * 16, to, w.weights);
                return to;
            });
        } else {
            count = select_row(p, index, keys, rows[r], query, scanned, first, last, w);
            if (selection == nullptr) count = list_always(count);
        }
        if (selection != nullptr) {
            write_selection(p, rows[r], tile.batch, count, first, last, w, *selection);
            continue;
        }
        const int64_t blocks = p.rule.centroid_tail ? whole : 0;
        tail_logits(p, allowed, count, blocks, w);
        attend_row(p, values, index.value_mean, rows[r], count, blocks, tile.batch, w, out);
    }
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
