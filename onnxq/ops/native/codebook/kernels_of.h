// The kernels of MatMulCodebook for one instruction set.
#pragma once

#include "float_product.h"
#include "integer_product.h"
#include "kernels.h"
#include "round_rows.h"

namespace onnxq {
namespace {

template <class Simd>
constexpr CodebookKernels codebook_kernels() {
    return {round_rows<Simd>, integer_product<Simd>, float_product<Simd>};
}

}  // namespace
}  // namespace onnxq
