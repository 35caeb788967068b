#include "../simd/neon.h"

#include "../codebook/kernels_of.h"
#include "isa.h"

namespace onnxq {

extern const Kernels neon_kernels{"neon", codebook_kernels<Neon>()};

}  // namespace onnxq
