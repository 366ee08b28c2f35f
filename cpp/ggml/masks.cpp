#include "masks.h"

#include <algorithm>
#include <utility>

#include "operation.h"

namespace sparsek::ggml {

const PackedMask* Masks::of(const Tensor* op, const Problem& p, const Options& options) {
    constexpr size_t kKinds = 8;  // of layers in a model; more than there are
    const Tensor* tensor = op->src[3];
    const int64_t layer = layer_of(op);
    const auto at = std::find_if(known_.begin(), known_.end(), [&](const Known& known) {
        return known.tensor == tensor && known.data == p.mask.data && known.queries == p.num_queries &&
               known.heads == p.heads;
    });
    if (at != known_.end()) {
        if (layer > at->layer && at->layer >= 0) {
            at->layer = layer;
            return &at->mask;
        }
        known_.clear();  // another pass
    }
    if (known_.size() >= kKinds) known_.clear();
    Known made{tensor, p.mask.data, p.num_queries, p.heads, layer, {}};
    if (made.mask.pack(p, options) != Status::done) return nullptr;
    known_.push_back(std::move(made));
    return &known_.back().mask;
}

}  // namespace sparsek::ggml
