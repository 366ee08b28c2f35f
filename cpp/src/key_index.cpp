#include "sparsek/key_index.h"

#include <cstring>

#include "kernel/kernel.h"
#include "memory.h"
#include "parallel.h"

namespace sparsek {
namespace {

constexpr int64_t kBlocksPerTask = 64;
// Center and scale are chosen again when there are four times as many keys as when they were chosen, until
// they rest on this many. Any choice is correct; a good one leaves fewer candidates.
constexpr int64_t kEnoughToFit = 4096;

template <typename T>
void copy_array(T* to, const T* from, int64_t count) {
    if (count > 0) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace

// All heads in two pieces of memory, each head with room for `capacity` blocks.
struct KeyIndex::Storage {
    Storage(int64_t heads, int64_t capacity_, int64_t head_size, int64_t value_size, bool centroids_)
        : capacity(capacity_),
          size(head_size),
          values(value_size),
          centroids(centroids_),
          block_bytes((head_size + 3) / 4 * 4 * kBlock),
          packed(allocate<uint8_t>(heads * capacity * block_bytes)),
          floats(allocate<float>(heads * floats_per_head())) {}

    HeadIndex head(int64_t number) const {
        float* f = floats.get() + number * floats_per_head();
        const auto take = [&](int64_t n) {
            f += n;
            return f - n;
        };
        HeadIndex index{};
        index.packed = packed.get() + number * capacity * block_bytes;
        index.residual = take(capacity);
        index.norm = take(capacity);
        index.center = take(size);
        index.scale = take(size);
        index.inverse = take(size);
        if (centroids) {
            index.key_mean = take(capacity * size);
            index.value_mean = take(capacity * values);
        }
        return index;
    }

    void copy_head(int64_t number, const Storage& other, int64_t other_number, int64_t blocks) {
        const HeadIndex to = head(number), from = other.head(other_number);
        copy_array(to.packed, from.packed, blocks * block_bytes);
        copy_array(to.residual, from.residual, blocks);
        copy_array(to.norm, from.norm, blocks);
        copy_array(to.center, from.center, size);
        copy_array(to.scale, from.scale, size);
        copy_array(to.inverse, from.inverse, size);
        if (centroids) {
            copy_array(to.key_mean, from.key_mean, blocks * size);
            copy_array(to.value_mean, from.value_mean, blocks * values);
        }
    }

    int64_t floats_per_head() const {
        return 2 * capacity + 3 * size + (centroids ? capacity * (size + values) : 0);
    }

    int64_t capacity, size, values;
    bool centroids;
    int64_t block_bytes;
    Buffer<uint8_t> packed;
    Buffer<float> floats;
};

KeyIndex::KeyIndex(const Problem& like, bool centroids, Isa isa)
    : batch_(like.batch),
      kv_heads_(like.kv_heads),
      head_size_(like.head_size),
      value_size_(like.value_size),
      centroids_(centroids),
      isa_(isa) {}
KeyIndex::~KeyIndex() = default;

std::unique_ptr<KeyIndex::Storage> KeyIndex::storage(int64_t batch, int64_t blocks) const {
    return std::make_unique<Storage>(batch * kv_heads_, blocks, head_size_, value_size_, centroids_);
}

std::unique_ptr<KeyIndex> KeyIndex::copy() const {
    Problem like;
    like.batch = batch_;
    like.kv_heads = kv_heads_;
    like.head_size = head_size_;
    like.value_size = value_size_;
    auto twin = std::make_unique<KeyIndex>(like, centroids_, isa_);
    twin->length_ = length_;
    twin->fitted_ = fitted_;
    if (storage_) {
        twin->storage_ = storage(batch_, storage_->capacity);
        for (int64_t h = 0; h < batch_ * kv_heads_; ++h)
            twin->storage_->copy_head(h, *storage_, h, blocks_of(length_));
    }
    return twin;
}

int64_t KeyIndex::bytes() const {
    if (!storage_) return 0;
    const int64_t per_head = storage_->capacity * storage_->block_bytes + 4 * storage_->floats_per_head();
    return batch_ * kv_heads_ * per_head;
}

bool KeyIndex::fits(const Problem& p) const {
    return p.batch == batch_ && p.kv_heads == kv_heads_ && p.head_size == head_size_ &&
           (!centroids_ || p.value_size == value_size_);
}

bool KeyIndex::extend(const Problem& p, const Options& options) {
    const Kernel& kernel = kernel_for(isa_);
    const int64_t heads = batch_ * kv_heads_, blocks = blocks_of(p.num_keys);
    if (p.num_keys <= length_) return true;
    if (!storage_ || storage_->capacity < blocks) {
        const int64_t before = storage_ ? storage_->capacity : 0;
        auto larger = storage(batch_, blocks > before * 3 / 2 ? blocks : before * 3 / 2);
        for (int64_t h = 0; storage_ && h < heads; ++h)
            larger->copy_head(h, *storage_, h, blocks_of(length_));
        storage_ = std::move(larger);
    }
    const bool fit = fitted_ == 0 || (fitted_ < kEnoughToFit && p.num_keys >= 4 * fitted_);
    const int64_t first = fit ? 0 : length_ / kBlock;
    const double work = static_cast<double>(heads * (blocks - first) * kBlock * head_size_);
    const Options limited = for_work(options, 8.0 * work);
    if (fit) {
        length_ = fitted_ = 0;  // should it be interrupted
        const auto scratch = allocate<float>(limited.num_threads * head_size_ * blocks);
        const bool fitted = run(limited, heads, [&](int thread, int64_t h) {
            kernel.fit_index(p, h / kv_heads_, h % kv_heads_, head(h / kv_heads_, h % kv_heads_),
                             scratch.get() + thread * head_size_ * blocks);
        });
        if (!fitted) return false;
        fitted_ = p.num_keys;
    }
    const int64_t parts = (blocks - first + kBlocksPerTask - 1) / kBlocksPerTask;
    const bool filled = run(limited, heads * parts, [&](int, int64_t task) {
        const int64_t h = task / parts, from = first + task % parts * kBlocksPerTask;
        const int64_t to = from + kBlocksPerTask < blocks ? from + kBlocksPerTask : blocks;
        kernel.fill_index(p, h / kv_heads_, h % kv_heads_, head(h / kv_heads_, h % kv_heads_), from, to);
    });
    if (filled) length_ = p.num_keys;
    return filled;
}

void KeyIndex::truncate(int64_t length) {
    if (length < length_) length_ = length;
    if (length_ == 0) fitted_ = 0;
}

void KeyIndex::reorder(const int64_t* from, int64_t count) {
    if (storage_) {
        auto reordered = storage(count, storage_->capacity);
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t h = 0; h < kv_heads_; ++h) {
                reordered->copy_head(i * kv_heads_ + h, *storage_, from[i] * kv_heads_ + h,
                                     blocks_of(length_));
            }
        }
        storage_ = std::move(reordered);
    }
    batch_ = count;
}

HeadIndex KeyIndex::head(int64_t batch, int64_t kv_head) const {
    return storage_->head(batch * kv_heads_ + kv_head);
}

}  // namespace sparsek
