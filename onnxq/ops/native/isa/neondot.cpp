#include "../simd/neondot.h"

#include "../hadamard/neon.h"
#include "kernels_of.h"

namespace onnxq {

extern const Kernels neondot_kernels = kernels_of<NeonDot, NeonWalsh>("neondot");

}  // namespace onnxq
