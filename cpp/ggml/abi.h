// What the backend needs of ggml's binary interface (ggml.h, ggml-backend.h, ggml-backend-impl.h), declared
// here because a backend outside of ggml's tree has no headers to build against. Names of fields follow ours.
//
// The tables below are the same in the versions of the allow-list in host.cpp, and only there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsek::ggml {

enum Type : int { kF32 = 0, kF16 = 1, kQ8 = 8, kBF16 = 30 };  // kQ8: Q8_0
constexpr int64_t kQ8Block = 32;                              // numbers in a block of Q8_0, and its bytes
constexpr size_t kQ8Bytes = 34;

using Unused = void (*)();

enum class DeviceType : int { cpu, gpu, igpu, accelerator };
enum class GraphStatus : int { failed = -1, success = 0 };

struct Tensor {
    int type;
    void* buffer;
    int64_t size[4];
    size_t stride[4];  // in bytes
    int op;
    int32_t op_params[16];
    int32_t flags;
    Tensor* src[10];
    Tensor* view_src;
    size_t view_offset;
    void* data;
    char name[64];
    void* extra;
    char padding[8];
};
static_assert(sizeof(Tensor) == 336);

struct TypeTraits {
    const char* name;
    int64_t block_size;  // numbers in a block
    int64_t interleaved;
    size_t bytes;  // of a block
    bool is_quantized;
    void (*to_float)(const void* from, float* to, int64_t count);
    Unused from_float;
};

struct Graph;       // opaque
struct BufferType;  // opaque
struct Device;
struct Backend;
struct Registry;

struct Capabilities {
    bool async, host_buffer, buffer_from_host_pointer, events, mmap;
};

struct Properties {
    const char* name;
    const char* description;
    size_t memory_free;
    size_t memory_total;
    DeviceType type;
    const char* id;
    Capabilities capabilities;
};

struct Backend {
    const uint8_t (*guid)[16];
    const char* (*get_name)(Backend*);
    void (*free)(Backend*);
    Unused asynchronous[5];
    void (*synchronize)(Backend*);
    Unused plans[4];
    GraphStatus (*compute)(Backend*, Graph*);
    Unused events[2];
    Unused optimize;
    Device* device;
    void* context;
};

struct Device {
    const char* (*get_name)(Device*);
    const char* (*get_description)(Device*);
    void (*get_memory)(Device*, size_t* free, size_t* total);
    DeviceType (*get_type)(Device*);
    void (*get_properties)(Device*, Properties*);
    Backend* (*make_backend)(Device*, const char* parameters);
    BufferType* (*get_buffer_type)(Device*);
    Unused get_host_buffer_type;
    Unused buffer_from_host_pointer;
    bool (*supports_op)(Device*, const Tensor*);
    bool (*supports_buffer_type)(Device*, BufferType*);
    Unused offload_op;
    Unused events[3];
    Registry* registry;
    void* context;
};

struct Registry {
    int api_version;
    const char* (*get_name)(Registry*);
    size_t (*get_device_count)(Registry*);
    Device* (*get_device)(Registry*, size_t);
    void* (*get_proc_address)(Registry*, const char*);
    void* context;
};

}  // namespace sparsek::ggml
