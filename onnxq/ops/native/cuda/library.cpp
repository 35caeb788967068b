// What the library for CUDA exports.
#include "matmul_codebook.h"

#include "../ort.h"

#ifdef _WIN32
#define ONNXQ_EXPORT extern "C" __declspec(dllexport)
#else
#define ONNXQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace onnxq {
namespace {

ort::OrtCustomOpDomain* shared_domain(const ort::OrtApi* api) {
    static ort::OrtCustomOpDomain* const domain = [api] {
        ort::OrtCustomOpDomain* made = nullptr;
        ort::check(ort::entry::CreateCustomOpDomain(api, "ai.onnxq", &made));
        ort::check(ort::entry::CustomOpDomain_Add(
            api, made, Operator<cuda::MatMulCodebook>::definition(api, "CUDAExecutionProvider")));
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
