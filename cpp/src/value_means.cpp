#include "sparsek/value_means.h"

#include <cstring>

#include "kernel/kernel.h"
#include "memory.h"

namespace sparsek {

struct ValueMeans::Storage {
    Storage(const Problem& p, int64_t capacity_)
        : heads(p.batch * p.kv_heads),
          kv_heads(p.kv_heads),
          size(p.value_size),
          capacity(capacity_),
          fingerprints(allocate<uint64_t>(heads * capacity * kFingerprint)),
          known(allocate<uint8_t>(heads * capacity)),
          means(allocate<float>(heads * capacity * size)) {
        std::memset(known.get(), 0, static_cast<size_t>(heads * capacity));
        // Blocks that are not whole have no mean, but a weight of 0 that is multiplied by one.
        std::memset(means.get(), 0, static_cast<size_t>(heads * capacity * size) * sizeof(float));
    }

    int64_t heads, kv_heads, size, capacity;
    Buffer<uint64_t> fingerprints;
    Buffer<uint8_t> known;
    Buffer<float> means;
};

ValueMeans::ValueMeans() = default;
ValueMeans::~ValueMeans() = default;

void ValueMeans::prepare(const Problem& p) {
    const int64_t blocks = blocks_of(p.num_keys);
    const bool fits = storage_ && storage_->heads == p.batch * p.kv_heads &&
                      storage_->kv_heads == p.kv_heads && storage_->size == p.value_size &&
                      storage_->capacity >= blocks;
    if (!fits) storage_ = std::make_unique<Storage>(p, blocks + blocks / 2);
}

HeadMeans ValueMeans::head(int64_t batch, int64_t kv_head) const {
    const int64_t at = (batch * storage_->kv_heads + kv_head) * storage_->capacity;
    return {storage_->fingerprints.get() + at * kFingerprint, storage_->known.get() + at,
            storage_->means.get() + at * storage_->size};
}

}  // namespace sparsek
