// y = x Wᵀ in float32 with levels as they are, for any instruction set `Simd`.
//
// One row of x is a dot product for each output channel, with levels looked up on the way, and is
// bound by how fast codes are read. For more rows, weights of 16 channels are made floats once and
// multiplied with all rows.
#pragma once

#include "weights.h"

namespace onnxq {
namespace {

// One row of x for `count` output channels:
//
//     y[n] = Σ_b scales[n,b] · Σ_k level · x[k] − Σ_b offsets[n,b] · Σ_k x[k].
template <class Simd, int count>
void float_row(const FloatWeights& weights, const FloatRows& x, std::size_t row,
               std::size_t channel, const Output& out) {
    const float* values = x.x + row * x.stride;
    const std::size_t code_bytes = weights.units() * 16;
    const std::uint8_t* codes = weights.codes + channel * code_bytes;
    typename Simd::Floats totals[count];
    for (int n = 0; n < count; n++) totals[n] = Simd::splat(0.0f);
    for (std::size_t b = 0; b < weights.blocks; b++) {
        typename Simd::Floats sums[count];
        typename Simd::FloatTable tables[count];
        for (int n = 0; n < count; n++) {
            sums[n] = Simd::splat(0.0f);
            tables[n] = Simd::float_table(weights.table(channel + n, b));
        }
        std::size_t k = b * weights.block;
        const std::size_t end = k + weights.block;
        if (k % 32) {  // the block begins in the middle of a unit
            const auto value = Simd::load(values + k);
            for (int n = 0; n < count; n++) {
                const auto unit = Simd::load_unit(codes + n * code_bytes + k / 32 * 16);
                sums[n] = Simd::fma(Simd::lookup_high(tables[n], unit), value, sums[n]);
            }
            k += 16;
        }
        for (; k + 32 <= end; k += 32) {
            const auto low = Simd::load(values + k), high = Simd::load(values + k + 16);
            for (int n = 0; n < count; n++) {
                const auto unit = Simd::load_unit(codes + n * code_bytes + k / 2);
                sums[n] = Simd::fma(Simd::lookup_low(tables[n], unit), low, sums[n]);
                sums[n] = Simd::fma(Simd::lookup_high(tables[n], unit), high, sums[n]);
            }
        }
        if (k < end) {  // and ends in the middle of one
            const auto value = Simd::load(values + k);
            for (int n = 0; n < count; n++) {
                const auto unit = Simd::load_unit(codes + n * code_bytes + k / 2);
                sums[n] = Simd::fma(Simd::lookup_low(tables[n], unit), value, sums[n]);
            }
        }
        for (int n = 0; n < count; n++) {
            const float scale = weights.scales[(channel + n) * weights.blocks + b];
            totals[n] = Simd::fma(sums[n], Simd::splat(scale), totals[n]);
        }
    }
    for (int n = 0; n < count; n++) {
        float y = Simd::sum_of(totals[n]);
        if (weights.offsets) {
            const float* offsets = weights.offsets + (channel + n) * weights.blocks;
            for (std::size_t b = 0; b < weights.blocks; b++)
                y -= offsets[b] * x.sums[row * weights.blocks + b];
        }
        out.y[row * out.stride + channel + n] = y + (out.bias ? out.bias[channel + n] : 0.0f);
    }
}

// W of one output channel, columns [begin, end), both multiples of 32.
template <class Simd>
void floats_of_channel(const FloatWeights& weights, std::size_t channel, Range columns,
                       float* to) {
    const std::uint8_t* codes = weights.codes + channel * weights.units() * 16;
    const std::size_t filled = weights.blocks * weights.block;
    for (std::size_t k = columns.begin; k < columns.end; k += 16, to += 16) {
        if (k >= filled) {  // x is zero here
            Simd::store(to, Simd::splat(0.0f));
            continue;
        }
        const std::size_t b = k / weights.block, at = channel * weights.blocks + b;
        const auto table = Simd::float_table(weights.table(channel, b));
        const auto unit = Simd::load_unit(codes + k / 32 * 16);
        const auto level =
            k % 32 ? Simd::lookup_high(table, unit) : Simd::lookup_low(table, unit);
        const float offset = weights.offsets ? weights.offsets[at] : 0.0f;
        Simd::store(to, Simd::fma(level, Simd::splat(weights.scales[at]), Simd::splat(-offset)));
    }
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
    if (rows.size() == 1) {
        std::size_t n = channels.begin;
        for (; n + 4 <= channels.end; n += 4) float_row<Simd, 4>(weights, x, rows.begin, n, out);
        for (; n < channels.end; n++) float_row<Simd, 1>(weights, x, rows.begin, n, out);
        return;
    }
    for (std::size_t n = channels.begin; n < channels.end; n += lanes)
        float_rows<Simd>(weights, x, rows,
                         {n, n + lanes < channels.end ? n + lanes : channels.end}, out);
}

}  // namespace
}  // namespace onnxq
