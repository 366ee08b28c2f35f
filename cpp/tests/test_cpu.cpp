#include "check.h"
#include "sparsek/cpu.h"

using namespace sparsek;

namespace {

CpuFeatures with_avx2() {
    CpuFeatures f;
    f.avx2 = f.fma = f.f16c = true;
    return f;
}

CpuFeatures with_avx512() {
    CpuFeatures f = with_avx2();
    f.avx512f = f.avx512bw = f.avx512vl = f.avx512_vnni = true;
    return f;
}

void the_fastest_is_chosen() {
    CHECK(choose_isa("", CpuFeatures{}) == Isa::portable);
    CHECK(choose_isa("", with_avx2()) == Isa::avx2);
    CHECK(choose_isa("", with_avx512()) == Isa::avx512_vnni);
}

void one_missing_feature_rules_a_set_out() {
    CpuFeatures f = with_avx512();
    f.avx512vl = false;
    CHECK(choose_isa("", f) == Isa::avx2);
    f.f16c = false;
    CHECK(choose_isa("", f) == Isa::portable);
}

void every_available_set_can_be_forced() {
    const CpuFeatures f = with_avx512();
    CHECK(available_isas(f).size() == 3);
    for (const Isa isa : available_isas(f)) CHECK(choose_isa(std::string(name(isa)), f) == isa);
}

void the_message_quotes_the_value_and_lists_the_choice() {
    const std::string expected = "SPARSEK_ISA = 'avx512_vnni': this machine can run 'portable', 'avx2'";
    CHECK(message_of([] { choose_isa("avx512_vnni", with_avx2()); }) == expected);
    const std::string unknown = "SPARSEK_ISA = 'AVX2': this machine can run 'portable'";
    CHECK(message_of([] { choose_isa("AVX2", CpuFeatures{}); }) == unknown);
}

void this_machine_runs_what_it_has() {
    const std::vector<Isa> available = available_isas(detect());
    CHECK(available.front() == Isa::portable);
    CHECK(choose_isa("", detect()) == available.back());
}

}  // namespace

int main() {
    the_fastest_is_chosen();
    one_missing_feature_rules_a_set_out();
    every_available_set_can_be_forced();
    the_message_quotes_the_value_and_lists_the_choice();
    this_machine_runs_what_it_has();
    return failures;
}
