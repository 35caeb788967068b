#include "../simd/avxvnni.h"

#include "../hadamard/avx2.h"
#include "kernels_of.h"

namespace onnxq {

extern const Kernels avxvnni_kernels = kernels_of<AvxVnni, Avx2Walsh>("avxvnni");

}  // namespace onnxq
