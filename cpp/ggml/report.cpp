#include "report.h"

#include <cctype>
#include <cstdio>

namespace sparsek::ggml {
namespace {

// "0, 2-5"
std::string numbers(const std::set<int64_t>& layers) {
    std::string all;
    for (auto it = layers.begin(); it != layers.end();) {
        const int64_t first = *it;
        int64_t last = first;
        while (++it != layers.end() && *it == last + 1 && first >= 0) ++last;
        all += (all.empty() ? "" : ", ") + (first < 0 ? "without a number" : std::to_string(first));
        if (last > first) all += "-" + std::to_string(last);
    }
    return all;
}

// "layers 0 (dense_layers), 2-5 (attention sinks)"
std::string with_reasons(const Reasons& reasons) {
    std::string all;
    for (const auto& [reason, layers] : reasons)
        all += (all.empty() ? "layers " : ", ") + numbers(layers) + " (" + reason + ")";
    return all;
}

std::string of(const Counts& counts) {
    return std::to_string(counts.sparse) + " with Sparse-K, " + std::to_string(counts.dense) + " dense, " +
           std::to_string(counts.by_host) + " given back to the host";
}

}  // namespace

void say(std::string line) {
    constexpr size_t kLongest = 400;
    if (line.size() > kLongest) line = line.substr(0, kLongest) + "...";
    for (char& c : line) {
        if (std::iscntrl(static_cast<unsigned char>(c))) c = ' ';
    }
    std::fprintf(stderr, "sparsek: %s\n", line.c_str());
}

std::string in_use(const Plans& plans, const Settings& settings) {
    if (plans.empty())
        return "Sparse-K is not in use here: the model's graph has no flash attention (-fa on, or auto)";
    std::set<int64_t> sparse;
    std::set<const void*> kinds;  // of layers
    Reasons others, steps;
    for (const auto& [layer, plan] : plans) {
        const std::string reason = plan.left.empty() ? settings.why_dense(layer, plan.cells) : plan.left;
        if (reason.empty()) {
            sparse.insert(layer);
            kinds.insert(plan.mask);
            if (!plan.left_steps.empty()) steps[plan.left_steps].insert(layer);
        } else {
            others[reason].insert(layer);
        }
    }
    if (sparse.empty()) return "Sparse-K is not in use here: " + with_reasons(others);
    std::string line = "Sparse-K is in use in layers " + numbers(sparse) + ": " + settings.words();
    if (kinds.size() > 1 && settings.min_context > 0)
        line += " (layers whose sliding window is shorter keep all)";
    if (!others.empty()) line += "; not in " + with_reasons(others);
    if (!steps.empty()) line += "; for prompts alone in " + with_reasons(steps);
    return line;
}

std::string totals(const Counts& prompts, const Counts& steps, const Reasons& left_to_host) {
    std::string line = "attention operations of prompts: " + of(prompts) + "; of steps: " + of(steps);
    if (!left_to_host.empty()) line += "; left to the host: some of " + with_reasons(left_to_host);
    return line;
}

}  // namespace sparsek::ggml
