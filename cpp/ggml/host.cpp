#include "host.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

namespace sparsek::ggml {
namespace {

// Versions of ggml's backend interface whose layout is the one of abi.h, each tested with a real host.
constexpr int kTestedVersions[] = {2, 3};

// Numbers of versions do not tell all: 2 was two layouts of the backend's table, and a host may be built with
// tensors of its own size. What the host's own CPU backend fills in shows which layout it is.
void check_layout(const Host& host, size_t tensor_overhead) {
    constexpr size_t kObject = 32;  // ggml's header before a tensor
    if (tensor_overhead != sizeof(Tensor) + kObject) {
        throw std::runtime_error("ggml " + host.version + " was built with tensors of " +
                                 std::to_string(tensor_overhead) + " bytes; supported are those of " +
                                 std::to_string(sizeof(Tensor) + kObject) + ": use an ordinary build of it");
    }
    Backend* cpu = host.cpu_backend(DeviceType::cpu, nullptr);
    if (cpu == nullptr)
        throw std::runtime_error("ggml " + host.version + " has no CPU backend yet: load that first");
    bool known = cpu->free != nullptr && cpu->synchronize == nullptr && cpu->compute != nullptr;
    for (const Unused entry : cpu->asynchronous) known &= entry == nullptr;
    for (const size_t i : {0, 1, 3}) known &= cpu->plans[i] != nullptr;  // to create, free and compute
    host.free_backend(cpu);
    if (!known) {
        throw std::runtime_error("ggml " + host.version + " has an older layout of backend interface " +
                                 std::to_string(host.api_version) +
                                 ": use a release of llama.cpp from May 2026 or later");
    }
}

}  // namespace

std::unique_ptr<Host> find_host(const void* caller) {
    Dl_info where{};
    if (dladdr(caller, &where) == 0 || where.dli_fname == nullptr)
        throw std::runtime_error("the library that loads the backend cannot be found");
    // The library is loaded already: this only gives a handle to it.
    void* library = dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) library = dlopen(nullptr, RTLD_LAZY);
    const auto function = [&](auto* to, const char* name) {
        void* address = dlsym(library, name);
        if (address == nullptr) address = dlsym(RTLD_DEFAULT, name);
        if (address == nullptr) {
            throw std::runtime_error(std::string(where.dli_fname) + " has no function " + name +
                                     ": it is not a ggml that is known here");
        }
        std::memcpy(to, &address, sizeof address);
    };

    auto host = std::make_unique<Host>();
    const char* (*version)() = nullptr;
    size_t (*registry_count)() = nullptr;
    Registry* (*registry_at)(size_t) = nullptr;
    function(&version, "ggml_version");
    function(&registry_count, "ggml_backend_reg_count");
    function(&registry_at, "ggml_backend_reg_get");
    host->version = version();
    if (registry_count() == 0)
        throw std::runtime_error("ggml " + host->version +
                                 " has no backend of its own yet: load its CPU backend first");
    host->api_version = registry_at(0)->api_version;
    bool tested = false;
    std::string known;
    for (const int v : kTestedVersions) {
        tested |= v == host->api_version;
        known += (known.empty() ? "" : ", ") + std::to_string(v);
    }
    if (!tested) {
        throw std::runtime_error("ggml " + host->version + " has backend interface " +
                                 std::to_string(host->api_version) + "; supported are " + known +
                                 ": use a release of llama.cpp with one of these, or a newer sparsek");
    }

    size_t (*tensor_overhead)() = nullptr;
    BufferType* (*cpu_buffer_type)() = nullptr;
    const char* (*op_name)(int) = nullptr;
    const TypeTraits* (*type_traits)(int) = nullptr;
    function(&tensor_overhead, "ggml_tensor_overhead");
    function(&cpu_buffer_type, "ggml_backend_cpu_buffer_type");
    function(&op_name, "ggml_op_name");
    function(&type_traits, "ggml_get_type_traits");
    function(&host->is_host_buffer, "ggml_backend_buft_is_host");
    function(&host->graph_size, "ggml_graph_n_nodes");
    function(&host->graph_node, "ggml_graph_node");
    function(&host->init, "ggml_init");
    function(&host->free, "ggml_free");
    function(&host->new_tensor, "ggml_new_tensor");
    function(&host->flash_attention_of, "ggml_flash_attn_ext");
    function(&host->new_graph, "ggml_new_graph");
    function(&host->build_forward, "ggml_build_forward_expand");
    function(&host->cpu_backend, "ggml_backend_init_by_type");
    function(&host->free_backend, "ggml_backend_free");
    function(&host->compute, "ggml_backend_graph_compute");
    check_layout(*host, tensor_overhead());
    host->cpu_buffer_type = cpu_buffer_type();
    const TypeTraits* q8 = type_traits(kQ8);
    const bool known_q8 = std::strcmp(q8->name, "q8_0") == 0 && q8->block_size == kQ8Block &&
                          q8->bytes == kQ8Bytes && q8->is_quantized;
    host->unpack_q8 = known_q8 ? q8->to_float : nullptr;
    void* parallel = dlsym(library, "GOMP_parallel");  // found among the libraries that the host needs
    std::memcpy(&host->gomp_parallel, &parallel, sizeof parallel);

    // Numbers of operations change from version to version; their names do not.
    const char* names[] = {"FLASH_ATTN_EXT", "NONE", "RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE"};
    int* numbers[] = {&host->flash_attention, host->passive,     host->passive + 1,
                      host->passive + 2,      host->passive + 3, host->passive + 4};
    constexpr int kOperations = 90;  // every tested version has more, and all of these among the first
    for (int n = 0; n < 6; ++n) {
        *numbers[n] = -1;
        for (int op = 0; op < kOperations && *numbers[n] < 0; ++op) {
            if (std::strcmp(op_name(op), names[n]) == 0) *numbers[n] = op;
        }
        if (*numbers[n] < 0)
            throw std::runtime_error("ggml " + host->version + " has no operation " + names[n]);
    }
    return host;
}

}  // namespace sparsek::ggml
