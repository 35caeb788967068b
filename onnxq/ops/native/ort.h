// The part of ONNX Runtime's C API that the operators use.
//
// The runtime's wheels bring no C header. Its API is a table of function pointers that only ever
// grows, so the entries that are needed are declared by their place in it. Where CMake finds
// onnxruntime_c_api.h, ort_header_check.cpp compares every place with it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iosfwd>

namespace onnxq::ort {

// Under the names that they have in the real header, but in this namespace, so that one file can
// include both.
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

struct OrtApi;  // the table

struct OrtApiBase {
    const OrtApi* (*GetApi)(std::uint32_t version);
    const char* (*GetVersionString)();
};

struct OrtCustomOp {
    std::uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    int (*GetInputType)(const OrtCustomOp*, std::size_t);
    std::size_t (*GetInputTypeCount)(const OrtCustomOp*);
    int (*GetOutputType)(const OrtCustomOp*, std::size_t);
    std::size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void*, OrtKernelContext*);
    void (*KernelDestroy)(void*);
    int (*GetInputCharacteristic)(const OrtCustomOp*, std::size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp*, std::size_t);
    int (*GetInputMemoryType)(const OrtCustomOp*, std::size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
    OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
    std::size_t (*GetMayInplace)(int**, int**);
    void (*ReleaseMayInplace)(int*, int*);
    std::size_t (*GetAliasMap)(int**, int**);
    void (*ReleaseAliasMap)(int*, int*);
};
static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 208);
static_assert(sizeof(void*) != 8 || offsetof(OrtCustomOp, GetStartVersion) == 160);

inline constexpr std::uint32_t api_version = 18;  // onnxruntime 1.18, the first with all we use

// One entry of the table: its place and its type.
template <std::size_t place, class Type>
struct Entry;

template <std::size_t place_, class Result, class... Arguments>
struct Entry<place_, Result(Arguments...)> {
    static constexpr std::size_t place = place_;

    Result operator()(const OrtApi* api, Arguments... arguments) const {
        using Function = Result (*)(Arguments...);
        return reinterpret_cast<const Function*>(api)[place](arguments...);
    }
};

namespace entry {
using Info = OrtTensorTypeAndShapeInfo;
using Task = void (*)(void* state, std::size_t index);

inline constexpr Entry<0, OrtStatus*(int, const char*)> CreateStatus;
inline constexpr Entry<26, OrtStatus*(const char*, OrtCustomOpDomain**)> CreateCustomOpDomain;
inline constexpr Entry<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)> CustomOpDomain_Add;
inline constexpr Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain;
inline constexpr Entry<51, OrtStatus*(const OrtValue*, void**)> GetTensorMutableData;
inline constexpr Entry<57, OrtStatus*(Info**)> CreateTensorTypeAndShapeInfo;
inline constexpr Entry<58, OrtStatus*(Info*, int)> SetTensorElementType;
inline constexpr Entry<59, OrtStatus*(Info*, const std::int64_t*, std::size_t)> SetDimensions;
inline constexpr Entry<60, OrtStatus*(const Info*, int*)> GetTensorElementType;
inline constexpr Entry<61, OrtStatus*(const Info*, std::size_t*)> GetDimensionsCount;
inline constexpr Entry<62, OrtStatus*(const Info*, std::int64_t*, std::size_t)> GetDimensions;
inline constexpr Entry<63, OrtStatus*(const Info*, const char**, std::size_t)>
    GetSymbolicDimensions;
inline constexpr Entry<65, OrtStatus*(const OrtValue*, Info**)> GetTensorTypeAndShape;
inline constexpr Entry<86, OrtStatus*(const OrtKernelInfo*, const char*, std::int64_t*)>
    KernelInfoGetAttribute_int64;
inline constexpr Entry<88, OrtStatus*(const OrtKernelContext*, std::size_t*)>
    KernelContext_GetInputCount;
inline constexpr Entry<90, OrtStatus*(const OrtKernelContext*, std::size_t, const OrtValue**)>
    KernelContext_GetInput;
inline constexpr Entry<91, OrtStatus*(OrtKernelContext*, std::size_t, const std::int64_t*,
                                      std::size_t, OrtValue**)>
    KernelContext_GetOutput;
inline constexpr Entry<93, void(OrtStatus*)> ReleaseStatus;
inline constexpr Entry<99, void(Info*)> ReleaseTensorTypeAndShapeInfo;
inline constexpr Entry<101, void(OrtCustomOpDomain*)> ReleaseCustomOpDomain;
inline constexpr Entry<193, OrtStatus*(const OrtKernelContext*, void**)>
    KernelContext_GetGPUComputeStream;
inline constexpr Entry<
    249, OrtStatus*(const OrtKernelInfo*, std::size_t, int* is_constant, const OrtValue**)>
    KernelInfoGetConstantInput_tensor;
inline constexpr Entry<268, OrtStatus*(const OrtShapeInferContext*, std::size_t, Info**)>
    ShapeInferContext_GetInputTypeShape;
inline constexpr Entry<270, OrtStatus*(const OrtShapeInferContext*, std::size_t, const Info*)>
    ShapeInferContext_SetOutputTypeShape;
inline constexpr Entry<271, OrtStatus*(Info*, const char**, std::size_t)> SetSymbolicDimensions;
inline constexpr Entry<274, OrtStatus*(const OrtKernelContext*, Task, std::size_t total,
                                       std::size_t batches, void* state)>
    KernelContext_ParallelFor;
}  // namespace entry

// The runtime's own refusal, passed on as it is.
struct Refusal {
    OrtStatus* status;
};

inline void check(OrtStatus* status) {
    if (status) throw Refusal{status};
}

// The runtime's status of whatever `body` throws; null where it throws nothing.
template <class Body>
OrtStatus* guarded(const OrtApi* api, Body&& body) noexcept;

enum class Element { undefined = 0, float32 = 1, uint8 = 2, int8 = 3, uint16 = 4, float16 = 10 };

const char* name(Element);

struct Shape {
    static constexpr std::size_t most_dimensions = 16;

    std::array<std::int64_t, most_dimensions> dimensions{};
    std::size_t rank = 0;

    Shape() = default;
    Shape(std::initializer_list<std::int64_t> sizes);

    std::int64_t operator[](std::size_t axis) const { return dimensions[axis]; }
    std::int64_t& operator[](std::size_t axis) { return dimensions[axis]; }
    std::int64_t last() const { return dimensions[rank - 1]; }
    std::int64_t elements() const;
    bool operator==(const Shape& other) const;
};

std::ostream& operator<<(std::ostream&, const Shape&);  // as [2, 3]

// A tensor of the runtime's; `data` is null for an optional input that is not given.
struct Tensor {
    Element type = Element::undefined;
    Shape shape;
    const void* data = nullptr;

    explicit operator bool() const { return data != nullptr || type != Element::undefined; }
    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

Tensor read(const OrtApi*, const OrtValue*);

// What is known of a node when its kernel is made.
class NodeInfo {
  public:
    NodeInfo(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

    std::int64_t attribute(const char* name, std::int64_t otherwise) const;
    // An initializer; no tensor where the input is computed or missing.
    Tensor constant(std::size_t input) const;
    const OrtApi* api() const { return api_; }

  private:
    const OrtApi* api_;
    const OrtKernelInfo* info_;
};

// One call of a kernel.
class Call {
  public:
    Call(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {}

    Tensor input(std::size_t index) const;
    void* output(std::size_t index, const Shape& shape) const;
    void* gpu_stream() const;  // a cudaStream_t

    // body(index) for every index below total, on the runtime's threads. body must not throw.
    template <class Body>
    void parallel(std::size_t total, const Body& body) const {
        if (total <= 1) {
            if (total) body(0);
            return;
        }
        auto task = [](void* state, std::size_t index) {
            (*static_cast<const Body*>(state))(index);
        };
        // As many batches as tasks: a thread that is late leaves the rest to the others.
        check(entry::KernelContext_ParallelFor(api_, context_, task, total, total,
                                               const_cast<Body*>(&body)));
    }

  private:
    const OrtApi* api_;
    OrtKernelContext* context_;
};

// Types and shapes of a node before it runs; unknown sizes are -1, perhaps with a name.
struct SymbolicShape {
    Element type = Element::undefined;
    Shape shape;
    std::array<const char*, Shape::most_dimensions> names{};
};

class Inference {
  public:
    Inference(const OrtApi* api, OrtShapeInferContext* context) : api_(api), context_(context) {}

    SymbolicShape input(std::size_t index) const;
    // Nothing is said of the output where the rank is 0, which is how the runtime says unknown.
    void output(std::size_t index, const SymbolicShape&) const;

  private:
    const OrtApi* api_;
    OrtShapeInferContext* context_;
};

OrtStatus* status_of_current_exception(const OrtApi*) noexcept;

template <class Body>
OrtStatus* guarded(const OrtApi* api, Body&& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (...) {
        return status_of_current_exception(api);
    }
}

}  // namespace onnxq::ort
