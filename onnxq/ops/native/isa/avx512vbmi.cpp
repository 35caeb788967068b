#include "../simd/avx512vnni.h"

#include "../hadamard/avx512.h"
#include "../lattice/avx512vbmi.h"
#include "kernels_of.h"

namespace onnxq {

extern const Kernels avx512vbmi_kernels{"avx512vbmi", codebook_kernels<Avx512Vnni>(),
                                        {avx512vbmi_lattice_product}, walsh<Avx512Walsh>};

}  // namespace onnxq
