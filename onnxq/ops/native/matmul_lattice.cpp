#include "matmul_lattice.h"

#include "linear_product.h"

namespace onnxq {

using ort::Element;
using ort::Shape;
using ort::Tensor;

namespace {

enum Input : std::size_t { x_input, codes_input, scales_input, bias_input };

// A group is decoded to four bits, which the product of floats for codebooks takes.
void float_product(const LatticeWeights& weights, const CodebookKernels& kernels,
                   const FloatRows& x, Range rows, Range groups, const Output& out) {
    Scratch scratch;
    const auto codes = scratch.reserve<std::uint8_t>(lanes * weights.blocks * lattice_columns / 2);
    const auto scales = scratch.reserve<float>(lanes * weights.blocks);
    scratch.allocate();
    for (std::size_t group = groups.begin; group < groups.end; group++) {
        const FloatWeights of_group =
            lattice_as_codebook(weights, group, codes.get(), scales.get());
        const std::size_t first = group * lanes;
        const Output there{out.y + first, out.stride, out.bias ? out.bias + first : nullptr};
        kernels.float_product(of_group, x, rows, {0, of_group.channels}, there);
    }
}

}  // namespace

void MatMulLattice::infer(const ort::Inference& inference) { infer_linear(inference, codes_input); }

MatMulLattice::MatMulLattice(const ort::NodeInfo& node) : kernels_(&kernels()) {
    const std::int64_t accuracy_level = node.attribute("accuracy_level", 0);
    require(accuracy_level == 0 || accuracy_level == 4, "accuracy_level is ", accuracy_level,
            "; it must be 0 or 4");
    round_x_ = accuracy_level == 4;
    const Tensor codes = node.constant(codes_input), scales = node.constant(scales_input);
    if (codes && scales) packed_ = pack(codes, scales);
}

MatMulLattice::Packed MatMulLattice::pack(const Tensor& codes, const Tensor& scales) {
    require(codes.type == Element::uint16, "codes is ", ort::name(codes.type),
            "; it must be uint16");
    require(codes.shape.rank == 2 && codes.shape[1] > 0, "codes has shape ", codes.shape,
            "; it must be [channels, points], with a point at least");
    Linear::check_float("scales", scales);
    require(scales.shape == Shape{codes.shape[0]}, "scales has shape ", scales.shape, "; it must be ",
            Shape{codes.shape[0]});
    const auto points = static_cast<std::size_t>(codes.shape[1]);
    Numbers by_channel;
    by_channel.type = scales.type == Element::float16 ? Numbers::Type::float16
                                                      : Numbers::Type::float32;
    by_channel.data = scales.data;
    by_channel.per_channel = 1;
    return {points, PackedLattice(codes.as<std::uint16_t>(),
                                  static_cast<std::size_t>(codes.shape[0]), points, by_channel)};
}

void MatMulLattice::compute(const ort::Call& call) const {
    std::optional<Packed> of_this_call;
    if (!packed_) of_this_call.emplace(pack(call.input(codes_input), call.input(scales_input)));
    const Packed& packed = of_this_call ? *of_this_call : *packed_;
    const LatticeWeights& weights = packed.lattice.weights();

    const Tensor x = call.input(x_input);
    require(x.shape.rank > 0, "x is a scalar; it must have columns");
    const auto columns = static_cast<std::size_t>(x.shape.last());
    require(columns > 0 && (columns + point - 1) / point == packed.points, "x has shape ", x.shape,
            ", but codes has ", packed.points, " points of ", point);
    const Linear linear(call, x, call.input(bias_input), columns, weights.channels);
    if (linear.rows() == 0 || linear.channels() == 0) return;
    if (round_x_)
        multiply_rounded(call, linear, lattice_columns, weights.blocks, kernels_->codebook,
                         [&](const RoundedRows& rounded, Range rows, Range groups,
                             const Output& out) {
                             kernels_->lattice.integer_product(weights, rounded, rows, groups, out);
                         });
    else
        multiply_floats(call, linear, weights.blocks * lattice_columns, [](FloatRows&) {},
                        [&](const FloatRows& floats, Range rows, Range groups, const Output& out) {
                            float_product(weights, kernels_->codebook, floats, rows, groups, out);
                        });
}

}  // namespace onnxq
