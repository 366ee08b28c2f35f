// Attention over the whole problem: builds the index of each head, then gives tiles of rows to threads.

#include "sparsek/attention.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "kernel/kernel.h"
#include "memory.h"
#include "parallel.h"
#include "sparsek/key_index.h"
#include "sparsek/packed_mask.h"
#include "sparsek/value_means.h"

namespace sparsek {
namespace {

// Scratch memory: a workspace for every thread, and some bytes for all.
class Workspaces {
   public:
    Workspaces(const Kernel& kernel, const Problem& p, int num_threads, int64_t shared_bytes = 0)
        : threads_(num_threads),
          bytes_((static_cast<int64_t>(kernel.workspace_size(p)) + 63) / 64 * 64),
          scratch_(num_threads * bytes_ + shared_bytes) {}
    std::byte* of(int thread) const { return scratch_.data() + thread * bytes_; }
    std::byte* shared() const { return of(threads_); }

   private:
    int threads_;
    int64_t bytes_;
    Scratch scratch_;
};

// The rows of every KV head, some at a time.
class Tiles {
   public:
    Tiles(const Problem& p, int64_t rows_per_tile)
        : kv_heads_(p.kv_heads),
          heads_(p.batch * p.kv_heads),
          rows_(p.heads / p.kv_heads * p.num_queries),
          height_(rows_per_tile),
          per_head_((rows_ + height_ - 1) / height_) {}

    int64_t count() const { return heads_ * per_head_; }
    // Head after head: the keys and values of one fit into a cache, those of all may not. The last rows
    // first: under the causal rule they take longest.
    Tile operator[](int64_t i) const {
        const int64_t head = i / per_head_, first = (per_head_ - 1 - i % per_head_) * height_;
        const int64_t rows = rows_ - first < height_ ? rows_ - first : height_;
        return {head / kv_heads_, head % kv_heads_, first, rows};
    }

   private:
    int64_t kv_heads_, heads_, rows_, height_, per_head_;
};

// Multiplications of all queries with all keys.
double products(const Problem& p) {
    return static_cast<double>(p.batch * p.heads * p.num_queries * p.num_keys) *
           static_cast<double>(p.head_size);
}

bool dense(const Problem& p, const Options& options, const Output& out) {
    const Kernel& kernel = kernel_for(options.isa);
    const Tiles tiles(p, kDenseTileRows);
    const Options limited = for_work(options, products(p));
    const Workspaces workspaces(kernel, p, limited.num_threads);
    return run(limited, tiles.count(),
               [&](int thread, int64_t i) { kernel.dense_tile(p, tiles[i], workspaces.of(thread), out); });
}

// Few tiles, as in generation: the scan is shared by pieces of the keys, what follows by rows.
bool sparse_in_pieces(const Problem& p, const Options& options, const KeyIndex& index, const Tiles& tiles,
                      const Output& out, const SelectionOut* selection) {
    constexpr int64_t kBlocksPerPiece = 64;
    const Kernel& kernel = kernel_for(index.isa());
    const int64_t blocks = blocks_of(p.num_keys), row_scores = blocks * kBlock;
    const int64_t pieces = (blocks + kBlocksPerPiece - 1) / kBlocksPerPiece;
    const Workspaces workspaces(kernel, p, options.num_threads, tiles.count() * kTileRows * row_scores * 2);
    auto* scores = reinterpret_cast<int16_t*>(workspaces.shared());
    const bool scanned = run(options, tiles.count() * pieces, [&](int thread, int64_t task) {
        const Tile tile = tiles[task / pieces];
        const int64_t first = task % pieces * kBlocksPerPiece;
        const int64_t last = first + kBlocksPerPiece < blocks ? first + kBlocksPerPiece : blocks;
        kernel.scan_tile(p, index.head(tile.batch, tile.kv_head), tile, first, last, workspaces.of(thread),
                         scores + task / pieces * kTileRows * row_scores);
    });
    return scanned && run(options, tiles.count() * kTileRows, [&](int thread, int64_t task) {
               Tile tile = tiles[task / kTileRows];
               const int64_t row = task % kTileRows;
               if (row >= tile.num_rows) return;
               tile.first_row += row;
               tile.num_rows = 1;
               kernel.sparse_tile(p, index.head(tile.batch, tile.kv_head), tile, workspaces.of(thread),
                                  scores + task * row_scores, out, selection);
           });
}

bool sparse(const Problem& p, const Options& options, KeyIndex* given, const Output& out,
            const SelectionOut* selection) {
    std::optional<KeyIndex> own;
    if (given == nullptr) own.emplace(p, p.rule.wants_means(), options.isa);
    KeyIndex& index = given ? *given : *own;
    if (!index.extend(p, options)) return false;

    const Kernel& kernel = kernel_for(index.isa());
    const Tiles tiles(p, kTileRows);
    const Options limited = for_work(options, products(p));
    if (limited.num_threads > 1 && tiles.count() < 4 * limited.num_threads)
        return sparse_in_pieces(p, limited, index, tiles, out, selection);
    const Workspaces workspaces(kernel, p, limited.num_threads);
    return run(limited, tiles.count(), [&](int thread, int64_t i) {
        const Tile tile = tiles[i];
        kernel.sparse_tile(p, index.head(tile.batch, tile.kv_head), tile, workspaces.of(thread), nullptr, out,
                           selection);
    });
}

// All keys are scored first, in pieces; then every row chooses and attends. This is dense attention too.
bool few_rows(const Problem& p, const Options& options, ValueMeans* given, const Output& out,
              const SelectionOut* selection) {
    constexpr int64_t kBlocksPerPiece = 8;
    const Kernel& kernel = kernel_for(options.isa);
    const int64_t blocks = blocks_of(p.num_keys), pieces = (blocks + kBlocksPerPiece - 1) / kBlocksPerPiece;
    const int64_t heads = p.batch * p.kv_heads, rows = p.heads / p.kv_heads * p.num_queries;
    const bool tail = p.rule.centroid_tail && !p.rule.keeps_all(p.num_keys) && selection == nullptr;
    Problem scored_problem = p;
    if (p.bias.data != nullptr) scored_problem.softcap = 0.0f;  // the scores are final
    ValueMeans own;
    ValueMeans& kept = given ? *given : own;
    if (tail) kept.prepare(p);

    const Options limited = for_work(options, products(p));
    const Workspaces workspaces(kernel, p, limited.num_threads,
                                heads * rows * blocks * (kBlock + 1) * static_cast<int64_t>(sizeof(float)));
    auto* all_scores = reinterpret_cast<float*>(workspaces.shared());
    float* all_sums = all_scores + heads * rows * blocks * kBlock;
    std::vector<HeadMeans> means(static_cast<size_t>(heads));
    std::vector<Scores> scores(static_cast<size_t>(heads));
    for (int64_t h = 0; h < heads; ++h) {
        const auto at = static_cast<size_t>(h);
        if (tail) means[at] = kept.head(h / p.kv_heads, h % p.kv_heads);
        scores[at] = {all_scores + h * rows * blocks * kBlock, all_sums + h * rows * blocks};
    }
    const bool scored = run(limited, p.batch * pieces, [&](int thread, int64_t task) {
        const int64_t batch = task / pieces, first = task % pieces * kBlocksPerPiece;
        const int64_t last = first + kBlocksPerPiece < blocks ? first + kBlocksPerPiece : blocks;
        kernel.score_rows(p, means.data() + batch * p.kv_heads, batch, first, last, workspaces.of(thread),
                          scores.data() + batch * p.kv_heads);
    });
    return scored && run(limited, heads * rows, [&](int thread, int64_t task) {
               const int64_t h = task / rows, row = task % rows;
               const Scores& of_head = scores[static_cast<size_t>(h)];
               const Scores of_row = {of_head.scores + row * blocks * kBlock, of_head.sums + row * blocks};
               kernel.attend_scored(scored_problem, means[static_cast<size_t>(h)].means,
                                    {h / p.kv_heads, h % p.kv_heads, row, 1}, workspaces.of(thread), of_row,
                                    out, selection);
           });
}

template <typename Element>
const void* moved(const void* data, int64_t elements) {
    return data == nullptr ? nullptr : static_cast<const Element*>(data) + elements;
}

// Where a tensor's token lies.
const void* token(const void* data, int64_t elements, DType dtype) {
    return dtype == DType::f32 ? moved<float>(data, elements) : moved<uint16_t>(data, elements);
}

// The problem of some of the queries, its mask in bits.
Problem queries_of(const Problem& whole, int64_t first, int64_t count) {
    Problem p = whole;
    p.num_queries = count;
    p.first_position += first;
    p.q.data = token(p.q.data, first * p.q.token_stride, p.query_dtype);
    p.mask.data = moved<uint64_t>(p.mask.data, first * p.mask.query_stride);
    p.bias.data = moved<uint16_t>(p.bias.data, first * p.bias.query_stride);
    return p;
}

// A row's scores may be far from those of the keys where a mask adds numbers, and the index would bound
// nothing: few rows at a time are scored in full.
bool in_few_rows(const Problem& p, const Options& options, ValueMeans* given, const Output& out,
                 const SelectionOut* selection) {
    ValueMeans own;
    const int64_t step = std::max<int64_t>(1, kFewRows / (p.heads / p.kv_heads));
    for (int64_t first = 0; first < p.num_queries; first += step) {
        const int64_t count = std::min(step, p.num_queries - first);
        Output to = out;
        to.data = const_cast<void*>(token(out.data, first * out.token_stride, p.query_dtype));
        SelectionOut chosen{};
        if (selection != nullptr) {
            chosen = *selection;
            chosen.first_query += first;
        }
        if (!few_rows(queries_of(p, first, count), options, given ? given : &own, to,
                      selection ? &chosen : nullptr))
            return false;
    }
    return true;
}

// A softcap and then numbers: what they do to a mean of keys cannot be told from the mean.
bool can_add(const Problem& p, bool all) { return all || p.softcap <= 0.0f || !p.rule.wants_means(); }

Status solve(const Problem& given, const Options& options, const Output& out, KeyIndex* index,
             ValueMeans* means, const SelectionOut* selection) {
    if (given.batch == 0 || given.heads == 0 || given.num_queries == 0) return Status::done;
    Problem p = given;
    PackedMask packed;
    if (given.mask.data != nullptr && given.mask.form != Mask::Form::bits) {
        const Status status = packed.pack(given, options);
        if (status != Status::done) return status;
        packed.put_into(&p);
    }
    const bool all = p.rule.keeps_all(p.num_keys) && selection == nullptr, adds = p.bias.data != nullptr;
    if (adds && !can_add(p, all)) return Status::bad_mask;
    const int64_t queries = std::max(p.num_queries, p.whole_queries);
    const bool few = (index == nullptr || adds) && p.heads / p.kv_heads * queries <= kFewRows;
    const bool done = few    ? few_rows(p, options, means, out, selection)
                      : all  ? dense(p, options, out)
                      : adds ? in_few_rows(p, options, means, out, selection)
                             : sparse(p, options, index, out, selection);
    return done ? Status::done : Status::interrupted;
}

}  // namespace

Status attention(const Problem& p, const Options& options, const Output& out, KeyIndex* index,
                 ValueMeans* means) {
    return solve(p, options, out, index, means, nullptr);
}

Status select(const Problem& p, const Options& options, int64_t width, int32_t* indices, int32_t* counts) {
    const SelectionOut selection = {width, indices, counts, p.num_queries, 0};
    Problem without_values = p;
    without_values.rule.centroid_tail = false;
    without_values.value_size = 0;
    return solve(without_values, options, {}, nullptr, nullptr, &selection);
}

}  // namespace sparsek
