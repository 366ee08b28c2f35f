// What a kernel offers, one table per instruction set, and what it works on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparsek/attention.h"

namespace sparsek {

inline constexpr int64_t kBlock = 64;      // keys that share a centroid, an error bound and a word of bits
inline constexpr int kTileRows = 12;       // query rows that are scanned together
inline constexpr int kDenseTileRows = 96;  // and those of dense attention

inline constexpr int64_t blocks_of(int64_t num_keys) { return (num_keys + kBlock - 1) / kBlock; }

// The keys of one KV head in low precision, and their centroids: [number of blocks, ...] each.
//
// A key k is stored as the bytes 128 + round((k - center) / scale), clamped; softmax ignores the shift, and
// the scale of a channel is folded into the query. `residual` and `norm` bound, per block, the Euclidean
// norms of what rounding took away and of what is left: the error of a score follows by Cauchy-Schwarz.
struct KeyIndex {
    uint8_t* packed;    // [blocks, groups of 4 channels, 64 keys in the kernel's order, 4]
    float* residual;    // [blocks]
    float* norm;        // [blocks]
    float* key_mean;    // [blocks, head_size]; of complete blocks
    float* value_mean;  // [blocks, value_size]
    float* center;      // [head_size]
    float* scale;       // [head_size]
    float* inverse;     // [head_size], 1 / scale
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
};

struct Kernel {
    // Bytes that a thread needs for scratch.
    size_t (*workspace_size)(const Problem&);
    // Chooses center and scale from the whole head. Scratch: floats [head_size, blocks].
    void (*fit_index)(const Problem&, int64_t batch, int64_t kv_head, const KeyIndex&, float* scratch);
    // Quantises the blocks [first, last).
    void (*fill_index)(const Problem&, int64_t batch, int64_t kv_head, const KeyIndex&, int64_t first,
                       int64_t last);
    // One tile of rows: attention into `out`, or, where `selection` is given, only what the rows keep.
    void (*sparse_tile)(const Problem&, const KeyIndex&, const Tile&, std::byte* workspace, void* out,
                        const SelectionOut* selection);
    void (*dense_tile)(const Problem&, const Tile&, std::byte* workspace, void* out);
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

}  // namespace sparsek
