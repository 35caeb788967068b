#include "../simd/portable.h"

#include "../codebook/kernels_of.h"
#include "../hadamard/portable.h"
#include "../lattice/integer_product.h"
#include "isa.h"

namespace onnxq {

extern const Kernels portable_kernels{"portable", codebook_kernels<Portable>(),
                                      lattice_kernels<Portable>(), walsh<PortableWalsh>};

}  // namespace onnxq
