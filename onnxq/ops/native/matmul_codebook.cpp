#include "matmul_codebook.h"

#include "linear_product.h"

namespace onnxq {

using ort::Element;
using ort::Shape;
using ort::Tensor;

namespace {

enum Input : std::size_t { x_input, codes_input, scales_input, codebook_input, zero_points_input,
                           bias_input };

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
    // Models give a single zero where there are none.
    return result.at(0, 0) == 0 ? Numbers{} : result;
}

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

// Codes of three bits become four, for 16 channels at a time.
void by_groups(const FloatWeights& weights, const CodebookKernels& kernels, const FloatRows& x,
               Range rows, Range groups, const Output& out) {
    Scratch scratch;
    const auto codes = scratch.reserve<std::uint8_t>(lanes * weights.units() * 16);
    scratch.allocate();
    for (std::size_t group = groups.begin; group < groups.end; group++) {
        const std::size_t first = group * lanes;
        const FloatWeights part = four_bits(weights, first, codes.get());
        const Output there{out.y + first, out.stride, out.bias ? out.bias + first : nullptr};
        kernels.float_product(part, x, rows, {0, part.channels}, there);
    }
}

void add_block_sums(const float* x, std::size_t block, std::size_t blocks, float* sums) {
    for (std::size_t b = 0; b < blocks; b++, x += block) {
        float partial[lanes] = {};
        for (std::size_t k = 0; k < block; k++) partial[k % lanes] += x[k];
        sums[b] = 0;
        for (float sum : partial) sums[b] += sum;
    }
}

void multiply(const ort::Call& call, const Linear& linear, const IntegerWeights& weights,
              const CodebookKernels& kernels) {
    multiply_rounded(call, linear, weights.block, weights.blocks, kernels,
                     [&](const RoundedRows& x, Range rows, Range groups, const Output& out) {
                         kernels.integer_product(weights, x, rows, groups, out);
                     });
}

void multiply(const ort::Call& call, const Linear& linear, const FloatWeights& weights,
              const CodebookKernels& kernels) {
    const std::size_t rows = linear.rows();
    const bool needs_sums = weights.offsets && rows <= few_rows;
    Scratch scratch;
    const auto sums = scratch.reserve<float>(needs_sums ? rows * weights.blocks : 0);
    scratch.allocate();
    const auto prepare = [&](FloatRows& x) {
        if (!needs_sums) return;
        for (std::size_t row = 0; row < rows; row++)
            add_block_sums(x.x + row * x.stride, weights.block, weights.blocks,
                           sums.get() + row * weights.blocks);
        x.sums = sums.get();
    };
    multiply_floats(call, linear, weights.columns(), prepare,
                    [&](const FloatRows& x, Range of, Range groups, const Output& out) {
                        if (weights.bits == 3)
                            return by_groups(weights, kernels, x, of, groups, out);
                        const Range channels{groups.begin * lanes,
                                             std::min(groups.end * lanes, weights.channels)};
                        kernels.float_product(weights, x, of, channels, out);
                    });
}

}  // namespace

void MatMulCodebook::infer(const ort::Inference& inference) {
    infer_linear(inference, codes_input);
}

MatMulCodebook::MatMulCodebook(const ort::NodeInfo& node, std::int64_t bits)
    : bits_(bits), kernels_(&kernels()), round_x_(false) {
    const std::int64_t accuracy_level = node.attribute("accuracy_level", 0);
    require(accuracy_level == 0 || accuracy_level == 4, "accuracy_level is ", accuracy_level,
            "; it must be 0 or 4");
    round_x_ = accuracy_level == 4;
    const Operands operands{node.constant(codes_input), node.constant(scales_input),
                            node.constant(codebook_input), node.constant(zero_points_input)};
    packed_zero_points_ = static_cast<bool>(operands.zero_points);
    if (operands.codes && operands.scales && operands.codebook) packed_ = pack(operands);
}

MatMulCodebook::Packed MatMulCodebook::pack(const Operands& operands) const {
    const CodebookMatrix matrix =
        matrix_of(operands.codes, operands.scales, operands.codebook, operands.zero_points, bits_);
    Packed packed{matrix.channels, matrix.block, matrix.blocks, {}, {}};
    if (round_x_ && operands.codebook.type == Element::int8)
        packed.integers.emplace(matrix);
    else
        packed.floats.emplace(matrix);
    return packed;
}

void MatMulCodebook::compute(const ort::Call& call) const {
    std::optional<Packed> of_this_call;
    const Tensor zero_points = call.input(zero_points_input);
    if (!packed_ || (zero_points && !packed_zero_points_))
        of_this_call = pack({call.input(codes_input), call.input(scales_input),
                             call.input(codebook_input), zero_points});
    const Packed& packed = of_this_call ? *of_this_call : *packed_;

    const Tensor x = call.input(x_input);
    require(x.shape.rank > 0, "x is a scalar; it must have columns");
    const auto columns = static_cast<std::size_t>(x.shape.last());
    require(columns > 0 && (columns + packed.block - 1) / packed.block == packed.blocks,
            "x has shape ", x.shape, ", but codes has ", packed.blocks, " blocks of ",
            packed.block);
    const Linear linear(call, x, call.input(bias_input), columns, packed.channels);
    if (linear.rows() == 0 || linear.channels() == 0) return;
    if (packed.integers)
        multiply(call, linear, packed.integers->weights(), kernels_->codebook);
    else
        multiply(call, linear, packed.floats->weights(), kernels_->codebook);
}

}  // namespace onnxq
