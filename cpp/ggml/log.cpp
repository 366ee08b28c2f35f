// A log callback for the host that shows nothing, or all, and keeps the errors. In C++, for a callback in
// Python would lose a Ctrl-C that comes while it runs.

#include <cstdio>
#include <mutex>
#include <string>

#include "export.h"

namespace {

enum Level : int { kError = 4, kContinued = 5 };  // of ggml.h; the latter is more of the message before

constexpr size_t kMost = 1 << 16;  // bytes of errors that are kept: the first are those that tell

std::mutex mutex;  // of what follows
bool in_error = false;
std::string* errors = new std::string;  // never destroyed: the host may log until the very end

}  // namespace

// `show`: not null to write everything to stderr.
SPARSEK_EXPORT void sparsek_log(int level, const char* text, void* show) {
    const std::lock_guard lock(mutex);
    if (show != nullptr) std::fputs(text, stderr);
    if (level != kContinued) in_error = level == kError;
    if (in_error && errors->size() < kMost) *errors += text;
}

// The errors since the last call, until the next one; one a line.
SPARSEK_EXPORT const char* sparsek_take_errors() {
    static thread_local std::string taken;
    const std::lock_guard lock(mutex);
    taken.clear();
    taken.swap(*errors);
    return taken.c_str();
}
