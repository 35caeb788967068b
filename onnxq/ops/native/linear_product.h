// y = x Wᵀ + bias in parts that every operator of that form shares: rows of x rounded or padded,
// pieces of work, and y in its own type.
#pragma once

#include "codebook/kernels.h"
#include "linear.h"

namespace onnxq {

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

// Calls product(rows, groups, output) for pieces of all rows and groups of 16 output channels.
template <class Product>
void multiply_in_pieces(const ort::Call& call, const Linear& linear, std::size_t columns,
                        const Output& out, const Product& product) {
    const std::size_t groups = (linear.channels() + lanes - 1) / lanes;
    const Pieces pieces(linear.rows(), groups, columns * lanes);
    call.parallel(pieces.count(), [&](std::size_t i) {
        const Range rows{pieces.row_begin(i), pieces.row_end(i)};
        const Range of_groups{pieces.group_begin(i), pieces.group_end(i)};
        product(rows, of_groups, out);
        if (linear.is_half())
            linear.store_half(out.y, rows.begin, rows.end, of_groups.begin * lanes,
                              std::min(of_groups.end * lanes, linear.channels()));
    });
}

// product(x, rows, groups, output) with x in 8 bits.
template <class Product>
void multiply_rounded(const ort::Call& call, const Linear& linear, std::size_t block,
                      std::size_t blocks, const CodebookKernels& kernels, const Product& product) {
    const std::size_t rows = linear.rows(), columns = blocks * block;
    Scratch scratch;
    FloatOutput output(linear, scratch);
    const auto codes = scratch.reserve<std::int8_t>(rows * columns);
    const auto scales = scratch.reserve<float>(rows * blocks);
    const auto sums = scratch.reserve<std::int32_t>(rows * blocks);
    const auto floats = scratch.reserve<float>(linear.is_half() ? rows * linear.columns() : 0);
    scratch.allocate();

    const RoundedRows x{block, blocks, codes.get(), scales.get(), sums.get()};
    const auto round = [&](Range of) {
        if (linear.is_half())
            for (std::size_t row = of.begin; row < of.end; row++)
                linear.copy_row(row, floats.get() + row * linear.columns(), linear.columns());
        kernels.round_rows(linear.is_half() ? floats.get() : linear.float_x(), linear.columns(),
                           of, x);
    };
    constexpr std::size_t rows_at_once = 16;
    call.parallel((rows + rows_at_once - 1) / rows_at_once, [&](std::size_t i) {
        round({i * rows_at_once, std::min(rows, (i + 1) * rows_at_once)});
    });
    multiply_in_pieces(call, linear, columns, output.get(), [&](Range of, Range groups,
                                                                const Output& out) {
        product(x, of, groups, out);
    });
}

// product(x, rows, groups, output) with x in floats, padded with zeros to `columns`, after
// prepare(x).
template <class Prepare, class Product>
void multiply_floats(const ort::Call& call, const Linear& linear, std::size_t columns,
                     const Prepare& prepare, const Product& product) {
    const bool as_it_is = !linear.is_half() && columns == linear.columns();
    Scratch scratch;
    FloatOutput output(linear, scratch);
    const auto padded = scratch.reserve<float>(as_it_is ? 0 : linear.rows() * columns);
    scratch.allocate();
    if (!as_it_is)
        for (std::size_t row = 0; row < linear.rows(); row++)
            linear.copy_row(row, padded.get() + row * columns, columns);
    FloatRows x{as_it_is ? linear.float_x() : padded.get(), columns, nullptr};
    prepare(x);
    multiply_in_pieces(call, linear, columns, output.get(), [&](Range of, Range groups,
                                                                const Output& out) {
        product(x, of, groups, out);
    });
}

}  // namespace onnxq
