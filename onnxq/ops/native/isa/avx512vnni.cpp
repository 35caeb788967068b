#include "../simd/avx512vnni.h"

#include "../hadamard/avx512.h"
#include "kernels_of.h"

namespace onnxq {

extern const Kernels avx512vnni_kernels = kernels_of<Avx512Vnni, Avx512Walsh>("avx512vnni");

}  // namespace onnxq
