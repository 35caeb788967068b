#include "ort.h"

#include <exception>
#include <ostream>

#include "error.h"

namespace onnxq::ort {

namespace {
constexpr int invalid_argument = 2, runtime_exception = 6;  // OrtErrorCode

struct OwnedInfo {
    const OrtApi* api;
    OrtTensorTypeAndShapeInfo* info = nullptr;

    explicit OwnedInfo(const OrtApi* given) : api(given) {}
    OwnedInfo(const OwnedInfo&) = delete;
    OwnedInfo& operator=(const OwnedInfo&) = delete;
    ~OwnedInfo() {
        if (info) entry::ReleaseTensorTypeAndShapeInfo(api, info);
    }
};

void read_type_and_shape(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info, Element& type,
                         Shape& shape) {
    int element = 0;
    check(entry::GetTensorElementType(api, info, &element));
    check(entry::GetDimensionsCount(api, info, &shape.rank));
    require(shape.rank <= Shape::most_dimensions, "a tensor has ", shape.rank,
            " dimensions; at most ", Shape::most_dimensions, " are supported");
    check(entry::GetDimensions(api, info, shape.dimensions.data(), shape.rank));
    type = static_cast<Element>(element);
}
}  // namespace

OrtStatus* status_of_current_exception(const OrtApi* api) noexcept {
    try {
        throw;
    } catch (const Refusal& refusal) {
        return refusal.status;
    } catch (const Error& error) {
        return entry::CreateStatus(api, invalid_argument, error.what());
    } catch (const std::exception& error) {
        return entry::CreateStatus(api, runtime_exception, error.what());
    } catch (...) {
        return entry::CreateStatus(api, runtime_exception, "an unknown error");
    }
}

const char* name(Element type) {
    switch (type) {
        case Element::float32: return "float32";
        case Element::uint8: return "uint8";
        case Element::int8: return "int8";
        case Element::uint16: return "uint16";
        case Element::float16: return "float16";
        default: return "another type";
    }
}

Shape::Shape(std::initializer_list<std::int64_t> sizes) {
    for (std::int64_t size : sizes) dimensions[rank++] = size;
}

std::int64_t Shape::elements() const {
    std::int64_t product = 1;
    for (std::size_t axis = 0; axis < rank; axis++) product *= dimensions[axis];
    return product;
}

bool Shape::operator==(const Shape& other) const {
    if (rank != other.rank) return false;
    for (std::size_t axis = 0; axis < rank; axis++)
        if (dimensions[axis] != other.dimensions[axis]) return false;
    return true;
}

std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
    stream << '[';
    for (std::size_t axis = 0; axis < shape.rank; axis++)
        stream << (axis ? ", " : "") << shape[axis];
    return stream << ']';
}

Tensor read(const OrtApi* api, const OrtValue* value) {
    Tensor tensor;
    if (!value) return tensor;
    OwnedInfo owned(api);
    check(entry::GetTensorTypeAndShape(api, value, &owned.info));
    read_type_and_shape(api, owned.info, tensor.type, tensor.shape);
    void* data = nullptr;
    check(entry::GetTensorMutableData(api, value, &data));
    tensor.data = data;
    return tensor;
}

std::int64_t NodeInfo::attribute(const char* name, std::int64_t otherwise) const {
    std::int64_t value = 0;
    if (OrtStatus* absent = entry::KernelInfoGetAttribute_int64(api_, info_, name, &value)) {
        entry::ReleaseStatus(api_, absent);
        return otherwise;
    }
    return value;
}

Tensor NodeInfo::constant(std::size_t input) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    OrtStatus* absent =
        entry::KernelInfoGetConstantInput_tensor(api_, info_, input, &is_constant, &value);
    if (absent) {  // an optional input that the node does not have
        entry::ReleaseStatus(api_, absent);
        return {};
    }
    return is_constant ? read(api_, value) : Tensor{};
}

Tensor Call::input(std::size_t index) const {
    std::size_t count = 0;
    check(entry::KernelContext_GetInputCount(api_, context_, &count));
    if (index >= count) return {};
    const OrtValue* value = nullptr;
    check(entry::KernelContext_GetInput(api_, context_, index, &value));
    return read(api_, value);
}

void* Call::output(std::size_t index, const Shape& shape) const {
    OrtValue* value = nullptr;
    check(entry::KernelContext_GetOutput(api_, context_, index, shape.dimensions.data(),
                                         shape.rank, &value));
    void* data = nullptr;
    check(entry::GetTensorMutableData(api_, value, &data));
    return data;
}

void* Call::gpu_stream() const {
    void* stream = nullptr;
    check(entry::KernelContext_GetGPUComputeStream(api_, context_, &stream));
    return stream;
}

SymbolicShape Inference::input(std::size_t index) const {
    SymbolicShape known;
    OrtTensorTypeAndShapeInfo* info = nullptr;  // stays the context's
    check(entry::ShapeInferContext_GetInputTypeShape(api_, context_, index, &info));
    read_type_and_shape(api_, info, known.type, known.shape);
    check(entry::GetSymbolicDimensions(api_, info, known.names.data(), known.shape.rank));
    return known;
}

void Inference::output(std::size_t index, const SymbolicShape& known) const {
    if (known.shape.rank == 0) return;
    OwnedInfo owned(api_);
    check(entry::CreateTensorTypeAndShapeInfo(api_, &owned.info));
    check(entry::SetTensorElementType(api_, owned.info, static_cast<int>(known.type)));
    check(entry::SetDimensions(api_, owned.info, known.shape.dimensions.data(), known.shape.rank));
    auto names = known.names;
    for (auto& name : names)
        if (!name) name = "";
    check(entry::SetSymbolicDimensions(api_, owned.info, names.data(), known.shape.rank));
    check(entry::ShapeInferContext_SetOutputTypeShape(api_, context_, index, owned.info));
}

}  // namespace onnxq::ort
