#include "../simd/portable.h"

#include "../hadamard/portable.h"
#include "kernels_of.h"

namespace onnxq {

extern const Kernels portable_kernels = kernels_of<Portable, PortableWalsh>("portable");

}  // namespace onnxq
