// How many threads the kernels use.
#pragma once

#include <filesystem>
#include <string>

namespace sparsek {

// The number of threads in `text`, or `otherwise` when `text` is empty.
// Throws std::invalid_argument when it is no whole number from 1 to 1024.
int parse_num_threads(const std::string& text, int otherwise);

// The processors' worth of time that a control group grants, rounded up; 0 for no limit.
// `memberships` is the content of /proc/self/cgroup, `root` is where the groups are mounted.
int cgroup_cpus(const std::string& memberships, const std::filesystem::path& root);

// The processors that this process may use: affinity and control groups (v2 and v1) both count.
int available_cpus();

// The default number of threads: SPARSEK_NUM_THREADS, or available_cpus(). Throws as parse_num_threads does.
int num_threads();

}  // namespace sparsek
