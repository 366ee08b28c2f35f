// A mask as bits: made once for all heads, and for all calls, that share it.
#pragma once

#include <cstdint>
#include <memory>

#include "sparsek/attention.h"

namespace sparsek {

class PackedMask {
   public:
    PackedMask();
    ~PackedMask();
    PackedMask(PackedMask&&) noexcept;
    PackedMask& operator=(PackedMask&&) noexcept;

    // Of the problem's mask, which is there and not in bits yet. Returns and throws as attention() does.
    Status pack(const Problem& p, const Options& options);
    // In a problem of the same sizes it takes the place of that mask, as long as this lives; the numbers of a
    // mask that adds some stay where they are.
    void put_into(Problem* p) const;
    // The keys that the mask allows to the row that may see most.
    int64_t most_allowed() const;

   private:
    struct Storage;
    std::unique_ptr<Storage> storage_;
};

}  // namespace sparsek
