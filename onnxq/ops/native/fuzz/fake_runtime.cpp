#include "fake_runtime.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../ort.h"

extern "C" onnxq::ort::OrtStatus* RegisterCustomOps(onnxq::ort::OrtSessionOptions*,
                                                    const onnxq::ort::OrtApiBase*);

// The runtime's own types, which the operators only hand around.
struct onnxq::ort::OrtStatus {
    std::string message;
};
struct onnxq::ort::OrtCustomOpDomain {
    std::map<std::string, const OrtCustomOp*> ops;
};
struct onnxq::ort::OrtSessionOptions {
    const OrtCustomOpDomain* domain = nullptr;
};
struct onnxq::ort::OrtTensorTypeAndShapeInfo {
    int type = 0;
    std::vector<std::int64_t> shape;
    std::vector<std::string> names;
};
struct onnxq::ort::OrtValue {
    fake::Tensor* tensor;
};
struct onnxq::ort::OrtKernelInfo {
    const fake::Node* node;
    mutable std::vector<OrtValue> values;
};
struct onnxq::ort::OrtKernelContext {
    const fake::Node* node;
    mutable std::vector<OrtValue> values;
    std::shared_ptr<fake::Tensor> y;
    OrtValue y_value{nullptr};
};
struct onnxq::ort::OrtShapeInferContext {
    std::vector<OrtTensorTypeAndShapeInfo> inputs;
    OrtTensorTypeAndShapeInfo y;
};

namespace onnxq::fake {
namespace {

using namespace ort;
using Info = OrtTensorTypeAndShapeInfo;

std::size_t size_of(int type) {
    switch (type) {
        case 1: case 6: case 12: return 4;    // float32, int32, uint32
        case 7: case 11: case 13: return 8;   // int64, double, uint64
        case 4: case 5: case 10: case 16: return 2;
        default: return 1;
    }
}

OrtStatus* refuse(const char* message) { return new OrtStatus{message}; }

struct Table {
    const void* entries[400] = {};

    template <std::size_t place, class Result, class... Arguments, class Body>
    void set(const Entry<place, Result(Arguments...)>&, Body body) {
        Result (*function)(Arguments...) = body;
        entries[place] = reinterpret_cast<const void*>(function);
    }

    Table() {
        using namespace entry;
        set(CreateStatus, [](int, const char* text) { return new OrtStatus{text}; });
        set(ReleaseStatus, [](OrtStatus* status) { delete status; });
        add_registration();
        add_tensors();
        add_shapes();
        add_kernels();
    }

    void add_registration();
    void add_tensors();
    void add_shapes();
    void add_kernels();
};

void Table::add_registration() {
    using namespace entry;
    set(CreateCustomOpDomain, [](const char*, OrtCustomOpDomain** made) -> OrtStatus* {
        *made = new OrtCustomOpDomain;
        return nullptr;
    });
    set(CustomOpDomain_Add, [](OrtCustomOpDomain* domain, const OrtCustomOp* op) -> OrtStatus* {
        domain->ops[op->GetName(op)] = op;
        return nullptr;
    });
    set(AddCustomOpDomain, [](OrtSessionOptions* options, OrtCustomOpDomain* domain) {
        options->domain = domain;
        return static_cast<OrtStatus*>(nullptr);
    });
}

void Table::add_tensors() {
    using namespace entry;
    set(GetTensorMutableData, [](const OrtValue* value, void** data) -> OrtStatus* {
        *data = value->tensor->memory.get();
        return nullptr;
    });
    set(GetTensorTypeAndShape, [](const OrtValue* value, Info** info) -> OrtStatus* {
        *info = new Info{value->tensor->type, value->tensor->shape, {}};
        return nullptr;
    });
    set(ReleaseTensorTypeAndShapeInfo, [](Info* info) { delete info; });
    set(GetTensorElementType, [](const Info* info, int* type) -> OrtStatus* {
        *type = info->type;
        return nullptr;
    });
    set(GetDimensionsCount, [](const Info* info, std::size_t* rank) -> OrtStatus* {
        *rank = info->shape.size();
        return nullptr;
    });
    set(GetDimensions, [](const Info* info, std::int64_t* to, std::size_t n) -> OrtStatus* {
        std::copy_n(info->shape.begin(), std::min(n, info->shape.size()), to);
        return nullptr;
    });
}

void Table::add_shapes() {
    using namespace entry;
    set(CreateTensorTypeAndShapeInfo, [](Info** made) -> OrtStatus* {
        *made = new Info;
        return nullptr;
    });
    set(SetTensorElementType, [](Info* info, int type) -> OrtStatus* {
        info->type = type;
        return nullptr;
    });
    set(SetDimensions, [](Info* info, const std::int64_t* from, std::size_t n) -> OrtStatus* {
        info->shape.assign(from, from + n);
        return nullptr;
    });
    set(GetSymbolicDimensions, [](const Info* info, const char** to, std::size_t n) {
        for (std::size_t i = 0; i < n; i++)
            to[i] = i < info->names.size() ? info->names[i].c_str() : "";
        return static_cast<OrtStatus*>(nullptr);
    });
    set(SetSymbolicDimensions, [](Info* info, const char** names, std::size_t n) {
        info->names.assign(names, names + n);
        return static_cast<OrtStatus*>(nullptr);
    });
    set(ShapeInferContext_GetInputTypeShape,
             [](const OrtShapeInferContext* context, std::size_t index, Info** info) -> OrtStatus* {
                 if (index >= context->inputs.size()) return refuse("no such input");
                 *info = const_cast<Info*>(&context->inputs[index]);
                 return nullptr;
             });
    set(ShapeInferContext_SetOutputTypeShape,
             [](const OrtShapeInferContext* context, std::size_t, const Info* y) -> OrtStatus* {
                 const_cast<OrtShapeInferContext*>(context)->y = *y;
                 return nullptr;
             });
}

void Table::add_kernels() {
    using namespace entry;
    set(KernelInfoGetAttribute_int64,
            [](const OrtKernelInfo* info, const char* name, std::int64_t* value) -> OrtStatus* {
                const auto found = info->node->attributes.find(name);
                if (found == info->node->attributes.end()) return refuse("no such attribute");
                *value = found->second;
                return nullptr;
            });
    set(KernelInfoGetConstantInput_tensor,
             [](const OrtKernelInfo* info, std::size_t index, int* constant,
                const OrtValue** value) -> OrtStatus* {
                 const auto& inputs = info->node->inputs;
                 if (index >= inputs.size()) return refuse("no such input");
                 *constant = inputs[index].constant && inputs[index].tensor;
                 if (*constant) *value = &info->values[index];
                 return nullptr;
             });
    set(KernelContext_GetInputCount, [](const OrtKernelContext* context, std::size_t* count) {
        *count = context->values.size();
        return static_cast<OrtStatus*>(nullptr);
    });
    set(KernelContext_GetInput,
            [](const OrtKernelContext* context, std::size_t index,
               const OrtValue** value) -> OrtStatus* {
                if (index >= context->values.size()) return refuse("no such input");
                *value = context->values[index].tensor ? &context->values[index] : nullptr;
                return nullptr;
            });
    set(KernelContext_GetOutput,
            [](OrtKernelContext* context, std::size_t, const std::int64_t* shape, std::size_t rank,
               OrtValue** value) -> OrtStatus* {
                context->y = std::make_shared<Tensor>(
                    context->node->inputs[0].tensor->type,
                    std::vector<std::int64_t>(shape, shape + rank));
                // Not a number, in float32 and in float16: what is left unwritten shows.
                std::memset(context->y->memory.get(), 0xff, context->y->bytes);
                context->y_value.tensor = context->y.get();
                *value = &context->y_value;
                return nullptr;
            });
    // Last to first: nothing may rest on an order.
    set(KernelContext_ParallelFor,
             [](const OrtKernelContext*, Task task, std::size_t total, std::size_t, void* state) {
                 for (std::size_t index = total; index-- > 0;) task(state, index);
                 return static_cast<OrtStatus*>(nullptr);
             });
}

const OrtApi* api(std::uint32_t) {
    static const Table table;
    return reinterpret_cast<const OrtApi*>(table.entries);
}

const OrtCustomOpDomain& domain() {
    static const OrtCustomOpDomain* const registered = [] {
        static const OrtApiBase base{api, [] { return "fake"; }};
        OrtSessionOptions options;
        if (RegisterCustomOps(&options, &base)) throw std::runtime_error("no registration");
        return options.domain;
    }();
    return *registered;
}

std::vector<OrtValue> values_of(const Node& node) {
    std::vector<OrtValue> values;
    for (const Input& input : node.inputs) values.push_back({input.tensor.get()});
    return values;
}

std::string taken(OrtStatus* status) {
    const std::string message = status->message;
    delete status;
    return message.empty() ? "a status without a message" : message;
}

OrtStatus* infer(const OrtCustomOp& op, const Node& node, OrtShapeInferContext& context) {
    for (const Input& input : node.inputs)
        context.inputs.push_back(input.tensor ? Info{input.tensor->type, input.tensor->shape, {}}
                                              : Info{});
    return op.InferOutputShapeFn(&op, &context);
}

struct Kernel {
    const OrtCustomOp& op;
    void* made = nullptr;

    ~Kernel() {
        if (made) op.KernelDestroy(made);
    }
};

}  // namespace

Tensor::Tensor(int element_type, std::vector<std::int64_t> of_shape)
    : type(element_type), shape(std::move(of_shape)) {
    bytes = static_cast<std::size_t>(elements()) * size_of(type);
    memory.reset(new std::byte[bytes]);
}

std::int64_t Tensor::elements() const {
    std::int64_t product = 1;
    for (const std::int64_t size : shape) product *= size;
    return product;
}

Outcome run(const Node& node) {
    const OrtCustomOp& op = *domain().ops.at(node.op);
    OrtShapeInferContext inferred;
    OrtStatus* status = infer(op, node, inferred);
    if (status) return {taken(status), nullptr};
    const OrtKernelInfo info{&node, values_of(node)};
    Kernel kernel{op};
    status = op.CreateKernelV2(&op, api(0), &info, &kernel.made);
    if (status) return {taken(status), nullptr};
    OrtKernelContext context{&node, values_of(node), nullptr};
    for (int call = 0; call < 2; call++)
        if ((status = op.KernelComputeV2(kernel.made, &context))) return {taken(status), nullptr};
    if (context.y->shape != inferred.y.shape)
        throw std::runtime_error("another shape than inferred");
    return {"", context.y};
}

}  // namespace onnxq::fake
