// What operators y = x Wᵀ + bias have in common: x and y of float32 or float16, and their shapes.
#pragma once

#include <algorithm>
#include <cstddef>

#include "error.h"
#include "half.h"
#include "ort.h"
#include "scratch.h"

namespace onnxq {

// x (..., columns) and y (..., channels) of one call, and how both are read and written as floats.
class Linear {
  public:
    Linear(const ort::Call& call, const ort::Tensor& x, const ort::Tensor& bias,
           std::size_t columns, std::size_t channels)
        : x_(x), bias_(bias), columns_(columns), channels_(channels) {
        check_float("x", x);
        require(x.shape.rank > 0 && x.shape.last() == static_cast<std::int64_t>(columns),
                "x has shape ", x.shape, "; its last dimension must be ", columns);
        if (bias) {
            require(bias.type == x.type, "bias is ", name(bias.type), ", but x is ", name(x.type));
            require(bias.shape.rank == 1 &&
                        (bias.shape[0] == 1 ||
                         bias.shape[0] == static_cast<std::int64_t>(channels)),
                    "bias has shape ", bias.shape, "; it must be [", channels, "] or [1]");
        }
        ort::Shape shape = x.shape;
        rows_ = static_cast<std::size_t>(x.shape.elements()) / std::max<std::size_t>(columns, 1);
        shape[shape.rank - 1] = static_cast<std::int64_t>(channels);
        y_ = call.output(0, shape);
    }

    static void check_float(const char* what, const ort::Tensor& tensor) {
        require(tensor.type == ort::Element::float32 || tensor.type == ort::Element::float16, what,
                " is ", name(tensor.type), "; it must be float32 or float16");
    }

    std::size_t rows() const { return rows_; }
    std::size_t columns() const { return columns_; }
    std::size_t channels() const { return channels_; }
    bool is_half() const { return x_.type == ort::Element::float16; }

    // Row of x as floats, `to` has room for `padded` of them: zeros follow the last column.
    void copy_row(std::size_t row, float* to, std::size_t padded) const {
        if (is_half())
            copy(x_.as<Half>() + row * columns_, columns_, to);
        else
            copy(x_.as<float>() + row * columns_, columns_, to);
        std::fill(to + columns_, to + padded, 0.0f);
    }
    const float* float_x() const { return x_.as<float>(); }
    float* float_y() const { return static_cast<float*>(y_); }

    bool bias_needs_copy() const {
        return bias_ && (is_half() || bias_.shape[0] != static_cast<std::int64_t>(channels_));
    }
    // One float for each channel, in `room` if not as it is; null without a bias.
    const float* bias(float* room) const {
        if (!bias_) return nullptr;
        if (!bias_needs_copy()) return bias_.as<float>();
        if (bias_.shape[0] == 1 && channels_ != 1)
            std::fill(room, room + channels_,
                      is_half() ? to_float(*bias_.as<Half>()) : *bias_.as<float>());
        else if (is_half())
            copy(bias_.as<Half>(), channels_, room);
        else
            copy(bias_.as<float>(), channels_, room);
        return room;
    }

    // From floats with `channels` in a row to y's own type.
    void store_half(const float* from, std::size_t row_begin, std::size_t row_end,
                    std::size_t begin, std::size_t end) const {
        auto* to = static_cast<Half*>(y_);
        for (std::size_t row = row_begin; row < row_end; row++)
            for (std::size_t n = begin; n < end; n++)
                to[row * channels_ + n] = to_half(from[row * channels_ + n]);
    }

  private:
    template <class T>
    static void copy(const T* from, std::size_t count, float* to) {
        for (std::size_t i = 0; i < count; i++) to[i] = to_float(from[i]);
    }

    ort::Tensor x_, bias_;
    std::size_t rows_ = 0, columns_, channels_;
    void* y_ = nullptr;
};

// Type and shape of y: those of x with the last dimension that of `channels_of`'s first.
inline void infer_linear(const ort::Inference& inference, std::size_t channels_of) {
    ort::SymbolicShape y = inference.input(0);
    const ort::SymbolicShape weights = inference.input(channels_of);
    if (y.shape.rank > 0) {
        const std::size_t last = y.shape.rank - 1;
        y.shape[last] = weights.shape.rank > 0 ? weights.shape[0] : -1;
        y.names[last] = weights.shape.rank > 0 ? weights.names[0] : nullptr;
    }
    inference.output(0, y);
}

// The work on rows × groups of channels in pieces that are worth a thread's while.
class Pieces {
  public:
    Pieces(std::size_t rows, std::size_t groups, std::size_t products_per_group_and_row)
        : rows_(rows), groups_(groups), row_pieces_((rows + most_rows - 1) / most_rows) {
        const std::size_t per_group =
            std::max<std::size_t>(products_per_group_and_row * (rows / row_pieces_), 1);
        groups_at_once_ = std::max({std::size_t{1}, least_products / per_group,
                                    (groups + most_group_pieces - 1) / most_group_pieces});
        group_pieces_ = (groups + groups_at_once_ - 1) / groups_at_once_;
    }

    std::size_t count() const { return row_pieces_ * group_pieces_; }
    std::size_t row_begin(std::size_t i) const { return rows_ * (i / group_pieces_) / row_pieces_; }
    std::size_t row_end(std::size_t i) const { return row_begin(i + group_pieces_); }
    std::size_t group_begin(std::size_t i) const { return i % group_pieces_ * groups_at_once_; }
    std::size_t group_end(std::size_t i) const {
        return std::min(groups_, group_begin(i) + groups_at_once_);
    }

  private:
    static constexpr std::size_t most_rows = 128;  // of x at a time: they stay in the L2 cache
    static constexpr std::size_t least_products = std::size_t{1} << 18, most_group_pieces = 64;

    std::size_t rows_, groups_, row_pieces_, groups_at_once_, group_pieces_;
};

}  // namespace onnxq
