// The Walsh-Hadamard transform of every instruction set that this CPU can run against sums, and
// whether Paley's matrices are orthogonal.
#include "../hadamard/paley.h"
#include "support.h"

namespace {

using namespace onnxq;
using namespace onnxq::test;

float sign(std::size_t bits) {
    float result = 1;
    for (; bits; bits &= bits - 1) result = -result;
    return result;
}

bool agrees(const Kernels& tested) {
    float most = 0;
    for (std::size_t size = 1; size <= 8192; size *= 2) {
        const std::vector<float> x = random_floats(size, -1, 1);
        std::vector<float> y(size), expected, given;
        const float scale = 1 / std::sqrt(static_cast<float>(size));
        tested.walsh(x.data(), y.data(), static_cast<std::int64_t>(size), scale);
        for (std::size_t i = 0; i < size; i += 1 + size / 300) {
            double sum = 0;
            for (std::size_t j = 0; j < size; j++)
                sum += static_cast<double>(sign(i & j) * x[j]);
            expected.push_back(static_cast<float>(sum) * scale);
            given.push_back(y[i]);
        }
        most = std::max(most, difference(expected, given));
    }
    std::printf("%s: largest difference %.1e\n", tested.isa, static_cast<double>(most));
    return most < 1e-5f;
}

bool orthogonal(std::size_t n) {
    std::vector<float> h(n * n);
    for (std::size_t i = 0; i < n; i++) h[i * n + i] = 1;
    paley_mix(h.data(), static_cast<std::int64_t>(n), static_cast<std::int64_t>(n));
    for (std::size_t i = 0; i < n; i++)
        for (std::size_t j = 0; j < n; j++) {
            float sum = 0;
            for (std::size_t k = 0; k < n; k++) sum += h[i * n + k] * h[j * n + k];
            if (sum != (i == j ? static_cast<float>(n) : 0.0f)) return false;
        }
    return true;
}

}  // namespace

int main() {
    for (std::size_t n : {12, 20, 28})
        if (!orthogonal(n)) return std::printf("H_%zu is not orthogonal\n", n), 1;
    return test_all([](const Kernels& tested, const Kernels&) { return agrees(tested); });
}
