// What the masks of a pass through a model say. All layers of a kind share one (those with a sliding window,
// those without), so it is read once a pass and not once a layer.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"
#include "sparsek/attention.h"
#include "sparsek/packed_mask.h"

namespace sparsek::ggml {

// The masks of one context of the host. A mask has new content in the next pass, at the same place.
class Masks {
   public:
    // A pass begins. A host that does not say so is told by its layers, whose numbers rise within one.
    void begin() { known_.clear(); }

    // The problem's mask, which is that of the operation; null where it is none of those that only allow and
    // forbid. Good until the next call. Throws std::bad_alloc.
    const PackedMask* of(const Tensor* op, const Problem& p, const Options& options);

   private:
    struct Known {
        const Tensor* tensor;
        const void* data;
        int64_t queries, heads;
        int64_t layer;  // the last that asked for it
        PackedMask mask;
    };
    std::vector<Known> known_;
};

}  // namespace sparsek::ggml
