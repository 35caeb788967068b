#include "../simd/avx512vnni.h"

#include "../codebook/kernels_of.h"
#include "isa.h"

namespace onnxq {

extern const Kernels avx512vnni_kernels{"avx512vnni", codebook_kernels<Avx512Vnni>()};

}  // namespace onnxq
