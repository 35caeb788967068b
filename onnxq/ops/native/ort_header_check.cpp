// Compiled only where CMake finds the real header: what ort.h declares must be what it says.
#include <onnxruntime_c_api.h>

#include <cstddef>

#include "ort.h"

namespace entry = onnxq::ort::entry;

// offsetof takes a member's name and no pointer to it, hence a macro.
#define ONNXQ_SAME_PLACE(name) \
    static_assert(entry::name.place * sizeof(void*) == offsetof(::OrtApi, name))

ONNXQ_SAME_PLACE(CreateStatus);
ONNXQ_SAME_PLACE(CreateCustomOpDomain);
ONNXQ_SAME_PLACE(CustomOpDomain_Add);
ONNXQ_SAME_PLACE(AddCustomOpDomain);
ONNXQ_SAME_PLACE(GetTensorMutableData);
ONNXQ_SAME_PLACE(CreateTensorTypeAndShapeInfo);
ONNXQ_SAME_PLACE(SetTensorElementType);
ONNXQ_SAME_PLACE(SetDimensions);
ONNXQ_SAME_PLACE(GetTensorElementType);
ONNXQ_SAME_PLACE(GetDimensionsCount);
ONNXQ_SAME_PLACE(GetDimensions);
ONNXQ_SAME_PLACE(GetSymbolicDimensions);
ONNXQ_SAME_PLACE(GetTensorTypeAndShape);
ONNXQ_SAME_PLACE(KernelInfoGetAttribute_int64);
ONNXQ_SAME_PLACE(KernelContext_GetInputCount);
ONNXQ_SAME_PLACE(KernelContext_GetInput);
ONNXQ_SAME_PLACE(KernelContext_GetOutput);
ONNXQ_SAME_PLACE(ReleaseStatus);
ONNXQ_SAME_PLACE(ReleaseTensorTypeAndShapeInfo);
ONNXQ_SAME_PLACE(ReleaseCustomOpDomain);
ONNXQ_SAME_PLACE(KernelInfoGetConstantInput_tensor);
ONNXQ_SAME_PLACE(ShapeInferContext_GetInputTypeShape);
ONNXQ_SAME_PLACE(ShapeInferContext_SetOutputTypeShape);
ONNXQ_SAME_PLACE(SetSymbolicDimensions);
ONNXQ_SAME_PLACE(KernelContext_GetGPUComputeStream);
ONNXQ_SAME_PLACE(KernelContext_ParallelFor);

static_assert(sizeof(onnxq::ort::OrtCustomOp) <= sizeof(::OrtCustomOp));
static_assert(offsetof(onnxq::ort::OrtCustomOp, CreateKernelV2) ==
              offsetof(::OrtCustomOp, CreateKernelV2));
static_assert(offsetof(onnxq::ort::OrtCustomOp, InferOutputShapeFn) ==
              offsetof(::OrtCustomOp, InferOutputShapeFn));
static_assert(offsetof(onnxq::ort::OrtCustomOp, GetStartVersion) ==
              offsetof(::OrtCustomOp, GetStartVersion));

using onnxq::ort::Element;
static_assert(static_cast<int>(Element::float32) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(static_cast<int>(Element::uint8) == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
static_assert(static_cast<int>(Element::int8) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
static_assert(static_cast<int>(Element::uint16) == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16);
static_assert(static_cast<int>(Element::float16) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
