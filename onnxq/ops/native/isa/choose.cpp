// Which kernels this process uses: the best that were built and that CPU and system can run.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../error.h"
#include "cpu.h"
#include "isa.h"

namespace onnxq {
namespace {

struct Candidate {
    const Kernels* kernels;
    bool runs_here;
};

std::vector<Candidate> candidates() {  // worst first
    [[maybe_unused]] const Cpu cpu = Cpu::here();
    return {
        {&portable_kernels, true},
#ifdef ONNXQ_OPS_AVX2
        {&avx2_kernels, cpu.avx2},
#endif
#ifdef ONNXQ_OPS_AVXVNNI
        {&avxvnni_kernels, cpu.avxvnni},
#endif
#ifdef ONNXQ_OPS_AVX512VNNI
        {&avx512vnni_kernels, cpu.avx512vnni},
#endif
#ifdef ONNXQ_OPS_AVX512VBMI
        {&avx512vbmi_kernels, cpu.avx512vbmi},
#endif
#ifdef ONNXQ_OPS_NEON
        {&neon_kernels, cpu.neon},
#endif
#ifdef ONNXQ_OPS_NEONDOT
        {&neondot_kernels, cpu.neondot},
#endif
    };
}

const Kernels& best() {
    const Kernels* found = nullptr;
    for (const Candidate& candidate : candidates())
        if (candidate.runs_here) found = candidate.kernels;
    return *found;
}

std::string names(bool only_those_that_run, const char* around) {
    std::string text;
    for (const Candidate& candidate : candidates())
        if (candidate.runs_here || !only_those_that_run)
            text += (text.empty() ? "" : ", ") + (around + std::string(candidate.kernels->isa)) +
                    around;
    return text;
}

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    return "msvc " + std::to_string(_MSC_VER);
#else
    return "unknown";
#endif
}

}  // namespace

const Kernels& kernels() {
    const char* wanted = std::getenv("ONNXQ_OPS_ISA");
    if (!wanted || !*wanted) return best();
    for (const Candidate& candidate : candidates())
        if (candidate.runs_here && !std::strcmp(candidate.kernels->isa, wanted))
            return *candidate.kernels;
    fail("ONNXQ_OPS_ISA is ", wanted, "; this library on this CPU can use ", names(true, ""));
}

const char* build_description() {
    static const std::string text = "{\"version\": 1, \"compiler\": \"" + compiler() +
                                    "\", \"built\": [" + names(false, "\"") + "], \"used\": \"" +
                                    best().isa + "\"}";
    return text.c_str();
}

}  // namespace onnxq
