#include "../simd/portable.h"

#include "../codebook/kernels_of.h"
#include "isa.h"

namespace onnxq {

extern const Kernels portable_kernels{"portable", codebook_kernels<Portable>()};

}  // namespace onnxq
