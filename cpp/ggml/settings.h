// What is to be kept, from the environment, a JSON file or a call: the fields of SparseKConfig in
// src/sparsek/config.py, with the same defaults.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sparsek/attention.h"

namespace sparsek::ggml {

struct Settings {
    static constexpr int64_t kAuto = -1;

    std::vector<int64_t> top_k{kAuto};  // one for all layers, or one per layer; 0 for all: dense attention
    float min_share = 0.0f;
    int64_t sinks = 4;
    int64_t window = 16;
    int64_t stride = 0;
    bool centroid_tail = true;
    std::vector<int64_t> dense_layers{0};
    int64_t min_context = 2048;

    // Nothing is to be done: attention stays with the host.
    bool off() const { return top_k.size() == 1 && top_k[0] == 0; }
    // What a row keeps of `num_keys` keys in a layer where no row sees more than `seen` of them; layer -1:
    // unknown.
    Rule rule(int64_t layer, int64_t num_keys, int64_t seen) const;
    // Why a layer keeps all where no row sees more than so many keys; empty: it does not.
    std::string why_dense(int64_t layer, int64_t seen) const;
    // In one line.
    std::string words() const;

   private:
    int64_t best(int64_t layer, int64_t seen) const;
};

// From an object of fields like {"top_k": 64, "tail": "none"}. Throws std::invalid_argument, which names the
// field, what was given and what is allowed.
Settings settings_from_json(const std::string& text, Settings defaults);

// SPARSEK_CONFIG (a JSON file), then SPARSEK_TOP_K, SPARSEK_MIN_SHARE, SPARSEK_SINKS, SPARSEK_WINDOW,
// SPARSEK_STRIDE, SPARSEK_TAIL, SPARSEK_DENSE_LAYERS and SPARSEK_MIN_CONTEXT on top of it. Throws as
// settings_from_json does, and at any other SPARSEK_ variable that is not of Kubernetes or Docker.
Settings settings_from_environment();

// Whether SPARSEK_STATS = 1 asks for a line at the end. Throws as the above.
bool stats_from_environment();

}  // namespace sparsek::ggml
