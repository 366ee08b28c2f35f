// sparsek._core: the C++ core for Python. Types are in src/sparsek/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "sparsek/cpu.h"
#include "sparsek/threads.h"

namespace nb = nanobind;
using namespace sparsek;

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
}
