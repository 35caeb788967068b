#include "../simd/avx2.h"

#include "../hadamard/avx2.h"
#include "kernels_of.h"

namespace onnxq {

extern const Kernels avx2_kernels = kernels_of<Avx2, Avx2Walsh>("avx2");

}  // namespace onnxq
