// What every instruction set brings for MatMulCodebook.
#pragma once

#include "weights.h"

namespace onnxq {

struct CodebookKernels {
    // Rows of x (rows, k) in 8 bits: codes, scales and sums of `to`.
    void (*round_rows)(const float* x, std::size_t k, Range rows, const RoundedRows& to);
    // Groups of 16 output channels for some rows of x.
    void (*integer_product)(const IntegerWeights&, const RoundedRows&, Range rows, Range groups,
                            const Output&);
    // Output channels for some rows of x.
    void (*float_product)(const FloatWeights&, const FloatRows&, Range rows, Range channels,
                          const Output&);
};

}  // namespace onnxq
