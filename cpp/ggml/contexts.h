// The host's contexts between their making and their first computation: what the host asks of us then.
//
// A context of llama.cpp with flash attention "auto" is made in this order: its backends; a graph of one
// token for each sequence, which is only shared out to devices and never computed; a graph of a whole batch
// of a prompt. Where the first gives attention to another device than the layer's, flash attention is off for
// good. Layers are the CPU's, so the answer must be no; later graphs are shared out anew, and may get another
// one.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace sparsek::ggml {

// A layer's attention, as the host announced it.
struct Plan {
    int64_t cells = 0;           // of its cache
    std::string left;            // why all of it stays with the host; empty: it does not
    std::string left_steps;      // why steps of generation stay with the host
    const void* mask = nullptr;  // whose: layers with a sliding window have one of their own
};
using Plans = std::map<int64_t, Plan>;  // by the number of the layer

class Contexts {
   public:
    // What a query of the host may be.
    enum class Asked {
        work,           // of a graph that is to be computed, or like one
        who_attends,    // the question of "auto", for layers of the CPU
        whether_we_do,  // the same for layers that the user gave to our device
    };

    // This thread makes a context, with this backend of ours.
    void made(const void* backend);
    // The backend is about to compute. What was announced for its context; nothing if it computed before, or
    // the host has not asked yet what we can do.
    std::optional<Plans> begins(const void* backend);
    void gone(const void* backend);

    // The host asks about an operation, of any kind.
    void asks();
    // The host has decided on flash attention in all contexts that are made: it asks no question in them.
    void decided();
    // It asks about attention of so many queries, of all sequences.
    Asked asks_attention(int64_t queries);
    void plan(int64_t layer, const Plan& plan);

   private:
    struct Fresh {
        std::thread::id maker;
        std::vector<const void*> backends;
        bool asked = false;     // anything at all
        bool answered = false;  // the question is behind it
        Plans plans;
    };
    // The newest context that this thread made, or null.
    Fresh* own();
    void count();

    // Most of the time there are none, and the many questions of the host cost nothing.
    std::atomic<int> count_{0}, unasked_{0};
    std::mutex mutex_;
    std::vector<Fresh> fresh_;
};

}  // namespace sparsek::ggml
