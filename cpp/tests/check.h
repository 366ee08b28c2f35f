// The whole test framework: CHECK counts failures, and main() returns how many.
#pragma once

#include <cstdio>
#include <exception>
#include <string>

inline int failures = 0;

inline void check(bool passed, const char* what, const char* file, int line) {
    if (passed) return;
    ++failures;
    std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
}

// What `call` says when it throws; empty when it does not.
template <typename Call>
std::string message_of(Call&& call) {
    try {
        call();
    } catch (const std::exception& error) {
        return error.what();
    }
    return {};
}

#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
