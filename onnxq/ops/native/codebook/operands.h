// The operands of MatMulCodebook and MatMul3, checked: shapes and types, not what they hold.
#pragma once

#include "../ort.h"
#include "pack.h"

namespace onnxq {

// Throws Error where the operands do not fit each other; `bits` of a code are 3 or 4.
CodebookMatrix matrix_of(const ort::Tensor& codes, const ort::Tensor& scales,
                         const ort::Tensor& codebook, const ort::Tensor& zero_points,
                         std::int64_t bits);

}  // namespace onnxq
