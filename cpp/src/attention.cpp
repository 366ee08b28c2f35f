// Attention over the whole problem: builds the index of each head, then gives tiles of rows to threads.

#include "sparsek/attention.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "kernel/kernel.h"

namespace sparsek {
namespace {

constexpr int64_t kIndexBlocksPerTask = 64;

const Kernel& kernel_for(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512_vnni) return avx512_vnni::kernel();
    if (isa == Isa::avx2) return avx2::kernel();
#endif
    (void)isa;
    return portable::kernel();
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Aligned and not initialised.
template <typename T>
Buffer<T> allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return Buffer<T>(static_cast<T*>(p));
}

// The indexes of all heads, in a few large pieces.
class Indexes {
   public:
    explicit Indexes(const Problem& p)
        : blocks_(blocks_of(p.num_keys)),
          size_(p.head_size),
          values_(p.value_size),
          bytes_((p.head_size + 3) / 4 * 4 * kBlock * blocks_),
          packed_(allocate<uint8_t>(p.batch * p.kv_heads * bytes_)),
          floats_(allocate<float>(p.batch * p.kv_heads * floats_per_head())) {}

    KeyIndex of(int64_t head) const {
        float* f = floats_.get() + head * floats_per_head();
        const auto take = [&](int64_t n) { return f += n, f - n; };
        KeyIndex index{};
        index.packed = packed_.get() + head * bytes_;
        index.residual = take(blocks_);
        index.norm = take(blocks_);
        index.key_mean = take(blocks_ * size_);
        index.value_mean = take(blocks_ * values_);
        index.center = take(size_);
        index.scale = take(size_);
        index.inverse = take(size_);
        return index;
    }

   private:
    int64_t floats_per_head() const { return blocks_ * (2 + size_ + values_) + 3 * size_; }

    int64_t blocks_, size_, values_, bytes_;
    Buffer<uint8_t> packed_;
    Buffer<float> floats_;
};

// Runs tasks 0 .. count-1 on some threads, the calling one among them; false when interrupted.
template <typename Task>
bool run(const Options& options, int64_t count, Task task) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> stop{false};
    const auto work = [&](int thread) {
        for (int64_t i; !stop && (i = next++) < count;) {
            task(thread, i);
            if (thread == 0 && options.interrupted && options.interrupted(options.interrupted_data))
                stop = true;
        }
    };
    std::vector<std::thread> others;
    struct Join {
        std::vector<std::thread>& threads;
        ~Join() {
            for (std::thread& t : threads) t.join();
        }
    };
    {
        const Join join{others};
        const auto threads = static_cast<int>(options.num_threads < count ? options.num_threads : count);
        others.reserve(static_cast<size_t>(threads));
        try {
            for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
        } catch (const std::system_error&) {
            // No more threads to be had: those there are do the work.
        }
        work(0);
    }
    return !stop;
}

bool solve(const Problem& p, const Options& options, void* out, const SelectionOut* selection) {
    if (p.batch == 0 || p.heads == 0 || p.num_queries == 0) return true;
    const Kernel& kernel = kernel_for(options.isa);
    const int64_t kv_heads = p.batch * p.kv_heads, rows = p.heads / p.kv_heads * p.num_queries;
    const bool dense = p.rule.top_k >= p.num_keys && selection == nullptr;
    const int64_t tile_rows = dense ? kDenseTileRows : kTileRows;
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;

    const auto workspace_bytes = static_cast<int64_t>(kernel.workspace_size(p));
    std::vector<Buffer<std::byte>> workspaces;
    for (int t = 0; t < options.num_threads; ++t) workspaces.push_back(allocate<std::byte>(workspace_bytes));

    std::unique_ptr<Indexes> indexes;
    if (!dense) {
        indexes = std::make_unique<Indexes>(p);
        const int64_t blocks = blocks_of(p.num_keys);
        const auto scratch = allocate<float>(options.num_threads * p.head_size * blocks);
        const bool fitted = run(options, kv_heads, [&](int thread, int64_t head) {
            kernel.fit_index(p, head / p.kv_heads, head % p.kv_heads, indexes->of(head),
                             scratch.get() + thread * p.head_size * blocks);
        });
        const int64_t parts = (blocks + kIndexBlocksPerTask - 1) / kIndexBlocksPerTask;
        const bool filled =
            fitted && run(options, kv_heads * parts, [&](int, int64_t task) {
                const int64_t head = task / parts, first = task % parts * kIndexBlocksPerTask;
                const int64_t last =
                    first + kIndexBlocksPerTask < blocks ? first + kIndexBlocksPerTask : blocks;
                kernel.fill_index(p, head / p.kv_heads, head % p.kv_heads, indexes->of(head), first, last);
            });
        if (!filled) return false;
    }
    // The last tiles first: under the causal rule they are the longest.
    return run(options, kv_heads * tiles, [&](int thread, int64_t task) {
        const int64_t head = task % kv_heads, first = (tiles - 1 - task / kv_heads) * tile_rows;
        const int64_t count = rows - first < tile_rows ? rows - first : tile_rows;
        const Tile tile = {head / p.kv_heads, head % p.kv_heads, first, count};
        std::byte* workspace = workspaces[static_cast<size_t>(thread)].get();
        if (dense) {
            kernel.dense_tile(p, tile, workspace, out);
        } else {
            kernel.sparse_tile(p, indexes->of(head), tile, workspace, out, selection);
        }
    });
}

}  // namespace

bool attention(const Problem& problem, const Options& options, void* out) {
    return solve(problem, options, out, nullptr);
}

bool select(const Problem& problem, const Options& options, int64_t width, int32_t* indices,
            int32_t* counts) {
    const SelectionOut selection = {width, indices, counts};
    Problem without_values = problem;
    without_values.rule.centroid_tail = false;
    return solve(without_values, options, nullptr, &selection);
}

}  // namespace sparsek
