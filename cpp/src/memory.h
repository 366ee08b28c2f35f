// Aligned memory that is not initialised.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace sparsek {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Throws std::bad_alloc.
template <typename T>
Buffer<T> allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return Buffer<T>(static_cast<T*>(p));
}

// Scratch memory of one call. The last call's is kept for the next one: touching fresh pages would cost a
// step of generation as much as all its arithmetic. No lock, so that nothing can hang after a fork.
class Scratch {
   public:
    explicit Scratch(int64_t bytes) : block_(kept_.exchange(nullptr)) {
        if (block_ != nullptr && block_->bytes >= bytes) return;
        delete block_;
        block_ = new Block{bytes, allocate<std::byte>(bytes)};
    }
    ~Scratch() {
        if (block_->bytes <= kKeptBytes) block_ = kept_.exchange(block_);
        delete block_;
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    std::byte* data() const { return block_->memory.get(); }

   private:
    struct Block {
        int64_t bytes;
        Buffer<std::byte> memory;
    };
    static constexpr int64_t kKeptBytes = 32 << 20;
    static inline std::atomic<Block*> kept_{nullptr};
    Block* block_;
};

}  // namespace sparsek
