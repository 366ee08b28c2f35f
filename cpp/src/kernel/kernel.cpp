// The kernels of one instruction set: this file is compiled once for each, with SPARSEK_KERNEL its namespace.
//
// Everything here lives in that namespace or has internal linkage: a function that the linker could share
// with code for another instruction set would crash on machines without this one.

#include "kernel/kernel.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernel/numbers.h"

#if defined(SPARSEK_SIMD_AVX512)
#include "kernel/simd_avx512.h"
#elif defined(SPARSEK_SIMD_AVX2)
#include "kernel/simd_avx2.h"
#else
#include "kernel/simd_portable.h"
#endif

// clang-format off: each builds on those before it
#include "kernel/math.h"
#include "kernel/index.h"
#include "kernel/row.h"
#include "kernel/select.h"
#include "kernel/attend.h"
#include "kernel/share.h"
#include "kernel/sparse.h"
#include "kernel/few.h"
#include "kernel/dense.h"
// clang-format on

namespace sparsek {
namespace SPARSEK_KERNEL {
namespace {

static_assert(kTileRows % kScanRows == 0 && kDenseTileRows % kDenseRows == 0);

// Calls f with a null pointer of the problem's number format.
template <typename Function>
void with_type(DType dtype, Function f) {
    if (dtype == DType::f32) f(static_cast<float*>(nullptr));
    if (dtype == DType::f16) f(static_cast<Half*>(nullptr));
    if (dtype == DType::bf16) f(static_cast<BFloat*>(nullptr));
}

size_t workspace_size(const Problem& p) {
    Arena sparse(nullptr), few(nullptr), dense(nullptr);
    SparseWork(p, sparse);
    if (p.bias.data != nullptr || p.heads / p.kv_heads * p.num_queries <= kFewRows) FewWork(p, few);
    DenseWork(p, dense);
    const size_t larger = sparse.used() > few.used() ? sparse.used() : few.used();
    return larger > dense.used() ? larger : dense.used();
}

void fit_any(const Problem& p, int64_t batch, int64_t kv_head, const HeadIndex& index, float* scratch) {
    with_type(p.dtype, [&](auto* type) {
        fit_index<std::remove_pointer_t<decltype(type)>>(p, batch, kv_head, index, scratch);
    });
}

void fill_any(const Problem& p, int64_t batch, int64_t kv_head, const HeadIndex& index, int64_t first,
              int64_t last) {
    with_type(p.dtype, [&](auto* type) {
        fill_index<std::remove_pointer_t<decltype(type)>>(p, batch, kv_head, index, first, last);
    });
}

void scan_any(const Problem& p, const HeadIndex& index, const Tile& tile, int64_t first, int64_t last,
              std::byte* workspace, int16_t* scores) {
    with_type(p.dtype, [&](auto* type) {
        scan_tile<std::remove_pointer_t<decltype(type)>>(p, index, tile, first, last, workspace, scores);
    });
}

void sparse_any(const Problem& p, const HeadIndex& index, const Tile& tile, std::byte* workspace,
                int16_t* scores, const Output& out, const SelectionOut* selection) {
    with_type(p.dtype, [&](auto* type) {
        sparse_tile<std::remove_pointer_t<decltype(type)>>(p, index, tile, workspace, scores, out, selection);
    });
}

void score_any(const Problem& p, const HeadMeans* means, int64_t batch, int64_t first, int64_t last,
               std::byte* workspace, const Scores* out) {
    with_type(p.dtype, [&](auto* type) {
        score_rows<std::remove_pointer_t<decltype(type)>>(p, means, batch, first, last, workspace, out);
    });
}

void attend_any(const Problem& p, const float* means, const Tile& tile, std::byte* workspace,
                const Scores& scored, const Output& out, const SelectionOut* selection) {
    with_type(p.dtype, [&](auto* type) {
        attend_scored<std::remove_pointer_t<decltype(type)>>(p, means, tile, workspace, scored, out,
                                                             selection);
    });
}

void dense_any(const Problem& p, const Tile& tile, std::byte* workspace, const Output& out) {
    with_type(p.dtype, [&](auto* type) {
        dense_tile<std::remove_pointer_t<decltype(type)>>(p, tile, workspace, out);
    });
}

}  // namespace

const Kernel& kernel() {
    static constexpr Kernel table = {workspace_size, fit_any,    fill_any,  scan_any, sparse_any,
                                     score_any,      attend_any, dense_any, pack_mask};
    return table;
}

}  // namespace SPARSEK_KERNEL
}  // namespace sparsek
