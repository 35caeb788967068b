// All kernels of one instruction set, from its vectors `Simd` and its registers for walsh.h.
#pragma once

#include "../codebook/kernels_of.h"
#include "../lattice/integer_product.h"
#include "isa.h"

namespace onnxq {
namespace {

template <class Simd, class Registers>
constexpr Kernels kernels_of(const char* isa) {
    return {isa, codebook_kernels<Simd>(), lattice_kernels<Simd>(), walsh<Registers>};
}

}  // namespace
}  // namespace onnxq
