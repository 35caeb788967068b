// y = x Wᵀ in float32 with levels as they are, for any instruction set `Simd`.
//
// Few rows of x are dot products for each output channel, with levels looked up on the way. For
// more rows, weights of 16 channels are made floats once and multiplied with all rows.
#pragma once

#include "weights.h"

namespace onnxq {
namespace {

// Sums of one block, for some rows of x and output channels: one unit of codes after another.
template <class Simd, int rows, int channels>
struct BlockSums {
    typename Simd::Floats sums[rows][channels];
    typename Simd::FloatTable tables[channels];
    const float* x;
    std::size_t stride;
    const std::uint8_t* codes;
    std::size_t code_bytes;

    // Columns k to k + 15 and k + 16 to k + 31 of the unit that begins at k, or one of both.
    template <bool low, bool high>
    void add_unit(std::size_t k) {
        for (int n = 0; n < channels; n++) {
            const auto unit = Simd::load_unit(codes + n * code_bytes + k / 2);
            if constexpr (low) add(n, Simd::lookup_low(tables[n], unit), k);
            if constexpr (high) add(n, Simd::lookup_high(tables[n], unit), k + 16);
        }
    }

  private:
    void add(int n, typename Simd::Floats level, std::size_t k) {
        for (int m = 0; m < rows; m++)
            sums[m][n] = Simd::fma(level, Simd::load(x + m * stride + k), sums[m][n]);
    }
};

// A few rows of x for some output channels:
//
//     y[n] = Σ_b scales[n,b] · Σ_k level · x[k] − Σ_b offsets[n,b] · Σ_k x[k].
template <class Simd, int rows, int channels>
void float_dots(const FloatWeights& weights, const FloatRows& x, std::size_t row,
                std::size_t channel, const Output& out) {
    const std::size_t code_bytes = weights.units() * 16;
    typename Simd::Floats totals[rows][channels];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < channels; n++) totals[m][n] = Simd::splat(0.0f);
    for (std::size_t b = 0; b < weights.blocks; b++) {
        BlockSums<Simd, rows, channels> block;
        block.x = x.x + row * x.stride;
        block.stride = x.stride;
        block.codes = weights.codes + channel * code_bytes;
        block.code_bytes = code_bytes;
        for (int n = 0; n < channels; n++) {
            for (int m = 0; m < rows; m++) block.sums[m][n] = Simd::splat(0.0f);
            block.tables[n] = Simd::float_table(weights.table(channel + n, b));
        }
        std::size_t k = b * weights.block;
        const std::size_t end = k + weights.block;
        if (k % 32) {  // the block begins in the middle of a unit
            block.template add_unit<false, true>(k - 16);
            k += 16;
        }
        for (; k + 32 <= end; k += 32) block.template add_unit<true, true>(k);
        if (k < end) block.template add_unit<true, false>(k);  // and ends in the middle of one
        for (int n = 0; n < channels; n++) {
            const auto scale = Simd::splat(weights.scales[(channel + n) * weights.blocks + b]);
            for (int m = 0; m < rows; m++)
                totals[m][n] = Simd::fma(block.sums[m][n], scale, totals[m][n]);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < channels; n++) {
            float y = Simd::sum_of(totals[m][n]);
            if (weights.offsets) {
                const float* offsets = weights.offsets + (channel + n) * weights.blocks;
                const float* sums = x.sums + (row + m) * weights.blocks;
                for (std::size_t b = 0; b < weights.blocks; b++) y -= offsets[b] * sums[b];
            }
            out.y[(row + m) * out.stride + channel + n] =
                y + (out.bias ? out.bias[channel + n] : 0.0f);
        }
}

template <class Simd, int rows, int channels>
void float_dots_of_channels(const FloatWeights& weights, const FloatRows& x, std::size_t row,
                            Range of, const Output& out) {
    for (; of.size() >= channels; of.begin += channels)
        float_dots<Simd, rows, channels>(weights, x, row, of.begin, out);
    for (; of.size(); of.begin++) float_dots<Simd, rows, 1>(weights, x, row, of.begin, out);
}

// One row is bound by reading codes and takes more channels at a time; up to four rows share
// each level that is looked up.
template <class Simd, int rows>
void float_few_rows(const FloatWeights& weights, const FloatRows& x, Range of, Range channels,
                    const Output& out) {
    for (; of.size() >= rows; of.begin += rows)
        float_dots_of_channels<Simd, rows, rows == 1 ? 4 : 2>(weights, x, of.begin, channels, out);
    if constexpr (rows > 1)
        if (of.size()) float_few_rows<Simd, rows - 1>(weights, x, of, channels, out);
}

// W of one output channel, columns [begin, end), both multiples of 32.
template <class Simd>
void floats_of_channel(const FloatWeights& weights, std::size_t channel, Range columns,
                       float* to) {
    const std::uint8_t* codes = weights.codes + channel * weights.units() * 16;
    std::size_t b = columns.begin / weights.block, k = columns.begin;
    for (; k < columns.end && b < weights.blocks; b++) {
        const std::size_t end_of_block = (b + 1) * weights.block;
        const std::size_t end = end_of_block < columns.end ? end_of_block : columns.end;
        const std::size_t at = channel * weights.blocks + b;
        const auto table = Simd::float_table(weights.table(channel, b));
        const auto scale = Simd::splat(weights.scales[at]);
        const auto offset = Simd::splat(weights.offsets ? -weights.offsets[at] : 0.0f);
        for (; k < end; k += 16, to += 16) {
            const auto unit = Simd::load_unit(codes + k / 32 * 16);
            const auto level =
                k % 32 ? Simd::lookup_high(table, unit) : Simd::lookup_low(table, unit);
            Simd::store(to, Simd::fma(level, scale, offset));
        }
    }
    for (; k < columns.end; k += 16, to += 16)  // past the last block, where x is zero
        Simd::store(to, Simd::splat(0.0f));
}

inline constexpr std::size_t float_panel_columns = 1024;  // times 16 channels: 64 KiB

// `rows` rows of x times `channels` rows of the panel.
template <class Simd, int rows, int channels>
void float_tile(const float* x, std::size_t stride, const float* panel, std::size_t columns,
                bool first, const float* bias, float* y, std::size_t y_stride) {
    typename Simd::Floats sums[rows][channels];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < channels; n++) sums[m][n] = Simd::splat(0.0f);
    for (std::size_t k = 0; k < columns; k += lanes) {
        typename Simd::Floats w[channels];
        for (int n = 0; n < channels; n++)
            w[n] = Simd::load(panel + n * float_panel_columns + k);
        for (int m = 0; m < rows; m++) {
            const auto value = Simd::load(x + m * stride + k);
            for (int n = 0; n < channels; n++) sums[m][n] = Simd::fma(value, w[n], sums[m][n]);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < channels; n++) {
            float& to = y[m * y_stride + n];
            const float before = !first ? to : bias ? bias[n] : 0.0f;
            to = before + Simd::sum_of(sums[m][n]);
        }
}

template <class Simd, int rows, int channels>
void float_tiles(const float* x, std::size_t stride, std::size_t row_count, const float* panel,
                 std::size_t channel_count, std::size_t columns, bool first, const float* bias,
                 float* y, std::size_t y_stride) {
    for (; row_count >= rows; row_count -= rows, x += rows * stride, y += rows * y_stride) {
        std::size_t n = 0;
        for (; n + channels <= channel_count; n += channels)
            float_tile<Simd, rows, channels>(x, stride, panel + n * float_panel_columns, columns,
                                             first, bias ? bias + n : nullptr, y + n, y_stride);
        for (; n < channel_count; n++)
            float_tile<Simd, rows, 1>(x, stride, panel + n * float_panel_columns, columns, first,
                                      bias ? bias + n : nullptr, y + n, y_stride);
    }
    if constexpr (rows > 1)
        if (row_count)
            float_tiles<Simd, rows - 1, channels>(x, stride, row_count, panel, channel_count,
                                                  columns, first, bias, y, y_stride);
}

template <class Simd>
void float_rows(const FloatWeights& weights, const FloatRows& x, Range rows, Range channels,
                const Output& out) {
    alignas(64) float panel[lanes * float_panel_columns];
    for (std::size_t k = 0; k < weights.columns(); k += float_panel_columns) {
        const std::size_t left = weights.columns() - k;
        const std::size_t columns = left < float_panel_columns ? left : float_panel_columns;
        for (std::size_t n = 0; n < channels.size(); n++)
            floats_of_channel<Simd>(weights, channels.begin + n, {k, k + columns},
                                    panel + n * float_panel_columns);
        float_tiles<Simd, Simd::float_rows, Simd::float_channels>(
            x.x + rows.begin * x.stride + k, x.stride, rows.size(), panel, channels.size(), columns,
            k == 0, out.bias ? out.bias + channels.begin : nullptr,
            out.y + rows.begin * out.stride + channels.begin, out.stride);
    }
}

template <class Simd>
void float_product(const FloatWeights& weights, const FloatRows& x, Range rows, Range channels,
                   const Output& out) {
    for (std::size_t n = channels.begin; n < channels.end; n += lanes) {
        const Range some{n, n + lanes < channels.end ? n + lanes : channels.end};
        if (rows.size() <= few_rows && (x.sums || !weights.offsets))
            float_few_rows<Simd, 4>(weights, x, rows, some, out);
        else
            float_rows<Simd>(weights, x, rows, some, out);
    }
}

}  // namespace
}  // namespace onnxq
