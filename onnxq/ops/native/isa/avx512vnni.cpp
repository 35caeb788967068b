#include "../simd/avx512vnni.h"

#include "../codebook/kernels_of.h"
#include "../hadamard/avx512.h"
#include "../lattice/integer_product.h"
#include "isa.h"

namespace onnxq {

extern const Kernels avx512vnni_kernels{"avx512vnni", codebook_kernels<Avx512Vnni>(),
                                        lattice_kernels<Avx512Vnni>(), walsh<Avx512Walsh>};

}  // namespace onnxq
