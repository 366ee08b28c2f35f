#include "contexts.h"

#include <algorithm>

namespace sparsek::ggml {
namespace {

// llama.cpp's LLAMA_MAX_SEQ. A graph of more tokens than that is no question.
constexpr int64_t kMostSequences = 256;

}  // namespace

Contexts::Fresh* Contexts::own() {
    const auto found = std::find_if(fresh_.rbegin(), fresh_.rend(), [](const Fresh& context) {
        return context.maker == std::this_thread::get_id();
    });
    return found == fresh_.rend() ? nullptr : &*found;
}

void Contexts::made(const void* backend) {
    const std::lock_guard lock(mutex_);
    Fresh* last = own();
    // A context has a second backend of ours where our device is one of those that hold layers.
    if (last != nullptr && !last->asked) {
        last->backends.push_back(backend);
        return;
    }
    fresh_.push_back({std::this_thread::get_id(), {backend}, false, false, {}});
    count();
}

std::optional<Plans> Contexts::begins(const void* backend) {
    if (count_ == 0) return std::nullopt;
    const std::lock_guard lock(mutex_);
    for (Fresh& context : fresh_)  // a thread that computes is not making a context any more
        context.answered |= context.maker == std::this_thread::get_id();
    for (auto it = fresh_.begin(); it != fresh_.end(); ++it) {
        if (std::find(it->backends.begin(), it->backends.end(), backend) == it->backends.end()) continue;
        std::optional<Plans> plans;
        if (it->asked) plans = std::move(it->plans);
        fresh_.erase(it);
        count();
        return plans;
    }
    return std::nullopt;
}

void Contexts::gone(const void* backend) {
    const std::lock_guard lock(mutex_);
    for (Fresh& context : fresh_) {
        auto& all = context.backends;
        all.erase(std::remove(all.begin(), all.end(), backend), all.end());
    }
    const auto is_empty = [](const Fresh& context) { return context.backends.empty(); };
    fresh_.erase(std::remove_if(fresh_.begin(), fresh_.end(), is_empty), fresh_.end());
    count();
}

void Contexts::asks() {
    if (unasked_ == 0) return;
    const std::lock_guard lock(mutex_);
    if (Fresh* context = own()) context->asked = true;
    count();
}

void Contexts::decided() {
    const std::lock_guard lock(mutex_);
    for (Fresh& context : fresh_) context.answered = true;
}

Contexts::Asked Contexts::asks_attention(int64_t queries) {
    if (count_ == 0) return Asked::work;
    const std::lock_guard lock(mutex_);
    if (fresh_.empty()) return Asked::work;
    Fresh* context = own();
    if (context == nullptr) context = &fresh_.back();  // a host that makes its contexts with several threads
    context->answered |= queries > kMostSequences;
    if (context->answered) return Asked::work;
    return context->backends.size() > 1 ? Asked::whether_we_do : Asked::who_attends;
}

void Contexts::plan(int64_t layer, const Plan& plan) {
    if (count_ == 0) return;
    const std::lock_guard lock(mutex_);
    Fresh* context = own();
    if (context == nullptr) return;
    Plan& known = context->plans[layer];
    if (plan.cells > known.cells) known = plan;
    // The same graph is announced for prompts and for steps.
    if (plan.cells == known.cells && !plan.left_steps.empty()) known.left_steps = plan.left_steps;
}

void Contexts::count() {
    count_ = static_cast<int>(fresh_.size());
    unasked_ = static_cast<int>(
        std::count_if(fresh_.begin(), fresh_.end(), [](const Fresh& context) { return !context.asked; }));
}

}  // namespace sparsek::ggml
