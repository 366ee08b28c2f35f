// sparsek._core: the C++ core for Python. Types are in src/sparsek/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "sparsek/attention.h"
#include "sparsek/cpu.h"
#include "sparsek/key_index.h"
#include "sparsek/threads.h"

namespace nb = nanobind;
using namespace sparsek;

namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using OutArray = nb::ndarray<nb::device::cpu>;

DType dtype_of(const Array& x) {
    if (x.dtype() == nb::dtype<float>()) return DType::f32;
    if (x.dtype().bits == 16 && x.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) {
        return DType::bf16;
    }
    return DType::f16;
}

Tensor tensor_of(const Array& x) { return {x.data(), x.stride(0), x.stride(1), x.stride(2)}; }

Mask mask_of(const std::optional<Array>& x) {
    if (!x) return {};
    const auto stride = [&](size_t axis) { return x->shape(axis) == 1 ? 0 : x->stride(axis); };
    return {x->data(), Mask::Form::bytes, stride(0), stride(1), stride(2), stride(3)};
}

// q [B, H, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] or none, mask [1|B, 1|H, 1|Tq, 1|Tk] of bytes or
// none.
Problem problem_of(const Array& q, const Array& k, const std::optional<Array>& v,
                   const std::optional<Array>& mask, bool is_causal, int64_t first_position, float scale,
                   float softcap, int64_t top_k, int64_t sinks, int64_t window, int64_t stride,
                   bool centroid_tail, float min_share) {
    const auto size = [](const Array& x, size_t axis) { return static_cast<int64_t>(x.shape(axis)); };
    Problem p;
    p.batch = size(q, 0);
    p.heads = size(q, 1);
    p.kv_heads = size(k, 1);
    p.num_queries = size(q, 2);
    p.num_keys = size(k, 2);
    p.head_size = size(q, 3);
    p.value_size = v ? size(*v, 3) : 0;
    p.dtype = p.query_dtype = dtype_of(q);
    p.q = tensor_of(q);
    p.k = tensor_of(k);
    if (v) p.v = tensor_of(*v);
    p.mask = mask_of(mask);
    p.is_causal = is_causal;
    p.first_position = first_position;
    p.scale = scale;
    p.softcap = softcap;
    p.rule = {top_k, sinks, window, stride, centroid_tail, min_share};
    return p;
}

Output output_of(const OutArray& x) { return {x.data(), x.stride(0), x.stride(1), x.stride(2)}; }

// Lets Ctrl-C end a long call: Python's signals are looked at every few hundredths of a second.
class Signals {
   public:
    static bool pending(void* self) { return static_cast<Signals*>(self)->look(); }

   private:
    bool look() {
        const auto now = std::chrono::steady_clock::now();
        if (now < next_) return false;
        next_ = now + std::chrono::milliseconds(50);
        const nb::gil_scoped_acquire gil;
        return PyErr_CheckSignals() != 0;
    }
    std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now();
};

// The OpenMP of the process, by the entry that GCC's, LLVM's and Intel's have in common.
using OpenMP = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<OpenMP> openmp{nullptr};

bool use_openmp() {
#if defined(__linux__)
    void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    OpenMP parallel;
    std::memcpy(&parallel, &found, sizeof found);
    openmp = parallel;
#endif
    return openmp != nullptr;
}

void on_openmp(void (*body)(void*), void* data, int threads) {
    openmp.load()(body, data, static_cast<unsigned>(threads), 0);
}

// Runs without the GIL. Throws what a signal handler raised.
template <typename Call>
void solve(int num_threads, Call call) {
    Signals signals;
    const Parallel parallel = openmp != nullptr ? on_openmp : nullptr;
    const Options options = {num_threads, active_isa(), Signals::pending, &signals, parallel};
    Status status = Status::done;
    {
        const nb::gil_scoped_release release;
        status = call(options);
    }
    if (status != Status::done) throw nb::python_error();  // a mask of bytes is never bad
}

// A KeyIndex that Python threads may share, made when the first keys come.
class SharedIndex {
   public:
    SharedIndex() = default;
    explicit SharedIndex(std::unique_ptr<KeyIndex> index) : index_(std::move(index)) {}

    Status attend(const Problem& p, const Options& options, const Output& out) {
        const std::lock_guard lock(mutex_);
        if (!index_ || index_->isa() != options.isa || !index_->fits(p) || index_->length() > p.num_keys)
            index_ = std::make_unique<KeyIndex>(p, true, options.isa);
        return attention(p, options, out, index_.get());
    }
    std::unique_ptr<SharedIndex> copy() {
        const std::lock_guard lock(mutex_);
        return std::make_unique<SharedIndex>(index_ ? index_->copy() : nullptr);
    }
    void truncate(int64_t length) {
        const std::lock_guard lock(mutex_);
        if (index_) index_->truncate(length);
    }
    void reorder(const std::vector<int64_t>& from) {
        const std::lock_guard lock(mutex_);
        if (!index_) return;
        for (const int64_t i : from) {
            if (i < 0 || i >= index_->batch()) {
                index_.reset();
                return;
            }
        }
        index_->reorder(from.data(), static_cast<int64_t>(from.size()));
    }
    int64_t length() {
        const std::lock_guard lock(mutex_);
        return index_ ? index_->length() : 0;
    }
    int64_t bytes() {
        const std::lock_guard lock(mutex_);
        return index_ ? index_->bytes() : 0;
    }

   private:
    std::mutex mutex_;
    std::unique_ptr<KeyIndex> index_;
};

}  // namespace

NB_MODULE(_core, m) {
    m.doc() = "The compiled core of sparsek.";

    m.def("cpu_features", [] {
        const CpuFeatures features = detect();
        nb::dict named;
        for (const auto& [name, present] : kCpuFeatures) named[name] = features.*present;
        return named;
    });
    m.def("isa", [] { return name(active_isa()); });
    m.def("available_isas", [] {
        std::vector<std::string_view> names;
        for (const Isa isa : available_isas(detect())) names.push_back(name(isa));
        return names;
    });
    m.def("num_threads", &num_threads);
    m.def("use_openmp", &use_openmp);

    using namespace nb::literals;
    // Without the GIL: another thread may hold the index and wait for the GIL to look at signals.
    const auto no_gil = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<SharedIndex>(m, "KeyIndex")
        .def(nb::init<>())
        .def("copy", &SharedIndex::copy, no_gil)
        .def("truncate", &SharedIndex::truncate, "length"_a, no_gil)
        .def("reorder", &SharedIndex::reorder, "batch_entries"_a, no_gil)
        .def_prop_ro("length", &SharedIndex::length, no_gil)
        .def_prop_ro("nbytes", &SharedIndex::bytes, no_gil);
    m.def(
        "attention",
        [](const Array& q, const Array& k, const Array& v, const OutArray& out,
           const std::optional<Array>& mask, bool is_causal, int64_t first_position, float scale,
           float softcap, int64_t top_k, int64_t sinks, int64_t window, int64_t stride, bool centroid_tail,
           float min_share, int threads, SharedIndex* index) {
            const Problem p = problem_of(q, k, v, mask, is_causal, first_position, scale, softcap, top_k,
                                         sinks, window, stride, centroid_tail, min_share);
            solve(threads, [&](const Options& options) {
                return index ? index->attend(p, options, output_of(out))
                             : attention(p, options, output_of(out));
            });
        },
        "q"_a, "k"_a, "v"_a, "out"_a, "mask"_a.none(), "is_causal"_a, "first_position"_a, "scale"_a,
        "softcap"_a, "top_k"_a, "sinks"_a, "window"_a, "stride"_a, "centroid_tail"_a, "min_share"_a,
        "num_threads"_a, "index"_a.none());
    m.def(
        "select",
        [](const Array& q, const Array& k, const std::optional<OutArray>& indices, const OutArray& counts,
           const std::optional<Array>& mask, bool is_causal, int64_t first_position, float scale,
           float softcap, int64_t top_k, int64_t sinks, int64_t window, int64_t stride, float min_share,
           int64_t whole_queries, int threads) {
            Problem p = problem_of(q, k, std::nullopt, mask, is_causal, first_position, scale, softcap, top_k,
                                   sinks, window, stride, false, min_share);
            p.whole_queries = whole_queries;
            solve(threads, [&](const Options& options) {
                return select(p, options, indices ? static_cast<int64_t>(indices->shape(3)) : 0,
                              indices ? static_cast<int32_t*>(indices->data()) : nullptr,
                              static_cast<int32_t*>(counts.data()));
            });
        },
        "q"_a, "k"_a, "indices"_a.none(), "counts"_a, "mask"_a.none(), "is_causal"_a, "first_position"_a,
        "scale"_a, "softcap"_a, "top_k"_a, "sinks"_a, "window"_a, "stride"_a, "min_share"_a,
        "whole_queries"_a, "num_threads"_a);
}
