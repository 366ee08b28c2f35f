// What the backend says, on stderr, where every host shows it: one line a matter.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "contexts.h"
#include "settings.h"

namespace sparsek::ggml {

// A line, whatever was quoted in it.
void say(std::string line);

// Whether a context uses Sparse-K, with which settings, in which layers not, and why.
std::string in_use(const Plans& plans, const Settings& settings);

// Operations by who computed them: Sparse-K, our dense kernel, or the host for us.
struct Counts {
    int64_t sparse = 0, dense = 0, by_host = 0;
};
using Reasons = std::map<std::string, std::set<int64_t>>;  // the layers of each

std::string totals(const Counts& prompts, const Counts& steps, const Reasons& left_to_host);

}  // namespace sparsek::ggml
