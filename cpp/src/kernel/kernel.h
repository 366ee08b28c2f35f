// What a kernel offers, one table per instruction set, and what it works on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparsek/attention.h"

namespace sparsek {

inline constexpr int64_t kBlock = 64;      // keys that share a centroid, an error bound and a word of bits
inline constexpr int kTileRows = 12;       // query rows that are scanned together
inline constexpr int kDenseTileRows = 96;  // and those of dense attention

inline constexpr int kFewRows = 32;     // of a KV head: so few are scored in full
inline constexpr int kFingerprint = 8;  // words that tell whether a block has changed

inline constexpr int64_t blocks_of(int64_t num_keys) { return (num_keys + kBlock - 1) / kBlock; }

// The keys of one KV head in low precision, and their centroids: [number of blocks, ...] each.
//
// A key k is stored as the bytes 128 + round((k - center) / scale), clamped; softmax ignores the shift, and
// the scale of a channel is folded into the query. `residual` and `norm` bound, per block, the Euclidean
// norms of what rounding took away and of what is left: the error of a score follows by Cauchy-Schwarz. The
// centroids may be missing.
struct HeadIndex {
    uint8_t* packed;  // [blocks, groups of 4 channels, 64 keys in the kernel's order, 4]
    float* residual;  // [blocks]
    float* norm;      // [blocks]
    float* center;    // [head_size]
    float* scale;     // [head_size]
    float* inverse;   // [head_size], 1 / scale

    float* key_mean;    // [blocks, head_size]; of complete blocks
    float* value_mean;  // [blocks, value_size]
};

// The mean values of a KV head's blocks, and by what a change of the block is seen; null where not wanted.
struct HeadMeans {
    uint64_t* fingerprints;  // [blocks, kFingerprint]
    uint8_t* known;          // [blocks], 0 until there is a mean
    float* means;            // [blocks, value_size]
};

// The exact scores of a KV head's rows: before the softcap or, where a mask adds numbers, after that.
struct Scores {
    float* scores;  // [rows, padded keys]; only of blocks in which a row may see a key
    float* sums;    // [rows, blocks]; of blocks that some row may see wholly
};

// Which rows of which KV head. Rows of a head's group are numbered token by token: row / group is the query,
// row % group the head within the group.
struct Tile {
    int64_t batch;
    int64_t kv_head;
    int64_t first_row;
    int64_t num_rows;
};

struct SelectionOut {
    int64_t width;
    int32_t* indices;
    int32_t* counts;
    int64_t num_queries;  // of all, and which of them is the problem's first
    int64_t first_query;
};

// What a mask does to the scores.
enum class MaskKind { forbids, adds, bad };

struct Kernel {
    // Bytes that a thread needs for scratch.
    size_t (*workspace_size)(const Problem&);
    // Chooses center and scale from the whole head. Scratch: floats [head_size, blocks].
    void (*fit_index)(const Problem&, int64_t batch, int64_t kv_head, const HeadIndex&, float* scratch);
    // Quantises the blocks [first, last).
    void (*fill_index)(const Problem&, int64_t batch, int64_t kv_head, const HeadIndex&, int64_t first,
                       int64_t last);
    // The low-precision scores of a tile's rows with the blocks [first, last): int16 [kTileRows, padded
    // keys].
    void (*scan_tile)(const Problem&, const HeadIndex&, const Tile&, int64_t first, int64_t last,
                      std::byte* workspace, int16_t* scores);
    // One tile of rows: attention into `out`, or, where `selection` is given, only what the rows keep.
    // `scores`: those of scan_tile from the tile's first row on, or null.
    void (*sparse_tile)(const Problem&, const HeadIndex&, const Tile&, std::byte* workspace, int16_t* scores,
                        const Output& out, const SelectionOut* selection);
    // Few rows: the exact scores of all rows, at most kFewRows for a KV head, with the blocks [first, last),
    // whose means are brought up to date. means, out: [kv_heads].
    void (*score_rows)(const Problem&, const HeadMeans* means, int64_t batch, int64_t first, int64_t last,
                       std::byte* workspace, const Scores* out);
    // A tile of one row whose scores are known. `means`: of the values, or null for no tail.
    void (*attend_scored)(const Problem&, const float* means, const Tile&, std::byte* workspace,
                          const Scores& scored, const Output& out, const SelectionOut* selection);
    void (*dense_tile)(const Problem&, const Tile&, std::byte* workspace, const Output& out);
    // One row of the problem's mask as bits, [blocks].
    MaskKind (*pack_mask)(const Problem&, int64_t batch, int64_t head, int64_t query, uint64_t* bits);
};

namespace portable {
const Kernel& kernel();
}
namespace avx2 {
const Kernel& kernel();
}
namespace avx512_vnni {
const Kernel& kernel();
}

// The table for an instruction set that this machine has.
inline const Kernel& kernel_for(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512_vnni) return avx512_vnni::kernel();
    if (isa == Isa::avx2) return avx2::kernel();
#endif
    (void)isa;
    return portable::kernel();
}

}  // namespace sparsek
