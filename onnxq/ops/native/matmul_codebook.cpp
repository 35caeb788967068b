#include "matmul_codebook.h"

#include "linear.h"

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

Numbers codebook_of(const Tensor& codebook, std::int64_t channels, std::int64_t blocks) {
    const Shape& shape = codebook.shape;
    require(codebook.type == Element::int8 || codebook.type == Element::float32, "codebook is ",
            name(codebook.type), "; it must be int8 or float32");
    require(shape.rank == 3 && (shape[0] == 1 || shape[0] == channels) &&
                (shape[1] == 1 || shape[1] == blocks) && shape[2] == 16,
            "codebook has shape ", shape, "; it must be [1 or ", channels, ", 1 or ", blocks,
            ", 16]");
    Numbers result = numbers(codebook);
    if (shape[1] > 1) result.per_block = 16;
    if (shape[0] > 1) result.per_channel = static_cast<std::size_t>(shape[1]) * 16;
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
                         const Tensor& zero_points) {
    require(codes.type == Element::uint8, "codes is ", name(codes.type), "; it must be uint8");
    require(codes.shape.rank == 3, "codes has shape ", codes.shape,
            "; it must be [channels, blocks, block / 2]");
    const std::int64_t channels = codes.shape[0], blocks = codes.shape[1];
    const std::int64_t block = 2 * codes.shape[2];
    require(block >= 16 && block <= 256 && block % 16 == 0, "codes has shape ", codes.shape,
            ", blocks of ", block, "; they must be multiples of 16 from 16 to 256");
    require(blocks > 0, "codes has shape ", codes.shape, ", without a block");
    CodebookMatrix matrix;
    matrix.channels = static_cast<std::size_t>(channels);
    matrix.blocks = static_cast<std::size_t>(blocks);
    matrix.block = static_cast<std::size_t>(block);
    matrix.codes = codes.as<std::uint8_t>();
    matrix.scales = scales_of(scales, channels, blocks);
    matrix.codebook = codebook_of(codebook, channels, blocks);
    matrix.zero_points = zero_points_of(zero_points, scales, channels, blocks);
    return matrix;
}

void add_block_sums(const float* x, std::size_t block, std::size_t blocks, float* sums) {
    for (std::size_t b = 0; b < blocks; b++, x += block) {
        float partial[lanes] = {};
        for (std::size_t k = 0; k < block; k++) partial[k % lanes] += x[k];
        sums[b] = 0;
        for (float sum : partial) sums[b] += sum;
    }
}

// Room for y in floats where y is not of floats, and for the bias where it has to be spread.
struct FloatOutput {
    const Linear& linear;
    Scratch::Part<float> y, bias;

    FloatOutput(const Linear& of, Scratch& scratch)
        : linear(of),
          y(scratch.reserve<float>(of.is_half() ? of.rows() * of.channels() : 0)),
          bias(scratch.reserve<float>(of.bias_needs_copy() ? of.channels() : 0)) {}

    Output get() const {
        return {linear.is_half() ? y.get() : linear.float_y(), linear.channels(),
                linear.bias(bias.get())};
    }
};

void multiply(const ort::Call& call, const Linear& linear, const IntegerWeights& weights,
              const CodebookKernels& kernels) {
    const std::size_t rows = linear.rows(), columns = weights.blocks * weights.block;
    Scratch scratch;
    FloatOutput output(linear, scratch);
    const auto codes = scratch.reserve<std::int8_t>(rows * columns);
    const auto scales = scratch.reserve<float>(rows * weights.blocks);
    const auto sums = scratch.reserve<std::int32_t>(rows * weights.blocks);
    const auto floats = scratch.reserve<float>(linear.is_half() ? rows * linear.columns() : 0);
    scratch.allocate();

    const RoundedRows x{weights.block, weights.blocks, codes.get(), scales.get(), sums.get()};
    const auto round = [&](Range of) {
        if (linear.is_half())
            for (std::size_t row = of.begin; row < of.end; row++)
                linear.copy_row(row, floats.get() + row * linear.columns(), linear.columns());
        kernels.round_rows(linear.is_half() ? floats.get() : linear.float_x(), linear.columns(),
                           of, x);
    };
    constexpr std::size_t rows_at_once = 16;
    if (rows <= rows_at_once)
        round({0, rows});
    else
        call.parallel((rows + rows_at_once - 1) / rows_at_once, [&](std::size_t i) {
            round({i * rows_at_once, std::min(rows, (i + 1) * rows_at_once)});
        });

    const Output out = output.get();
    const Pieces pieces(rows, weights.groups(), columns * lanes);
    call.parallel(pieces.count(), [&](std::size_t i) {
        const Range of_rows{pieces.row_begin(i), pieces.row_end(i)};
        const Range groups{pieces.group_begin(i), pieces.group_end(i)};
        kernels.integer_product(weights, x, of_rows, groups, out);
        if (linear.is_half())
            linear.store_half(out.y, of_rows.begin, of_rows.end, groups.begin * lanes,
                              std::min(groups.end * lanes, linear.channels()));
    });
}

void multiply(const ort::Call& call, const Linear& linear, const FloatWeights& weights,
              const CodebookKernels& kernels) {
    const std::size_t rows = linear.rows(), columns = weights.columns();
    const bool as_it_is = !linear.is_half() && columns == linear.columns();
    const bool needs_sums = weights.offsets && rows <= few_rows;
    Scratch scratch;
    FloatOutput output(linear, scratch);
    const auto padded = scratch.reserve<float>(as_it_is ? 0 : rows * columns);
    const auto sums = scratch.reserve<float>(needs_sums ? rows * weights.blocks : 0);
    scratch.allocate();

    if (!as_it_is)
        for (std::size_t row = 0; row < rows; row++)
            linear.copy_row(row, padded.get() + row * columns, columns);
    const FloatRows x{as_it_is ? linear.float_x() : padded.get(), columns,
                      needs_sums ? sums.get() : nullptr};
    for (std::size_t row = 0; needs_sums && row < rows; row++)
        add_block_sums(x.x + row * columns, weights.block, weights.blocks,
                       sums.get() + row * weights.blocks);

    const Output out = output.get();
    const Pieces pieces(rows, (weights.channels + lanes - 1) / lanes, columns * lanes);
    call.parallel(pieces.count(), [&](std::size_t i) {
        const Range of_rows{pieces.row_begin(i), pieces.row_end(i)};
        const Range channels{pieces.group_begin(i) * lanes,
                             std::min(pieces.group_end(i) * lanes, weights.channels)};
        kernels.float_product(weights, x, of_rows, channels, out);
        if (linear.is_half())
            linear.store_half(out.y, of_rows.begin, of_rows.end, channels.begin, channels.end);
    });
}

}  // namespace

void MatMulCodebook::infer(const ort::Inference& inference) {
    infer_linear(inference, codes_input);
}

MatMulCodebook::MatMulCodebook(const ort::NodeInfo& node)
    : kernels_(&kernels()), round_x_(false) {
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
        matrix_of(operands.codes, operands.scales, operands.codebook, operands.zero_points);
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
