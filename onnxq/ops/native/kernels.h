// The kernels of one instruction set, and which set this process uses.
#pragma once

#include "codebook/kernels.h"
#include "hadamard/kernels.h"
#include "lattice/kernels.h"

namespace onnxq {

struct Kernels {
    const char* isa;  // as ONNXQ_OPS_ISA names it
    CodebookKernels codebook;
    LatticeKernels lattice;
    Walsh walsh;
};

// Of the sets built into the library that this CPU and its system can run, the best; or the one
// that the environment variable ONNXQ_OPS_ISA names. Throws Error where that can not be.
const Kernels& kernels();

// {"version": 1, "compiler": "...", "built": ["portable", ...], "used": "..."}
const char* build_description();

}  // namespace onnxq
