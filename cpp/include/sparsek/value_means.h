// The mean values of a KV cache's blocks of 64 keys, kept from one step of generation to the next.
#pragma once

#include <cstdint>
#include <memory>

#include "sparsek/attention.h"

namespace sparsek {

struct HeadMeans;

// Whoever owns the cache need not say what changed in it: each step reads every key, and a block whose keys
// are not those of the step before is averaged again. Not safe for two calls at once.
class ValueMeans {
   public:
    ValueMeans();
    ~ValueMeans();
    ValueMeans(const ValueMeans&) = delete;
    ValueMeans& operator=(const ValueMeans&) = delete;

    // Makes room for the problem's blocks; forgets everything where it is of another shape than those before.
    void prepare(const Problem& p);
    HeadMeans head(int64_t batch, int64_t kv_head) const;

   private:
    struct Storage;
    std::unique_ptr<Storage> storage_;
};

}  // namespace sparsek
