// What every instruction set brings for MatMulLattice.
#pragma once

#include "../codebook/weights.h"
#include "weights.h"

namespace onnxq {

struct LatticeKernels {
    // Groups of 16 output channels for some rows of x, which is rounded in blocks of 64.
    void (*integer_product)(const LatticeWeights&, const RoundedRows&, Range rows, Range groups,
                            const Output&);
};

}  // namespace onnxq
