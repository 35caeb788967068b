// An operator from a class that says what it is called, what it takes and what it does.
//
//     struct Twice {
//         static constexpr const char* name = "Twice";
//         static constexpr Presence inputs[] = {Presence::required};
//         static void infer(const ort::Inference&);      // type and shape of the output
//         explicit Twice(const ort::NodeInfo&);          // at the session's creation
//         void compute(const ort::Call&);                // one call, with one output
//     };
//
// Constructor, infer and compute may throw: the runtime gets a status.
#pragma once

#include <iterator>
#include <memory>

#include "ort.h"

namespace onnxq {

enum class Presence { required = 0, optional = 1 };  // OrtCustomOpInputOutputCharacteristic

template <class Kernel>
class Operator {
  public:
    // The runtime keeps the pointer as long as the session lives.
    static const ort::OrtCustomOp* definition(const ort::OrtApi* api,
                                              const char* provider = "CPUExecutionProvider") {
        static Operator instance(api, provider);
        return &instance.op_;
    }

  private:
    using Op = ort::OrtCustomOp;

    // The runtime calls back with a pointer to op_, its first member.
    Op op_{};
    const ort::OrtApi* api_;
    const char* provider_;

    struct Made {
        const ort::OrtApi* api;
        Kernel kernel;
    };

    Operator(const ort::OrtApi* api, const char* provider) : api_(api), provider_(provider) {
        op_.version = ort::api_version;
        op_.GetName = [](const Op*) { return Kernel::name; };
        op_.GetExecutionProviderType = [](const Op* op) {
            return reinterpret_cast<const Operator*>(op)->provider_;
        };
        // Any type: kernels check them, with messages that say more than the runtime's would.
        op_.GetInputType = [](const Op*, std::size_t) { return undefined; };
        op_.GetInputTypeCount = [](const Op*) { return std::size(Kernel::inputs); };
        op_.GetOutputType = [](const Op*, std::size_t) { return undefined; };
        op_.GetOutputTypeCount = [](const Op*) { return std::size_t{1}; };
        op_.GetInputCharacteristic = [](const Op*, std::size_t index) {
            return static_cast<int>(Kernel::inputs[index]);
        };
        op_.GetOutputCharacteristic = [](const Op*, std::size_t) { return 0; };
        op_.GetInputMemoryType = [](const Op*, std::size_t) { return 0; };
        op_.GetVariadicInputMinArity = op_.GetVariadicInputHomogeneity = [](const Op*) {
            return 0;
        };
        op_.GetVariadicOutputMinArity = op_.GetVariadicOutputHomogeneity = [](const Op*) {
            return 0;
        };
        op_.GetStartVersion = [](const Op*) { return 1; };
        op_.GetEndVersion = [](const Op*) { return 1; };
        op_.CreateKernelV2 = [](const Op*, const ort::OrtApi* given, const ort::OrtKernelInfo* info,
                                void** kernel) {
            return ort::guarded(given, [&] {
                *kernel = new Made{given, Kernel(ort::NodeInfo(given, info))};
            });
        };
        op_.KernelComputeV2 = [](void* kernel, ort::OrtKernelContext* context) {
            auto* made = static_cast<Made*>(kernel);
            return ort::guarded(made->api,
                                [&] { made->kernel.compute(ort::Call(made->api, context)); });
        };
        op_.KernelDestroy = [](void* kernel) { delete static_cast<Made*>(kernel); };
        op_.InferOutputShapeFn = [](const Op* op, ort::OrtShapeInferContext* context) {
            const ort::OrtApi* given = reinterpret_cast<const Operator*>(op)->api_;
            return ort::guarded(given, [&] { Kernel::infer(ort::Inference(given, context)); });
        };
    }

    static constexpr int undefined = static_cast<int>(ort::Element::undefined);
};

}  // namespace onnxq
