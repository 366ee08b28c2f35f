// Tasks on threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "sparsek/attention.h"

namespace sparsek {

// The options with no more threads than `work` multiplications can occupy: starting one costs some 20 us.
inline Options for_work(Options options, double work) {
    constexpr double kPerThread = 1 << 20;
    if (work < kPerThread * options.num_threads) {
        options.num_threads = work < kPerThread ? 1 : static_cast<int>(work / kPerThread);
    }
    return options;
}

// Runs tasks 0 .. count-1 on some threads, the calling one among them; false when interrupted.
//
// Threads are started for the call and never waited for before they have begun: where another library's
// threads hold the processors (OpenMP's go on spinning for milliseconds after each of its loops), the calling
// thread does the work alone rather than wait.
template <typename Task>
bool run(const Options& options, int64_t count, Task task) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> stop{false};
    const auto caller = std::this_thread::get_id();
    const auto work = [&](int thread) {
        const bool asks = options.interrupted != nullptr && std::this_thread::get_id() == caller;
        for (int64_t i; !stop && (i = next++) < count;) {
            task(thread, i);
            if (asks && options.interrupted(options.interrupted_data)) stop = true;
        }
    };
    const auto threads = static_cast<int>(options.num_threads < count ? options.num_threads : count);
    if (threads <= 1) {
        work(0);
        return !stop;
    }
    if (options.parallel != nullptr) {
        std::atomic<int> begun{0};
        auto body = [&] {
            // Callers may come in any number; each needs a workspace of its own.
            const int thread = begun++;
            if (thread < threads) work(thread);
        };
        using Body = decltype(body);
        options.parallel([](void* data) { (*static_cast<Body*>(data))(); }, &body, threads);
        return !stop;
    }
    // A thread that begins after the end finds it closed, and touches nothing else.
    struct Crew {
        std::mutex mutex;
        std::condition_variable idle;
        int working = 0;
        bool closed = false;
    };
    const auto crew = std::make_shared<Crew>();
    try {
        for (int t = 1; t < threads; ++t) {
            std::thread([crew, &work, t] {
                {
                    const std::lock_guard lock(crew->mutex);
                    if (crew->closed) return;
                    ++crew->working;
                }
                work(t);
                const std::lock_guard lock(crew->mutex);
                if (--crew->working == 0) crew->idle.notify_one();
            }).detach();
        }
    } catch (const std::system_error&) {
        // No more threads to be had: those there are do the work.
    }
    work(0);
    std::unique_lock lock(crew->mutex);
    crew->closed = true;
    crew->idle.wait(lock, [&] { return crew->working == 0; });
    return !stop;
}

}  // namespace sparsek
