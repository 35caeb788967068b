// What the tests of kernels share: random numbers, how far results are apart, instruction sets.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../error.h"
#include "../kernels.h"

namespace onnxq::test {

inline std::mt19937 generator(0);

inline std::size_t between(std::size_t least, std::size_t most) {
    return std::uniform_int_distribution<std::size_t>(least, most)(generator);
}

template <class T>
std::vector<T> random_integers(std::size_t count, int least, int most) {
    std::uniform_int_distribution<int> any(least, most);
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(any(generator));
    return values;
}

inline std::vector<float> random_floats(std::size_t count, float least, float most) {
    std::uniform_real_distribution<float> any(least, most);
    std::vector<float> values(count);
    for (float& value : values) value = any(generator);
    return values;
}

// Largest difference over largest magnitude.
inline float difference(const std::vector<float>& a, const std::vector<float>& b) {
    float largest = 1e-20f, most = 0;
    for (std::size_t i = 0; i < a.size(); i++) {
        largest = std::max(largest, std::fabs(a[i]));
        const float apart = std::fabs(a[i] - b[i]);
        most = apart <= most ? most : apart;  // what is not a number stays
    }
    return most / largest;
}

inline const Kernels& kernels_named(const std::string& isa) {
#ifdef _WIN32
    _putenv_s("ONNXQ_OPS_ISA", isa.c_str());
#else
    setenv("ONNXQ_OPS_ISA", isa.c_str(), 1);
#endif
    return kernels();
}

inline constexpr const char* all_isas[] = {"portable",   "avx2", "avxvnni", "avx512vnni",
                                           "avx512vbmi", "neon", "neondot"};

// Calls agrees(tested, portable) for every instruction set that this CPU can run; 0 if all agree.
template <class Agrees>
int test_all(const Agrees& agrees) {
    const Kernels& portable = kernels_named("portable");
    bool all_agree = true;
    for (const char* isa : all_isas) {
        try {
            all_agree &= agrees(kernels_named(isa), portable);
        } catch (const Error&) {
            std::printf("%s: can not run here\n", isa);
        }
    }
    return all_agree ? 0 : 1;
}

}  // namespace onnxq::test
