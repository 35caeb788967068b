// The two functions that the library exports.
//
// A model may hold functions of this domain too, also of these operators' names: onnxruntime 1.31
// takes the kernel where one is registered, and the model's function where none is.
#include "hadamard_transform.h"
#include "kernels.h"
#include "matmul_codebook.h"
#include "matmul_lattice.h"
#include "operator.h"
#include "ort.h"

#ifdef _WIN32
#define ONNXQ_EXPORT extern "C" __declspec(dllexport)
#else
#define ONNXQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace onnxq {
namespace {

// Every operator of the domain that has a kernel for CPUs.
template <class... Kernels>
void add_operators(const ort::OrtApi* api, ort::OrtCustomOpDomain* domain) {
    (ort::check(
         ort::entry::CustomOpDomain_Add(api, domain, Operator<Kernels>::definition(api))),
     ...);
}

// Sessions refer to the domain as long as they live, and all can share it.
ort::OrtCustomOpDomain* shared_domain(const ort::OrtApi* api) {
    static ort::OrtCustomOpDomain* const domain = [api] {
        ort::OrtCustomOpDomain* made = nullptr;
        ort::check(ort::entry::CreateCustomOpDomain(api, "ai.onnxq", &made));
        add_operators<MatMulCodebook, MatMul3, MatMulLattice, HadamardTransform>(api, made);
        return made;
    }();
    return domain;
}

}  // namespace
}  // namespace onnxq

ONNXQ_EXPORT onnxq::ort::OrtStatus* RegisterCustomOps(onnxq::ort::OrtSessionOptions* options,
                                                      const onnxq::ort::OrtApiBase* base) {
    using namespace onnxq::ort;
    const OrtApi* api = base->GetApi(api_version);
    if (!api) return nullptr;  // an older runtime: nothing to make a status with
    return guarded(api, [&] {
        check(entry::AddCustomOpDomain(api, options, onnxq::shared_domain(api)));
    });
}

ONNXQ_EXPORT const char* onnxq_ops_build() { return onnxq::build_description(); }
