// Every instruction set that this CPU can run against the portable kernels, on random matrices.
//
// Stands alone, without a runtime, so that it runs under an emulator too:
//
//     qemu-aarch64 -cpu cortex-a53 ./codebook_test
#include "../codebook/pack.h"
#include "support.h"

namespace {

using namespace onnxq;
using namespace onnxq::test;

struct Case {
    std::size_t rows, columns, channels, block, blocks, bits, table_rows, table_blocks;
    std::vector<float> x, scales, bias;
    std::vector<std::uint8_t> codes;
    std::vector<std::int8_t> codebook, zero_points;

    static Case random() {
        Case c;
        const std::size_t row_counts[] = {1, 1, 2, 3, 5, 8, 9, 21};
        c.rows = row_counts[between(0, 7)];
        c.columns = between(1, between(0, 19) ? 600 : 9000);  // now and then, more than a panel
        c.channels = between(1, 70);
        c.block = 16 * between(1, 16);
        c.blocks = (c.columns + c.block - 1) / c.block;
        c.bits = between(3, 4);
        c.table_rows = between(0, 1) ? c.channels : 1;
        c.table_blocks = between(0, 2) ? 1 : c.blocks;
        c.x = random_floats(c.rows * c.columns, -1, 1);
        c.scales = random_floats(c.channels * c.blocks, 0, 0.1f);
        c.codes = random_integers<std::uint8_t>(c.channels * c.blocks * c.block * c.bits / 8, 0, 255);
        c.codebook = random_integers<std::int8_t>((c.table_rows * c.table_blocks) << c.bits, -128, 127);
        if (between(0, 1))
            c.zero_points = random_integers<std::int8_t>(c.channels * c.blocks, -128, 127);
        if (between(0, 1)) c.bias = random_floats(c.channels, -1, 1);
        return c;
    }

    CodebookMatrix matrix() const {
        CodebookMatrix matrix;
        matrix.channels = channels;
        matrix.block = block;
        matrix.blocks = blocks;
        matrix.bits = bits;
        matrix.codes = codes.data();
        matrix.scales = {Numbers::Type::float32, scales.data(), blocks, 1};
        matrix.codebook = {Numbers::Type::int8, codebook.data(),
                           table_rows > 1 ? table_blocks << bits : 0,
                           table_blocks > 1 ? std::size_t{1} << bits : 0};
        if (!zero_points.empty())
            matrix.zero_points = {Numbers::Type::int8, zero_points.data(), blocks, 1};
        return matrix;
    }
};

struct Rounded {
    std::vector<std::int8_t> codes;
    std::vector<float> scales;
    std::vector<std::int32_t> sums;

    explicit Rounded(const Case& c)
        : codes(c.rows * c.blocks * c.block), scales(c.rows * c.blocks), sums(c.rows * c.blocks) {}
    RoundedRows rows(const Case& c) {
        return {c.block, c.blocks, codes.data(), scales.data(), sums.data()};
    }
    bool operator==(const Rounded& other) const {
        return codes == other.codes && scales == other.scales && sums == other.sums;
    }
};

std::vector<float> integer_product(const Kernels& kernels, const Case& c, Rounded& rounded) {
    const PackedIntegerWeights packed(c.matrix());
    std::vector<float> y(c.rows * c.channels);
    const Output out{y.data(), c.channels, c.bias.empty() ? nullptr : c.bias.data()};
    kernels.codebook.round_rows(c.x.data(), c.columns, {0, c.rows}, rounded.rows(c));
    kernels.codebook.integer_product(packed.weights(), rounded.rows(c), {0, c.rows},
                                     {0, packed.weights().groups()}, out);
    return y;
}

std::vector<float> float_product(const Kernels& kernels, const Case& c) {
    const PackedFloatWeights packed(c.matrix());
    const std::size_t padded = packed.weights().columns();
    std::vector<float> y(c.rows * c.channels), x(c.rows * padded), sums(c.rows * c.blocks);
    for (std::size_t row = 0; row < c.rows; row++)
        for (std::size_t k = 0; k < c.columns; k++) {
            x[row * padded + k] = c.x[row * c.columns + k];
            sums[row * c.blocks + k / c.block] += c.x[row * c.columns + k];
        }
    const Output out{y.data(), c.channels, c.bias.empty() ? nullptr : c.bias.data()};
    const FloatRows of_x{x.data(), padded, sums.data()};
    if (c.bits == 4) {
        kernels.codebook.float_product(packed.weights(), of_x, {0, c.rows}, {0, c.channels}, out);
        return y;
    }
    std::vector<std::uint8_t> codes(lanes * packed.weights().units() * 16);
    for (std::size_t n = 0; n < c.channels; n += lanes) {
        const FloatWeights part = four_bits(packed.weights(), n, codes.data());
        const Output there{out.y + n, out.stride, out.bias ? out.bias + n : nullptr};
        kernels.codebook.float_product(part, of_x, {0, c.rows}, {0, part.channels}, there);
    }
    return y;
}

// Whether an instruction set gives what the portable kernels give.
bool agrees(const Kernels& tested, const Kernels& portable, int cases) {
    float integers = 0, floats = 0;
    for (int i = 0; i < cases; i++) {
        const Case c = Case::random();
        Rounded expected(c), given(c);
        const std::vector<float> y = integer_product(portable, c, expected);
        const float apart = difference(y, integer_product(tested, c, given));
        if (!(expected == given)) {
            std::printf("%s: case %d: rows of x are rounded otherwise\n", tested.isa, i);
            return false;
        }
        integers = apart <= integers ? integers : apart;
        const float of_floats = difference(float_product(portable, c), float_product(tested, c));
        floats = of_floats <= floats ? floats : of_floats;
    }
    std::printf("%s: %d cases, largest difference %.1e of integers, %.1e of floats\n", tested.isa,
                cases, static_cast<double>(integers), static_cast<double>(floats));
    return integers < 1e-5f && floats < 1e-5f;
}

}  // namespace

int main(int count, char** arguments) {
    const int cases = count > 1 ? std::atoi(arguments[1]) : 500;
    return test_all([&](const Kernels& tested, const Kernels& portable) {
        return agrees(tested, portable, cases);
    });
}
