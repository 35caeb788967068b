#include "operands.h"

#include "../error.h"
#include "../linear.h"

namespace onnxq {

using ort::Element;
using ort::Shape;
using ort::Tensor;

namespace {

Numbers numbers(const Tensor& tensor) {
    Numbers result;
    result.data = tensor.data;
    result.type = tensor.type == Element::float32   ? Numbers::Type::float32
                  : tensor.type == Element::float16 ? Numbers::Type::float16
                                                    : Numbers::Type::int8;
    return result;
}

Numbers scales_of(const Tensor& scales, std::int64_t channels, std::int64_t blocks) {
    Linear::check_float("scales", scales);
    require(scales.shape == Shape{channels, blocks}, "scales has shape ", scales.shape,
            "; codes ask for ", Shape{channels, blocks});
    Numbers result = numbers(scales);
    result.per_channel = static_cast<std::size_t>(blocks);
    result.per_block = 1;
    return result;
}

Numbers codebook_of(const Tensor& codebook, std::int64_t channels, std::int64_t blocks,
                    std::int64_t size) {
    const Shape& shape = codebook.shape;
    require(codebook.type == Element::int8 || codebook.type == Element::float32, "codebook is ",
            name(codebook.type), "; it must be int8 or float32");
    require(shape.rank == 3 && (shape[0] == 1 || shape[0] == channels) &&
                (shape[1] == 1 || shape[1] == blocks) && shape[2] == size,
            "codebook has shape ", shape, "; it must be [1 or ", channels, ", 1 or ", blocks,
            ", ", size, "]");
    Numbers result = numbers(codebook);
    if (shape[1] > 1) result.per_block = static_cast<std::size_t>(size);
    if (shape[0] > 1) result.per_channel = static_cast<std::size_t>(shape[1] * size);
    return result;
}

Numbers zero_points_of(const Tensor& zero_points, const Tensor& scales, std::int64_t channels,
                       std::int64_t blocks) {
    if (!zero_points) return {};
    require(zero_points.type == Element::int8 || zero_points.type == scales.type,
            "zero_points is ", name(zero_points.type), "; it must be int8 or ", name(scales.type),
            " as scales");
    Numbers result = numbers(zero_points);
    if (zero_points.shape == Shape{channels, blocks}) {
        result.per_channel = static_cast<std::size_t>(blocks);
        result.per_block = 1;
        return result;
    }
    require(zero_points.shape == Shape{1, 1}, "zero_points has shape ", zero_points.shape,
            "; it must be ", Shape{channels, blocks}, " or [1, 1]");
    return result;
}

}  // namespace

CodebookMatrix matrix_of(const Tensor& codes, const Tensor& scales, const Tensor& codebook,
                         const Tensor& zero_points, std::int64_t bits) {
    require(codes.type == Element::uint8, "codes is ", name(codes.type), "; it must be uint8");
    require(codes.shape.rank == 3, "codes has shape ", codes.shape,
            "; it must be [channels, blocks, ", bits, " · block / 8]");
    const std::int64_t channels = codes.shape[0], blocks = codes.shape[1];
    const std::int64_t bytes = codes.shape[2], block = bytes <= 128 ? 8 * bytes / bits : 0;
    require(block >= 16 && block <= 256 && block % 16 == 0 && bytes * 8 == block * bits,
            "codes has shape ", codes.shape,
            ", blocks of ", bytes, " bytes; they must hold a multiple of 16 codes from 16 to 256");
    require(blocks > 0, "codes has shape ", codes.shape, ", without a block");
    CodebookMatrix matrix;
    matrix.channels = static_cast<std::size_t>(channels);
    matrix.blocks = static_cast<std::size_t>(blocks);
    matrix.block = static_cast<std::size_t>(block);
    matrix.bits = static_cast<std::size_t>(bits);
    matrix.codes = codes.as<std::uint8_t>();
    matrix.scales = scales_of(scales, channels, blocks);
    matrix.codebook = codebook_of(codebook, channels, blocks, std::int64_t{1} << bits);
    matrix.zero_points = zero_points_of(zero_points, scales, channels, blocks);
    return matrix;
}

}  // namespace onnxq
