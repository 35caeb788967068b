#include "paley.h"

#include <algorithm>
#include <array>

#include "../error.h"

namespace onnxq {
namespace {

constexpr std::int64_t largest = 28, width = 16;

using Matrix = std::array<std::array<float, largest>, largest>;

// Elements of GF(q) as numbers, of GF(27) = GF(3)[t] / (t³ + 2t + 1) as digits to base 3.
struct Field {
    int q;

    int minus(int a, int b) const {
        if (q != 27) return (a - b + q) % q;
        int difference = 0;
        for (int power = 1; power < q; power *= 3) {
            difference += (a / power - b / power + 27) % 3 * power;
        }
        return difference;
    }

    int square(int a) const {
        if (q != 27) return a * a % q;
        const int c[3] = {a % 3, a / 3 % 3, a / 9};
        int power[5] = {};
        for (int i = 0; i < 3; ++i) {
            for (int j = 0; j < 3; ++j) power[i + j] += c[i] * c[j];
        }
        // t³ = t + 2 and t⁴ = t² + 2t
        const int constant = power[0] + 2 * power[3], linear = power[1] + power[3] + 2 * power[4];
        return constant % 3 + linear % 3 * 3 + (power[2] + power[4]) % 3 * 9;
    }
};

// H_n = I + S, S = (0 1ᵀ; -1 Q), Q[i, j] = χ(e_i - e_j), χ the quadratic character.
Matrix paley(int n) {
    const Field field{n - 1};
    std::array<float, largest> character;
    character.fill(-1);
    for (int e = 0; e < field.q; ++e) character[field.square(e)] = 1;
    character[0] = 0;
    Matrix h{};
    for (int i = 0; i < n; ++i) {
        h[0][i] = 1;
        h[i][0] = i ? -1.0f : 1.0f;
        for (int j = 1; i && j < n; ++j) {
            h[i][j] = character[field.minus(i - 1, j - 1)] + (i == j ? 1.0f : 0.0f);
        }
    }
    return h;
}

const Matrix& matrix(std::int64_t n) {
    static const Matrix known[] = {paley(12), paley(20), paley(28)};
    return known[n / 8 - 1];
}

}  // namespace

HadamardSize hadamard_size(std::int64_t size) {
    const std::int64_t odd = size > 0 ? size / (size & -size) : 0;
    const std::int64_t n = odd == 1 ? 1 : 4 * (odd & 7);
    require(odd >= 1 && odd <= 7 && size % n == 0, "no Hadamard matrix of size ", size,
            " is known here: take 2^m, or 12, 20 or 28 times 2^m");
    return {n, size / n};
}

void paley_mix(float* y, std::int64_t n, std::int64_t columns) {
    const Matrix& h = matrix(n);
    for (std::int64_t first = 0; first < columns; first += width) {
        const std::int64_t count = std::min(width, columns - first);
        float in[largest][width] = {};
        for (std::int64_t j = 0; j < n; ++j) {
            std::copy_n(y + j * columns + first, count, in[j]);
        }
        for (std::int64_t i = 0; i < n; ++i) {
            float sum[width] = {};
            for (std::int64_t j = 0; j < n; ++j) {
                for (std::int64_t c = 0; c < width; ++c) sum[c] += h[i][j] * in[j][c];
            }
            std::copy_n(sum, count, y + i * columns + first);
        }
    }
}

}  // namespace onnxq
