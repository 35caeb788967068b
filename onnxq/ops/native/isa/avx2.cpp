#include "../simd/avx2.h"

#include "../codebook/kernels_of.h"
#include "isa.h"

namespace onnxq {

extern const Kernels avx2_kernels{"avx2", codebook_kernels<Avx2>()};

}  // namespace onnxq
