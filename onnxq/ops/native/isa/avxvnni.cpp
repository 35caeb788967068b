#include "../simd/avxvnni.h"

#include "../codebook/kernels_of.h"
#include "isa.h"

namespace onnxq {

extern const Kernels avxvnni_kernels{"avxvnni", codebook_kernels<AvxVnni>()};

}  // namespace onnxq
