// What this processor can run, and which instruction set the kernels use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace sparsek {

// A feature counts as present only where the operating system also saves its registers.
struct CpuFeatures {
    bool avx2 = false;
    bool fma = false;
    bool f16c = false;
    bool avx_vnni = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512vl = false;
    bool avx512_vnni = false;
    bool avx512_bf16 = false;
    bool amx_int8 = false;  // on Linux a process must also ask for it: arch_prctl(ARCH_REQ_XCOMP_PERM)
    bool neon = false;
    bool dotprod = false;
    bool i8mm = false;
};

struct NamedFeature {
    const char* name;
    bool CpuFeatures::* present;
};

// Named as in the flags of /proc/cpuinfo on x86.
inline constexpr NamedFeature kCpuFeatures[] = {
    {"avx2", &CpuFeatures::avx2},
    {"fma", &CpuFeatures::fma},
    {"f16c", &CpuFeatures::f16c},
    {"avx_vnni", &CpuFeatures::avx_vnni},
    {"avx512f", &CpuFeatures::avx512f},
    {"avx512bw", &CpuFeatures::avx512bw},
    {"avx512vl", &CpuFeatures::avx512vl},
    {"avx512_vnni", &CpuFeatures::avx512_vnni},
    {"avx512_bf16", &CpuFeatures::avx512_bf16},
    {"amx_int8", &CpuFeatures::amx_int8},
    {"neon", &CpuFeatures::neon},
    {"dotprod", &CpuFeatures::dotprod},
    {"i8mm", &CpuFeatures::i8mm},
};

CpuFeatures detect();

// The instruction sets that kernels are compiled for, from the slowest to the fastest.
enum class Isa { portable, avx2, avx512_vnni };

inline constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512_vnni};

std::string_view name(Isa isa);

// Those that run on a processor with these features, from the slowest to the fastest; never empty.
std::vector<Isa> available_isas(const CpuFeatures& features);

// The one called `text`, or the fastest when `text` is empty.
// Throws std::invalid_argument when these features do not run it, or there is no such set.
Isa choose_isa(const std::string& text, const CpuFeatures& features);

// The one to use on this machine: the fastest, or what SPARSEK_ISA says. The environment is read at every
// call, so that one process can try each in turn. Throws as choose_isa does.
Isa active_isa();

}  // namespace sparsek
