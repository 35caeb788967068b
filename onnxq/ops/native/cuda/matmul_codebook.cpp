#include "matmul_codebook.h"

#include "../codebook/operands.h"
#include "../linear.h"
#include "codebook.h"

namespace onnxq::cuda {

using ort::Element;
using ort::Tensor;

namespace {

enum Input : std::size_t { x_input, codes_input, scales_input, codebook_input, zero_points_input,
                           bias_input };

Numbers on_device(const onnxq::Numbers& numbers) {
    using Type = onnxq::Numbers::Type;
    Numbers result;
    result.data = numbers.data;
    result.type = numbers.type == Type::float16 ? Number::float16
                  : numbers.type == Type::int8  ? Number::int8
                                                : Number::float32;
    result.per_channel = static_cast<std::int64_t>(numbers.per_channel);
    result.per_block = static_cast<std::int64_t>(numbers.per_block);
    return result;
}

}  // namespace

void MatMulCodebook::infer(const ort::Inference& inference) {
    infer_linear(inference, codes_input);
}

void MatMulCodebook::compute(const ort::Call& call) const {
    const Tensor x = call.input(x_input), bias = call.input(bias_input);
    const CodebookMatrix w = matrix_of(call.input(codes_input), call.input(scales_input),
                                       call.input(codebook_input), call.input(zero_points_input),
                                       4);
    require(x.shape.rank > 0, "x is a scalar; it must have columns");
    const auto columns = static_cast<std::size_t>(x.shape.last());
    require(columns > 0 && (columns + w.block - 1) / w.block == w.blocks, "x has shape ", x.shape,
            ", but codes has ", w.blocks, " blocks of ", w.block);
    const Linear linear(call, x, bias, columns, w.channels);  // checks x and bias, and makes y

    Product product;
    product.type = linear.is_half() ? Number::float16 : Number::float32;
    product.x = x.data;
    product.y = linear.y();
    product.rows = static_cast<std::int64_t>(linear.rows());
    product.inputs = static_cast<std::int64_t>(columns);
    product.channels = static_cast<std::int64_t>(w.channels);
    product.block = static_cast<std::int64_t>(w.block);
    product.codes = w.codes;
    product.scales = on_device(w.scales);
    product.codebook = on_device(w.codebook);
    product.zero_points = on_device(w.zero_points);
    product.bias = {bias.data, product.type, bias && bias.shape[0] > 1 ? 1 : 0, 0};
    const auto stream = static_cast<cudaStream_t>(call.gpu_stream());
    const cudaError_t error = multiply(product, stream);
    require(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

}  // namespace onnxq::cuda
