#include "../simd/neon.h"

#include "../hadamard/neon.h"
#include "kernels_of.h"

namespace onnxq {

extern const Kernels neon_kernels = kernels_of<Neon, NeonWalsh>("neon");

}  // namespace onnxq
