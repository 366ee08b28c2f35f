#include "sparsek/packed_mask.h"

#include <algorithm>
#include <atomic>

#include "kernel/kernel.h"
#include "memory.h"
#include "parallel.h"

namespace sparsek {
namespace {

template <typename T>
void raise(std::atomic<T>& to, T value) {
    for (T known = to; known < value && !to.compare_exchange_weak(known, value);) {
    }
}

}  // namespace

struct PackedMask::Storage {
    Buffer<uint64_t> words;  // [batch, heads, queries, blocks], each 1 where it is the same for all
    Mask mask, bias;
    int64_t most_allowed = 0;
};

PackedMask::PackedMask() = default;
PackedMask::~PackedMask() = default;
PackedMask::PackedMask(PackedMask&&) noexcept = default;
PackedMask& PackedMask::operator=(PackedMask&&) noexcept = default;

void PackedMask::put_into(Problem* p) const {
    p->mask = storage_->mask;
    p->bias = storage_->bias;
}

int64_t PackedMask::most_allowed() const { return storage_->most_allowed; }

Status PackedMask::pack(const Problem& p, const Options& options) {
    const Mask& m = p.mask;
    const Kernel& kernel = kernel_for(options.isa);
    const int64_t blocks = blocks_of(p.num_keys);
    const int64_t batch = m.batch_stride ? p.batch : 1, heads = m.head_stride ? p.heads : 1;
    const int64_t queries = m.query_stride ? p.num_queries : 1, rows = batch * heads * queries;
    storage_ = std::make_unique<Storage>();
    storage_->words = allocate<uint64_t>(rows * blocks);
    uint64_t* words = storage_->words.get();
    std::atomic<MaskKind> kind{MaskKind::forbids};
    std::atomic<int64_t> most{0};
    constexpr int64_t kRowsPerTask = 16;
    const Options limited = for_work(options, static_cast<double>(rows * p.num_keys));
    const bool finished = run(limited, (rows + kRowsPerTask - 1) / kRowsPerTask, [&](int, int64_t task) {
        int64_t most_here = 0;
        MaskKind kind_here = MaskKind::forbids;
        for (int64_t r = task * kRowsPerTask; r < rows && r < (task + 1) * kRowsPerTask; ++r) {
            const int64_t b = r / (heads * queries), h = r / queries % heads;
            uint64_t* row = words + r * blocks;
            kind_here = std::max(kind_here, kernel.pack_mask(p, b, h, r % queries, row));
            int64_t allowed = 0;
            for (int64_t i = 0; i < blocks; ++i) allowed += __builtin_popcountll(row[i]);
            most_here = std::max(most_here, allowed);
        }
        raise(most, most_here);
        raise(kind, kind_here);
    });
    storage_->most_allowed = most;
    storage_->mask = Mask{words,
                          Mask::Form::bits,
                          batch > 1 ? heads * queries * blocks : 0,
                          heads > 1 ? queries * blocks : 0,
                          queries > 1 ? blocks : 0,
                          0};
    if (kind == MaskKind::adds) storage_->bias = m;
    return !finished ? Status::interrupted : kind == MaskKind::bad ? Status::bad_mask : Status::done;
}

}  // namespace sparsek
