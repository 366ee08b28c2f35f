// The keys of a growing KV cache in 8 bits, and the centroids of their blocks: what a step of generation
// reads in place of the keys themselves.
#pragma once

#include <cstdint>
#include <memory>

#include "sparsek/attention.h"

namespace sparsek {

struct HeadIndex;

// Holds the first `length` keys of every head of every batch entry. Whatever it holds must be what the
// problem's k and v still hold at those positions. Not safe for two calls at once.
class KeyIndex {
   public:
    // For problems of this one's batch, heads and head sizes; with the centroids of blocks or without.
    KeyIndex(const Problem& like, bool centroids, Isa isa);
    ~KeyIndex();
    KeyIndex(const KeyIndex&) = delete;
    KeyIndex& operator=(const KeyIndex&) = delete;
    std::unique_ptr<KeyIndex> copy() const;

    int64_t length() const { return length_; }
    int64_t batch() const { return batch_; }
    Isa isa() const { return isa_; }
    int64_t bytes() const;
    bool fits(const Problem& p) const;

    // Takes in the keys from `length` on. O(new keys) on average. Returns false when it was interrupted.
    bool extend(const Problem& p, const Options& options);
    // Forgets the keys from `length` on.
    void truncate(int64_t length);
    // Batch entry i becomes a copy of entry from[i].
    void reorder(const int64_t* from, int64_t count);

    HeadIndex head(int64_t batch, int64_t kv_head) const;

   private:
    struct Storage;
    std::unique_ptr<Storage> storage(int64_t batch, int64_t blocks) const;

    int64_t batch_, kv_heads_, head_size_, value_size_;
    bool centroids_;
    Isa isa_;
    int64_t length_ = 0;
    int64_t fitted_ = 0;  // the length at which center and scale were chosen
    std::unique_ptr<Storage> storage_;
};

}  // namespace sparsek
