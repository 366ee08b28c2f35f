// Detection follows Intel's SDM (volume 1, chapters 14 and 15) and Linux' hwcaps for Arm.
#include "sparsek/cpu.h"

#include <cstdint>
#include <stdexcept>

#include "environment.h"

#if defined(__x86_64__) || defined(_M_X64)
#define SPARSEK_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace sparsek {
namespace {

#if defined(SPARSEK_X86)

struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero for a leaf that the processor does not have.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r;
#if defined(_MSC_VER)
    int regs[4];
    __cpuid(regs, 0);
    if (static_cast<std::uint32_t>(regs[0]) < leaf) return r;
    __cpuidex(regs, static_cast<int>(leaf), static_cast<int>(subleaf));
    r.eax = static_cast<std::uint32_t>(regs[0]);
    r.ebx = static_cast<std::uint32_t>(regs[1]);
    r.ecx = static_cast<std::uint32_t>(regs[2]);
    r.edx = static_cast<std::uint32_t>(regs[3]);
#else
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

// The register files that the operating system saves. Only valid with OSXSAVE.
std::uint64_t xcr0() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (std::uint64_t{high} << 32) | low;
#endif
}

constexpr bool bit(std::uint32_t word, int n) { return ((word >> n) & 1) != 0; }

#endif

#if defined(__aarch64__) && defined(__linux__)
// From <asm/hwcap.h>, spelled out because older headers lack the newer one.
constexpr unsigned long kHwcapDotProd = 1UL << 20;
constexpr unsigned long kHwcap2I8mm = 1UL << 13;
#endif

bool runs(Isa isa, const CpuFeatures& f) {
    switch (isa) {
        case Isa::portable: return true;
        case Isa::avx2: return f.avx2 && f.fma && f.f16c;
        case Isa::avx512_vnni:
            return runs(Isa::avx2, f) && f.avx512f && f.avx512bw && f.avx512vl && f.avx512_vnni;
    }
    return false;
}

}  // namespace

CpuFeatures detect() {
    CpuFeatures f;
#if defined(SPARSEK_X86)
    const Registers base = cpuid(1, 0);
    const std::uint64_t saved = bit(base.ecx, 27) ? xcr0() : 0;
    const auto os_saves = [saved](std::uint64_t state) { return (saved & state) == state; };
    const Registers leaf7 = cpuid(7, 0);
    const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};

    if (os_saves(0x6)) {  // xmm, ymm
        f.avx2 = bit(leaf7.ebx, 5);
        f.fma = bit(base.ecx, 12);
        f.f16c = bit(base.ecx, 29);
        f.avx_vnni = bit(leaf7_1.eax, 4);
    }
    if (os_saves(0xe6)) {  // and the mask registers and both halves of zmm
        f.avx512f = bit(leaf7.ebx, 16);
        f.avx512bw = bit(leaf7.ebx, 30);
        f.avx512vl = bit(leaf7.ebx, 31);
        f.avx512_vnni = bit(leaf7.ecx, 11);
        f.avx512_bf16 = bit(leaf7_1.eax, 5);
    }
    if (os_saves(0x60000)) f.amx_int8 = bit(leaf7.edx, 25);  // tile configuration and data
#elif defined(__aarch64__) || defined(_M_ARM64)
    f.neon = true;  // part of every 64-bit Arm
#if defined(__linux__)
    f.dotprod = (getauxval(AT_HWCAP) & kHwcapDotProd) != 0;
    f.i8mm = (getauxval(AT_HWCAP2) & kHwcap2I8mm) != 0;
#endif
#endif
    return f;
}

std::string_view name(Isa isa) {
    switch (isa) {
        case Isa::portable: return "portable";
        case Isa::avx2: return "avx2";
        case Isa::avx512_vnni: return "avx512_vnni";
    }
    return "";
}

std::vector<Isa> available_isas(const CpuFeatures& features) {
    std::vector<Isa> found;
    for (const Isa isa : kIsas) {
        if (runs(isa, features)) found.push_back(isa);
    }
    return found;
}

Isa choose_isa(const std::string& text, const CpuFeatures& features) {
    const std::vector<Isa> available = available_isas(features);
    if (text.empty()) return available.back();
    std::string names;
    for (const Isa isa : available) {
        if (name(isa) == text) return isa;
        names.append(names.empty() ? "'" : ", '").append(name(isa)).append("'");
    }
    throw std::invalid_argument("SPARSEK_ISA = '" + text + "': this machine can run " + names);
}

Isa active_isa() {
    static const CpuFeatures features = detect();
    return choose_isa(environment("SPARSEK_ISA"), features);
}

}  // namespace sparsek
