// libggml-sparsek.so: a ggml backend that an unmodified llama.cpp loads. It offers one device, which takes
// the flash attention operation and nothing else; tensors stay where the host has them, in its CPU buffers.
//
// The way in is ggml_backend_init(), called by the host's ggml_backend_load(). Everything it returns lives as
// long as the process.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "abi.h"
#include "contexts.h"
#include "export.h"
#include "host.h"
#include "masks.h"
#include "operation.h"
#include "report.h"
#include "settings.h"
#include "sparsek/attention.h"
#include "sparsek/threads.h"
#include "sparsek/value_means.h"

namespace sparsek::ggml {
namespace {

constexpr const char* kName = "SPARSEK";
constexpr const char* kDescription = "Sparse-K attention";
// A name for this kind of backend: any 16 bytes that are no one else's.
constexpr uint8_t kGuid[16] = {0x73, 0x70, 0x61, 0x72, 0x73, 0x65, 0x6b, 0x21,
                               0x9d, 0x41, 0x4e, 0x0a, 0x6f, 0x17, 0xc2, 0x5b};

// Sees an operation that was computed; `rule`: top_k, sinks, window, stride, 1 for a centroid tail; `slopes`:
// of ALiBi, one a head, or null.
using Observer = void (*)(const Tensor* op, int64_t layer, const int64_t* rule, float min_share,
                          const float* slopes);

// Of operations that were computed.
struct Counters {
    std::atomic<int64_t> sparse{0}, dense{0}, by_host{0};

    Counts values() const { return {sparse, dense, by_host}; }
    void clear() { sparse = dense = by_host = 0; }
};

// The state of the process.
struct State {
    std::unique_ptr<Host> host;
    Contexts contexts;
    bool stats = false;  // a line at the end

    std::mutex mutex;    // of what follows, which a call may change while others compute
    Settings settings;   // read where a context is made and where an operation runs
    bool speaks = true;  // for itself: a program that gives us settings tells of them
    std::set<std::string> said;
    Reasons left_to_host;

    std::atomic<bool> disabled{false};
    std::atomic<Observer> observer{nullptr};
    Counters prompts, steps;
    Registry registry{};
    Device device{};
};

State& state() {
    static State* s = new State;  // never destroyed: the host may compute until the very end
    return *s;
}

Settings current_settings() {
    const std::lock_guard lock(state().mutex);
    return state().settings;
}

// A backend's own state: there is one for each context of the host.
struct Stream {
    int threads = 1;
    Isa isa = Isa::portable;
    std::unordered_map<const void*, ValueMeans> means;  // by where the values lie: one for each layer
    Masks masks;
    std::vector<float> room;  // for what is unpacked
};

// ---- Computing

void parallel(void (*body)(void*), void* data, int threads) {
    state().host->gomp_parallel(body, data, static_cast<unsigned>(threads), 0);
}

// The host's own kernel, for what turns out at run time to be beyond us. The sources are copied as leaves, so
// that nothing before the operation is computed again.
bool compute_by_host(const Tensor* op) {
    const Host& host = *state().host;
    void* context = host.init({size_t{16} << 20, nullptr, true});
    if (context == nullptr) return false;
    Tensor copy = *op, sources[5];
    for (int i = 0; i < 5; ++i) {
        if (op->src[i] == nullptr) continue;
        sources[i] = *op->src[i];
        sources[i].op = host.passive[0];
        sources[i].view_src = nullptr;
        for (Tensor*& source : sources[i].src) source = nullptr;
        copy.src[i] = sources + i;
    }
    Graph* graph = host.new_graph(context);
    host.build_forward(graph, &copy);
    Backend* cpu = host.cpu_backend(DeviceType::cpu, nullptr);
    const bool good = cpu != nullptr && host.compute(cpu, graph) == 0;
    if (cpu != nullptr) host.free_backend(cpu);
    host.free(context);
    return good;
}

// Bad masks are so for all heads, and nobody interrupts it.
Status compute_here(const Tensor* op, const Operation& operation, const Options& options, Stream& stream) {
    if (!is_packed(op)) {
        ValueMeans* means = &stream.means[op->src[2]->data];
        return attention(operation.problem, options, operation.out, nullptr, means);
    }
    const Problem& p = operation.problem;
    for (int64_t i = 0; i < p.batch * p.kv_heads; ++i) {
        const Operation head =
            unpacked(*state().host, op, operation, i / p.kv_heads, i % p.kv_heads, stream.room);
        const Status status = attention(head.problem, options, head.out, nullptr, nullptr);
        if (status != Status::done) return status;
    }
    return Status::done;
}

bool compute(const Tensor* op, const Settings& settings, Stream& stream) {
    Operation operation = operation_of(op);
    Problem& p = operation.problem;
    Counters& counters = is_step(op) ? state().steps : state().prompts;
    Options options = {stream.threads, stream.isa};
    if (state().host->gomp_parallel != nullptr) options.parallel = parallel;
    int64_t seen = p.num_keys;
    if (p.mask.data != nullptr) {
        const PackedMask* mask = stream.masks.of(op, p, options);
        if (mask == nullptr) {
            ++counters.by_host;
            return compute_by_host(op);
        }
        mask->put_into(&p);
        seen = mask->most_allowed();
    }
    p.rule = settings.rule(layer_of(op), p.num_keys, seen);
    if (compute_here(op, operation, options, stream) != Status::done) {
        ++counters.by_host;
        return compute_by_host(op);
    }
    const Rule& rule = p.rule;
    ++(rule.keeps_all(p.num_keys) ? counters.dense : counters.sparse);
    if (const Observer observer = state().observer) {
        const int64_t fields[] = {rule.top_k, rule.sinks, rule.window, rule.stride, rule.centroid_tail};
        observer(op, layer_of(op), fields, rule.min_share, operation.problem.slopes);
    }
    return true;
}

// ---- The comparison with the host's kernel

// Both kernels keep everything of one small operation; they must agree. Returns what is wrong, or nothing.
std::string disagreement(Stream& stream) {
    const Host& host = *state().host;
    constexpr int64_t kSize = 64, kQueries = 40, kKeys = 256, kHeads = 4, kKvHeads = 2;
    void* context = host.init({size_t{16} << 20, nullptr, false});
    if (context == nullptr) return "no memory for the comparison with the host's kernel";
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto made = [&](int type, int64_t tokens, int64_t heads) {
        const int64_t size[] = {kSize, tokens, heads, 1};
        Tensor* t = host.new_tensor(context, type, 4, size);
        if (t->size[1] != tokens || t->size[2] != heads || t->type != type || t->data == nullptr)
            throw std::runtime_error("its tensors are laid out in another way");
        for (int64_t i = 0; i < kSize * tokens * heads; ++i) static_cast<float*>(t->data)[i] = normal(random);
        return t;
    };
    std::string problem;
    try {
        Tensor *q = made(kF32, kQueries, kHeads), *k = made(kF32, kKeys, kKvHeads),
               *v = made(kF32, kKeys, kKvHeads);
        const int64_t size[] = {kKeys, 64, 1, 1};
        Tensor* mask = host.new_tensor(context, kF16, 4, size);
        auto* bits = static_cast<uint16_t*>(mask->data);
        for (int64_t i = 0; i < kKeys * 64; ++i)
            bits[i] = i % kKeys <= kKeys - kQueries + i / kKeys ? 0 : 0xfc00;
        Tensor* op = host.flash_attention_of(context, q, k, v, mask, 0.125f, 0.0f, 0.0f);
        const std::string other = obstacle(host, op);
        if (!other.empty()) throw std::runtime_error("its flash attention has other arguments: " + other);
        Graph* graph = host.new_graph(context);
        host.build_forward(graph, op);
        Backend* cpu = host.cpu_backend(DeviceType::cpu, nullptr);
        if (cpu == nullptr || host.compute(cpu, graph) != 0) throw std::runtime_error("its own kernel fails");
        host.free_backend(cpu);
        const auto* output = static_cast<const float*>(op->data);
        const std::vector<float> expected(output, output + kSize * kQueries * kHeads);
        Settings keep_all;
        keep_all.top_k = {2147483647};
        if (!compute(op, keep_all, stream)) throw std::runtime_error("ours fails");
        double difference = 0, total = 0;
        for (size_t i = 0; i < expected.size(); ++i) {
            const auto e = static_cast<double>(expected[i]), d = static_cast<double>(output[i]) - e;
            difference += d * d;
            total += e * e;
        }
        if (!(std::sqrt(difference / total) < 1e-2))
            throw std::runtime_error("ours differs by " + std::to_string(std::sqrt(difference / total)));
    } catch (const std::exception& error) {
        problem = std::string("the comparison with the host's attention kernel fails, ") + error.what();
    }
    host.free(context);
    return problem;
}

// ---- The tables

const char* backend_name(Backend*) { return kName; }

void free_backend(Backend* backend) {
    state().contexts.gone(backend);
    delete static_cast<Stream*>(backend->context);
    delete backend;
}

// The first computation of a context: what was announced for it can be told. Programs that compute without
// the host's scheduler announce nothing.
void begin(Backend* backend, bool announced) {
    State& s = state();
    const auto plans = s.contexts.begins(backend);
    if (!plans || (!announced && plans->empty())) return;
    const std::lock_guard lock(s.mutex);
    if (!s.speaks || s.disabled) return;
    const std::string line = in_use(*plans, s.settings);
    if (s.said.insert(line).second) say(line);
}

GraphStatus compute_graph(Backend* backend, Graph* graph) {
    const Host& host = *state().host;
    try {
        begin(backend, false);
        const Settings settings = current_settings();
        for (int i = 0; i < host.graph_size(graph); ++i) {
            const Tensor* node = host.graph_node(graph, i);
            if (host.is_passive(node)) continue;
            if (!obstacle(host, node).empty() ||
                !compute(node, settings, *static_cast<Stream*>(backend->context)))
                return GraphStatus::failed;
        }
    } catch (const std::exception& error) {
        say(error.what());
        return GraphStatus::failed;
    }
    return GraphStatus::success;
}

const char* device_name(Device*) { return kName; }
const char* device_description(Device*) { return kDescription; }
void device_memory(Device*, size_t* free, size_t* total) { *free = *total = 0; }
DeviceType device_type(Device*) { return DeviceType::accelerator; }

void device_properties(Device*, Properties* p) {
    *p = {kName, kDescription, 0, 0, DeviceType::accelerator, nullptr, {}};
    p->capabilities.mmap = true;
}

Backend* make_backend(Device* device, const char*) {
    try {
        auto stream = std::make_unique<Stream>();
        stream->threads = num_threads();
        stream->isa = active_isa();
        static std::once_flag compared;
        std::call_once(compared, [&] {
            const std::string problem = disagreement(*stream);
            state().prompts.clear(), state().steps.clear();
            if (problem.empty()) return;
            say(problem + "; attention stays with ggml " + state().host->version);
            state().disabled = true;
        });
        auto* backend = new Backend{};
        backend->guid = &kGuid;
        backend->get_name = backend_name;
        backend->free = free_backend;
        backend->compute = compute_graph;
        backend->device = device;
        backend->context = stream.release();
        state().contexts.made(backend);
        return backend;
    } catch (const std::exception& error) {
        say(error.what());
        return nullptr;
    }
}

BufferType* buffer_type(Device*) { return state().host->cpu_buffer_type; }

// Why the host keeps an operation; empty: it is ours.
std::string why_left(const Tensor* op) {
    State& s = state();
    const Settings settings = current_settings();
    const std::string beyond = obstacle(*s.host, op), slower = drawback(op, settings);
    const std::string why = !beyond.empty() ? beyond : settings.off() ? "top_k = 0" : slower;
    const int64_t layer = layer_of(op);
    s.contexts.plan(layer, {op->src[1]->size[1], beyond, slower, op->src[3]});
    switch (s.contexts.asks_attention(op->src[0]->size[1] * op->src[0]->size[3])) {
        case Contexts::Asked::who_attends: return "it may be a question";
        case Contexts::Asked::whether_we_do: return beyond;
        case Contexts::Asked::work: break;
    }
    if (s.stats && !why.empty()) {
        const std::lock_guard lock(s.mutex);
        s.left_to_host[why].insert(layer);
    }
    return why;
}

bool supports_op(Device*, const Tensor* op) {
    // The host asks for every operation of every graph, several times.
    State& s = state();
    s.contexts.asks();
    if (s.host->is_passive(op)) return true;
    return op->op == s.host->flash_attention && !s.disabled && why_left(op).empty();
}

bool supports_buffer_type(Device*, BufferType* type) { return state().host->is_host_buffer(type); }

const char* registry_name(Registry*) { return kName; }
size_t device_count(Registry*) { return 1; }
Device* device_at(Registry*, size_t) { return &state().device; }

// Comes before every graph, also before those of which we compute nothing.
void set_threads(Backend* backend, int threads) {
    begin(backend, true);
    auto* stream = static_cast<Stream*>(backend->context);
    stream->threads = threads < 1 ? 1 : threads;
    stream->masks.begin();
}

void* procedure(Registry*, const char* name) {
    if (std::strcmp(name, "ggml_backend_set_n_threads") != 0) return nullptr;
    void* address = nullptr;
    const auto function = &set_threads;
    std::memcpy(&address, &function, sizeof address);
    return address;
}

void say_totals() {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    say(totals(s.prompts.values(), s.steps.values(), s.left_to_host));
}

Registry* loaded(const void* caller) {
    State& s = state();
    if (s.host) return &s.registry;
    auto host = find_host(caller);
    s.settings = settings_from_environment();
    s.stats = stats_from_environment();
    num_threads(), active_isa();  // what is wrong in their variables shows now
    s.host = std::move(host);
    s.registry.api_version = s.host->api_version;
    s.registry.get_name = registry_name;
    s.registry.get_device_count = device_count;
    s.registry.get_device = device_at;
    s.registry.get_proc_address = procedure;
    s.device.get_name = device_name;
    s.device.get_description = device_description;
    s.device.get_memory = device_memory;
    s.device.get_type = device_type;
    s.device.get_properties = device_properties;
    s.device.make_backend = make_backend;
    s.device.get_buffer_type = buffer_type;
    s.device.supports_op = supports_op;
    s.device.supports_buffer_type = supports_buffer_type;
    s.device.registry = &s.registry;
    if (s.stats) std::atexit(say_totals);
    return &s.registry;
}

}  // namespace
}  // namespace sparsek::ggml

// Called by ggml_backend_load(). Null, after a line on stderr, where the host or the settings will not do.
SPARSEK_EXPORT sparsek::ggml::Registry* ggml_backend_init() {
    try {
        return sparsek::ggml::loaded(__builtin_return_address(0));
    } catch (const std::exception& error) {
        sparsek::ggml::say(error.what());
        return nullptr;
    }
}

// New settings for the contexts and operations that follow, as a JSON object. Null, or what is wrong with it.
SPARSEK_EXPORT const char* sparsek_configure(const char* json) {
    static thread_local std::string problem;
    try {
        const sparsek::ggml::Settings settings = sparsek::ggml::settings_from_json(json, {});
        const std::lock_guard lock(sparsek::ggml::state().mutex);
        sparsek::ggml::state().settings = settings;
        sparsek::ggml::state().speaks = false;
        return nullptr;
    } catch (const std::exception& error) {
        problem = error.what();
        return problem.c_str();
    }
}

// The contexts that were made so far do not ask who attends: the program has said that flash attention is on.
SPARSEK_EXPORT void sparsek_decided() { sparsek::ggml::state().contexts.decided(); }

// Calls the observer after every operation; null ends it.
SPARSEK_EXPORT void sparsek_observe(sparsek::ggml::Observer observer) {
    sparsek::ggml::state().observer = observer;
}

// An eval callback for the host, which counts the attention operations of what it is about to compute, and
// wants to see none of them. (The host asks first, operation by operation.)
SPARSEK_EXPORT bool sparsek_count_attention(const sparsek::ggml::Tensor* op, bool, void* count) {
    *static_cast<int64_t*>(count) += op->op == sparsek::ggml::state().host->flash_attention;
    return false;
}

// How many operations were computed with Sparse-K, with our dense kernel, and by the host for us.
SPARSEK_EXPORT void sparsek_counts(int64_t counts[3]) {
    const sparsek::ggml::State& s = sparsek::ggml::state();
    const sparsek::ggml::Counts prompts = s.prompts.values(), steps = s.steps.values();
    counts[0] = prompts.sparse + steps.sparse;
    counts[1] = prompts.dense + steps.dense;
    counts[2] = prompts.by_host + steps.by_host;
}
