#include "sparsek/threads.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <vector>

#include "environment.h"

#if defined(__linux__)
#include <sched.h>

#include <cerrno>
#endif

namespace sparsek {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxThreads = 1024;

// 0 when the system does not tell.
int affinity_cpus() {
#if defined(__linux__)
    // One cpu_set_t holds 1024 processors; a larger machine answers EINVAL until the set is large enough.
    for (std::size_t sets = 1; sets <= 64; sets *= 2) {
        std::vector<cpu_set_t> mask(sets);
        const std::size_t size = sets * sizeof(cpu_set_t);
        if (sched_getaffinity(0, size, mask.data()) == 0) return CPU_COUNT_S(size, mask.data());
        if (errno != EINVAL) break;
    }
#endif
    return 0;
}

// Infinity where there is no limit, no such group or no such controller.
double cpus_of_group(const fs::path& group) {
    double quota = 0, period = 0;
    std::ifstream v2(group / "cpu.max");
    if (!(v2 >> quota >> period)) {
        std::ifstream(group / "cpu.cfs_quota_us") >> quota;
        std::ifstream(group / "cpu.cfs_period_us") >> period;
    }
    // No limit is "max" in v2, which reads as 0, and -1 in v1.
    return quota > 0 && period > 0 ? quota / period : INFINITY;
}

// A group gets no more than any group around it. Inside a container the path may be the host's, of which
// only the root is visible.
double cpus_up_to_root(const fs::path& root, const fs::path& membership) {
    double cpus = cpus_of_group(root);
    fs::path group = root;
    for (const fs::path& part : membership.relative_path()) {
        group /= part;
        cpus = std::min(cpus, cpus_of_group(group));
    }
    return cpus;
}

std::string read(const fs::path& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int parse_num_threads(const std::string& text, int otherwise) {
    if (text.empty()) return otherwise;
    int count = 0;
    const char* end = text.data() + text.size();
    const auto [rest, error] = std::from_chars(text.data(), end, count);
    if (error != std::errc{} || rest != end || count < 1 || count > kMaxThreads) {
        throw std::invalid_argument("SPARSEK_NUM_THREADS = '" + text +
                                    "': must be a whole number from 1 to " + std::to_string(kMaxThreads));
    }
    return count;
}

int cgroup_cpus(const std::string& memberships, const fs::path& root) {
    double cpus = INFINITY;
    std::istringstream lines(memberships);
    std::string hierarchy, controllers, group;
    while (std::getline(lines, hierarchy, ':') && std::getline(lines, controllers, ':') &&
           std::getline(lines, group)) {
        if (controllers.empty()) {  // v2: one hierarchy for all controllers
            cpus = std::min(cpus, cpus_up_to_root(root, group));
        } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
            cpus = std::min(cpus, cpus_up_to_root(root / "cpu", group));
        }
    }
    return std::isinf(cpus) ? 0 : std::max(1, static_cast<int>(std::ceil(cpus)));
}

int available_cpus() {
    int cpus = affinity_cpus();
    if (cpus == 0) cpus = static_cast<int>(std::thread::hardware_concurrency());
    static const int granted = cgroup_cpus(read("/proc/self/cgroup"), "/sys/fs/cgroup");
    if (granted > 0) cpus = std::min(cpus, granted);
    return std::clamp(cpus, 1, kMaxThreads);
}

int num_threads() { return parse_num_threads(environment("SPARSEK_NUM_THREADS"), available_cpus()); }

}  // namespace sparsek
