#include "../simd/neondot.h"

#include "../codebook/kernels_of.h"
#include "isa.h"

namespace onnxq {

extern const Kernels neondot_kernels{"neondot", codebook_kernels<NeonDot>()};

}  // namespace onnxq
