// The instruction sets that the library may be built with, each in a file of its own.
//
// Those files are compiled for instructions that this CPU may not have. They define one constant
// each and no function that other files could be linked with: no standard containers or
// algorithms, and templates only in unnamed namespaces.
#pragma once

#include "../kernels.h"

namespace onnxq {

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avxvnni_kernels;
extern const Kernels avx512vnni_kernels;
extern const Kernels avx512vbmi_kernels;
extern const Kernels neon_kernels;
extern const Kernels neondot_kernels;

}  // namespace onnxq
