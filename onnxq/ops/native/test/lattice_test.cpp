// The lattice's product of every instruction set that this CPU can run against the portable one, and
// that against sums over the points themselves.
#include "../lattice/pack.h"
#include "support.h"

namespace {

using namespace onnxq;
using namespace onnxq::test;

struct Case {
    std::size_t rows, columns, points, channels, blocks;
    std::vector<std::uint16_t> codes;
    std::vector<float> x, scales, bias;

    static Case random() {
        Case c;
        const std::size_t row_counts[] = {1, 1, 2, 3, 8, 70};
        c.rows = row_counts[between(0, 5)];
        c.columns = between(1, between(0, 9) ? 300 : 5000);
        c.points = (c.columns + point - 1) / point;
        c.blocks = (c.columns + lattice_columns - 1) / lattice_columns;
        c.channels = between(1, 70);
        c.codes.resize(c.channels * c.points);
        for (auto& code : c.codes) code = static_cast<std::uint16_t>(between(0, 65535));
        c.x = random_floats(c.rows * c.columns, -1, 1);
        c.scales = random_floats(c.channels, 0, 0.1f);
        c.bias = random_floats(c.channels, -1, 1);
        return c;
    }

    PackedLattice packed() const {
        return {codes.data(), channels, points, {Numbers::Type::float32, scales.data(), 1, 0}};
    }
};

struct Rounded {
    std::vector<std::int8_t> codes;
    std::vector<float> scales;
    std::vector<std::int32_t> sums;
    RoundedRows rows;

    Rounded(const Kernels& kernels, const Case& c)
        : codes(c.rows * c.blocks * lattice_columns), scales(c.rows * c.blocks),
          sums(c.rows * c.blocks),
          rows{lattice_columns, c.blocks, codes.data(), scales.data(), sums.data()} {
        kernels.codebook.round_rows(c.x.data(), c.columns, {0, c.rows}, rows);
    }
};

std::vector<float> product(const Kernels& kernels, const Case& c) {
    const PackedLattice packed = c.packed();
    const Rounded x(kernels, c);
    std::vector<float> y(c.rows * c.channels);
    kernels.lattice.integer_product(packed.weights(), x.rows, {0, c.rows},
                                    {0, packed.weights().groups()},
                                    {y.data(), c.channels, c.bias.data()});
    return y;
}

// One coordinate as the paper has it: the sign of one of 8, its pattern, and a quarter more or less.
double coordinate(const LatticeTables& tables, unsigned code, std::size_t j) {
    const unsigned pattern = code >> 8;
    const auto one = [&](const std::uint8_t (&without)[256], std::size_t i) {
        return ~without[pattern] >> i & 1;
    };
    unsigned minus = code >> 1 & 0x7f, odd = 0;
    for (std::size_t i = 0; i < point; i++) odd ^= one(tables.not_ones, i) ^ (minus >> i & 1);
    minus |= odd << 7;
    const double size = 0.5 + one(tables.not_ones, j) + 2 * one(tables.not_twos, j);
    return (minus >> j & 1 ? -size : size) + (code & 1 ? -0.25 : 0.25);
}

std::vector<float> plain_product(const Kernels& kernels, const Case& c) {
    const PackedLattice packed = c.packed();
    const Rounded x(kernels, c);
    std::vector<float> y(c.rows * c.channels);
    for (std::size_t m = 0; m < c.rows; m++)
        for (std::size_t n = 0; n < c.channels; n++) {
            double sum = 0;
            for (std::size_t k = 0; k < c.columns; k++) {
                const std::size_t b = m * c.blocks + k / lattice_columns;
                sum += coordinate(*packed.weights().tables, c.codes[n * c.points + k / point],
                                  k % point) *
                       x.codes[b * lattice_columns + k % lattice_columns] *
                       static_cast<double>(x.scales[b]);
            }
            y[m * c.channels + n] =
                static_cast<float>(sum * static_cast<double>(c.scales[n])) + c.bias[n];
        }
    return y;
}

bool agrees(const Kernels& tested, const Kernels& portable, int cases) {
    float most = 0;
    for (int i = 0; i < cases; i++) {
        const Case c = Case::random();
        const bool itself = &tested == &portable;
        const float apart = difference(itself ? plain_product(portable, c) : product(portable, c),
                                       product(tested, c));
        most = apart <= most ? most : apart;
    }
    std::printf("%s: %d cases, largest difference %.1e\n", tested.isa, cases,
                static_cast<double>(most));
    return most < 1e-5f;
}

}  // namespace

int main(int count, char** arguments) {
    const int cases = count > 1 ? std::atoi(arguments[1]) : 200;
    return test_all([&](const Kernels& tested, const Kernels& portable) {
        return agrees(tested, portable, cases);
    });
}
