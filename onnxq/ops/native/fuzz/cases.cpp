#include "cases.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "../lattice/pack.h"
#include "random.h"

namespace onnxq::fake {
namespace {

double number(Tensor& tensor, std::int64_t index) {
    switch (tensor.type) {
        case float16: return static_cast<double>(to_float(tensor.as<Half>()[index]));
        case int8: return tensor.as<std::int8_t>()[index];
        default: return static_cast<double>(tensor.as<float>()[index]);
    }
}

// y of a right node, number by number, and how far off each may be.
struct Expected {
    std::vector<double> y, slack;

    std::string compare(Tensor& given) const {
        if (given.elements() != static_cast<std::int64_t>(y.size())) return "y has another size";
        for (std::size_t i = 0; i < y.size(); i++) {
            const double value = number(given, static_cast<std::int64_t>(i));
            const double rounding = given.type == float16 ? 1e-3 * std::fabs(y[i]) + 1e-6 : 0;
            if (!(std::fabs(value - y[i]) <= slack[i] + rounding)) {
                std::ostringstream line;
                line << "y[" << i << "] is " << value << ", not " << y[i];
                return line.str();
            }
        }
        return "";
    }
};

// x Wᵀ + bias. Rounding x to 8 bits may move each product by 1/254 of the largest |x|.
Expected product(Tensor& x, const std::vector<double>& w, std::int64_t channels,
                 std::int64_t columns, Tensor* bias, bool rounded) {
    Expected expected;
    const std::int64_t rows = x.elements() / columns;
    for (std::int64_t m = 0; m < rows; m++) {
        double largest = 0;
        for (std::int64_t k = 0; k < columns; k++)
            largest = std::max(largest, std::fabs(number(x, m * columns + k)));
        for (std::int64_t n = 0; n < channels; n++) {
            double sum = bias ? number(*bias, bias->elements() == 1 ? 0 : n) : 0, size = 0;
            for (std::int64_t k = 0; k < columns; k++) {
                const double weight = w[static_cast<std::size_t>(n * columns + k)];
                sum += number(x, m * columns + k) * weight;
                size += std::fabs(weight);
            }
            expected.y.push_back(sum);
            expected.slack.push_back(largest * size * (rounded ? 1.0 / 250 : 1e-5) + 1e-5);
        }
    }
    return expected;
}

struct Sizes {
    std::int64_t rows, columns, channels;

    // At most some millions of products.
    explicit Sizes(Random& random) {
        columns = random.chance(10) ? random.between(1, 5000) : random.between(1, 300);
        channels = random.chance(3) ? 0 : random.between(1, random.chance(20) ? 130 : 40);
        const std::int64_t most = 3'000'000 / (columns * std::max<std::int64_t>(channels, 1));
        rows = random.between(0, std::min<std::int64_t>(300, random.chance(60) ? 9 : most));
    }
    Shape x() const { return {rows, columns}; }
};

Shared x_of(Random& random, const Sizes& sizes, int type) {
    Shape shape = sizes.x();
    if (sizes.rows == 1 && random.chance(50)) shape.erase(shape.begin());
    if (random.chance(30)) shape.insert(shape.begin(), 1);
    return random.reals(type, shape, -1, 1);
}

Shared bias_of(Random& random, const Sizes& sizes, int type) {
    if (random.chance(40)) return nullptr;
    return random.reals(type, {random.chance(70) ? sizes.channels : 1}, -1, 1);
}

void add_inputs(Random& random, Node& node, std::initializer_list<Shared> tensors) {
    for (const Shared& tensor : tensors)
        node.inputs.push_back({tensor, !node.inputs.empty() && random.chance(80)});
    while (!node.inputs.back().tensor && random.chance(50)) node.inputs.pop_back();
}

unsigned code_of(Tensor& codes, std::int64_t bits, std::int64_t block, std::int64_t of,
                 std::int64_t k) {
    const std::uint8_t* bytes = codes.as<std::uint8_t>() + of * block * bits / 8;
    if (bits == 4) return bytes[k / 2] >> (k % 2 ? 4 : 0) & 15u;
    return (bytes[k / 4] >> (k % 4 * 2) & 3u) | (bytes[block / 4 + k / 8] >> (k % 8) & 1u) << 2;
}

Case codebook_case(Random& random, std::int64_t bits) {
    const Sizes sizes(random);
    const std::int64_t block = 16 * random.between(1, 16), levels = std::int64_t{1} << bits;
    const std::int64_t blocks = (sizes.columns + block - 1) / block, n = sizes.channels;
    const int type = random.one_of({float32, float32, float16});
    const int scale_type = random.one_of({float32, float16});
    const Shared x = x_of(random, sizes, type);
    const Shared codes = random.bytes(uint8, {n, blocks, block * bits / 8});
    const Shared scales = random.reals(scale_type, {n, blocks}, 0.01f, 0.1f);
    const Shape table{random.one_of({std::int64_t{1}, n}), random.one_of({std::int64_t{1}, blocks}),
                      levels};
    const bool integers = random.chance(60);
    const Shared codebook =
        integers ? random.bytes(int8, table) : random.reals(float32, table, -1, 1);
    const Shape zeros = random.chance(50) ? Shape{n, blocks} : Shape{1, 1};
    const Shared zero_points = random.chance(50)   ? nullptr
                               : random.chance(50) ? random.bytes(int8, zeros)
                                                   : random.reals(scale_type, zeros, -3, 3);
    const Shared bias = bias_of(random, sizes, type);

    Case c;
    c.node.op = bits == 3 ? "MatMul3" : "MatMulCodebook";
    const std::int64_t level = random.one_of({std::int64_t{0}, std::int64_t{4}});
    if (level || random.chance(50)) c.node.attributes["accuracy_level"] = level;
    add_inputs(random, c.node, {x, codes, scales, codebook, zero_points, bias});
    c.compare = [=](Tensor& y) {
        std::vector<double> w;
        for (std::int64_t i = 0; i < n; i++)
            for (std::int64_t k = 0; k < sizes.columns; k++) {
                const std::int64_t b = k / block, at = i * blocks + b;
                const std::int64_t of = (table[0] > 1 ? i : 0) * table[1] + (table[1] > 1 ? b : 0);
                const unsigned code = code_of(*codes, bits, block, at, k % block);
                const double zero =
                    zero_points ? number(*zero_points, zero_points->elements() == 1 ? 0 : at) : 0;
                w.push_back(number(*scales, at) * (number(*codebook, of * levels + code) - zero));
            }
        return product(*x, w, n, sizes.columns, bias.get(), level == 4 && integers).compare(y);
    };
    return c;
}

// One of eight coordinates, as the paper has it: a sign, the pattern's size, a quarter more or less.
double lattice_coordinate(unsigned code, std::int64_t j) {
    static const std::uint16_t no_code = 0;
    static const PackedLattice any(&no_code, 1, 1, {Numbers::Type::none, nullptr, 0, 0});
    const LatticeTables& tables = *any.weights().tables;
    const unsigned ones = ~tables.not_ones[code >> 8] & 0xffu, minus = code >> 1 & 0x7f;
    unsigned odd = 0;
    for (int i = 0; i < 8; i++) odd ^= (ones ^ minus) >> i & 1;
    const int twos = ~tables.not_twos[code >> 8] >> j & 1;
    const double size = 0.5 + (ones >> j & 1) + 2 * twos;
    return ((minus | odd << 7) >> j & 1 ? -size : size) + (code & 1 ? -0.25 : 0.25);
}

Case lattice_case(Random& random) {
    const Sizes sizes(random);
    const std::int64_t points = (sizes.columns + 7) / 8, n = sizes.channels;
    const int type = random.one_of({float32, float32, float16});
    const Shared x = x_of(random, sizes, type);
    const Shared codes = random.bytes(uint16, {n, points});
    const Shared scales = random.reals(random.one_of({float32, float16}), {n}, 0.01f, 0.1f);
    const Shared bias = bias_of(random, sizes, type);

    Case c;
    c.node.op = "MatMulLattice";
    const std::int64_t level = random.one_of({std::int64_t{0}, std::int64_t{4}});
    if (level || random.chance(50)) c.node.attributes["accuracy_level"] = level;
    add_inputs(random, c.node, {x, codes, scales, bias});
    c.compare = [=](Tensor& y) {
        std::vector<double> w;
        for (std::int64_t i = 0; i < n; i++)
            for (std::int64_t k = 0; k < sizes.columns; k++) {
                const unsigned code = codes->as<std::uint16_t>()[i * points + k / 8];
                w.push_back(number(*scales, i) * lattice_coordinate(code, k % 8));
            }
        return product(*x, w, n, sizes.columns, bias.get(), level == 4).compare(y);
    };
    return c;
}

Case hadamard_case(Random& random) {
    const std::int64_t small = random.one_of<std::int64_t>({1, 1, 12, 20, 28});
    const std::int64_t large = std::int64_t{1} << random.between(0, small == 1 ? 11 : 7);
    const std::int64_t size = small * large, blocks = random.between(1, 3);
    const std::int64_t rows = random.between(0, random.chance(80) ? 5 : 300);
    const Shared x = random.reals(random.one_of({float32, float16}), {rows, blocks * size}, -1, 1);
    Case c;
    c.node.op = "HadamardTransform";
    if (blocks > 1 || random.chance(50)) c.node.attributes["block_size"] = blocks == 1 ? 0 : size;
    add_inputs(random, c.node, {x});
    // H Hᵀ = size · I: the transform keeps lengths, and the first row of H is of ones.
    c.compare = [=](Tensor& y) -> std::string {
        const double slack = x->type == float16 ? 2e-2 : 1e-4;
        for (std::int64_t b = 0; b < rows * blocks; b++) {
            double sum = 0, length = 0, of_y = 0;
            for (std::int64_t i = b * size; i < (b + 1) * size; i++) {
                sum += number(*x, i);
                length += number(*x, i) * number(*x, i);
                of_y += number(y, i) * number(y, i);
            }
            const double first = sum / std::sqrt(static_cast<double>(size));
            if (!(std::fabs(length - of_y) <= slack * (1 + length))) return "y has another length";
            if (!(std::fabs(number(y, b * size) - first) <= slack)) return "y[0] is wrong";
        }
        return "";
    };
    return c;
}

}  // namespace

Case random_case(std::uint32_t seed) {
    Random random(seed);
    Case c = [&] {
        switch (random.between(0, 7)) {
            case 0: return hadamard_case(random);
            case 1: case 2: return lattice_case(random);
            case 3: case 4: return codebook_case(random, 3);
            default: return codebook_case(random, 4);
        }
    }();
    c.isa = random.one_of<const char*>({"", "", "portable", "avx2", "avx512vnni"});
    for (; random.chance(30); c.is_right = false) spoil(random, c);
    return c;
}

}  // namespace onnxq::fake
