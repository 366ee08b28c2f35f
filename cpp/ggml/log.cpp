// What the host says: its log, of which the errors are kept, and its last words where it breaks off. In C++,
// for a callback in Python would lose a Ctrl-C that comes while it runs.

#include <unistd.h>

#include <cstdio>
#include <mutex>
#include <string>

#include "export.h"

namespace {

enum Level : int { kError = 4, kContinued = 5 };  // of ggml.h; the latter is more of the message before

constexpr size_t kMost = 1 << 16;  // bytes of errors that are kept: the first are those that tell
constexpr int kFailed = 2;         // the exit code of our commands

std::mutex mutex;  // of what follows
bool in_error = false;
// Never destroyed: the host may speak until the very end.
std::string* errors = new std::string;
std::string* model = new std::string;

}  // namespace

// A log callback for the host. `show`: not null to write everything to stderr.
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

// The model that the host works with, for its last words.
SPARSEK_EXPORT void sparsek_name_model(const char* name) {
    const std::lock_guard lock(mutex);
    *model = name;
}

// An abort callback for the host: ends the process with one line, where the host would show its own stack.
// Not to `stderr`, which may be somebody's pipe: nobody would read it any more.
SPARSEK_EXPORT void sparsek_break_off(const char* message) {
    dprintf(STDERR_FILENO, "sparsek: llama.cpp breaks off with %s, which may be damaged: %s\n",
            model->c_str(), message);
    _exit(kFailed);
}
