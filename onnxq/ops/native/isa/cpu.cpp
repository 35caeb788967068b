#include "cpu.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cstdint>
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace onnxq {
namespace {

struct Registers {
    std::uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r;
#ifdef _MSC_VER
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
    r = {static_cast<std::uint32_t>(values[0]), static_cast<std::uint32_t>(values[1]),
         static_cast<std::uint32_t>(values[2]), static_cast<std::uint32_t>(values[3])};
#else
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // leaves zeros past the last leaf
#endif
    return r;
}

// The registers that the system keeps when it switches threads: XCR0.
std::uint64_t kept_registers() {
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    std::uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return std::uint64_t{high} << 32 | low;
#endif
}

bool bit(std::uint32_t bits, int place) { return bits >> place & 1; }

}  // namespace

Cpu Cpu::here() {
    Cpu cpu;
    const Registers basic = cpuid(1, 0), more = cpuid(7, 0), vnni = cpuid(7, more.a ? 1 : 0);
    const bool xgetbv = bit(basic.c, 27);
    if (!xgetbv) return cpu;
    constexpr std::uint64_t ymm = 0x6, zmm = 0xe6;  // SSE and AVX; with masks and 32 wide ones
    const std::uint64_t kept = kept_registers();
    cpu.avx2 = (kept & ymm) == ymm && bit(basic.c, 12) && bit(more.b, 5);
    cpu.avxvnni = cpu.avx2 && more.a >= 1 && bit(vnni.a, 4);
    cpu.avx512vnni = cpu.avx2 && (kept & zmm) == zmm && bit(more.b, 16) && bit(more.b, 17) &&
                     bit(more.b, 30) && bit(more.b, 31) && bit(more.c, 11);
    cpu.avx512vbmi = cpu.avx512vnni && bit(more.c, 1) && bit(more.c, 8);
    return cpu;
}

}  // namespace onnxq

#elif defined(__aarch64__) || defined(_M_ARM64)

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

namespace onnxq {

Cpu Cpu::here() {
    Cpu cpu;
    cpu.neon = true;  // every 64-bit ARM has it
#if defined(__linux__)
    constexpr unsigned long asimddp = 1ul << 20;  // HWCAP_ASIMDDP
    cpu.neondot = getauxval(AT_HWCAP) & asimddp;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    cpu.neondot = !sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) && has;
#elif defined(_WIN32)
    cpu.neondot = IsProcessorFeaturePresent(43);  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#endif
    return cpu;
}

}  // namespace onnxq

#else

namespace onnxq {
Cpu Cpu::here() { return {}; }
}  // namespace onnxq

#endif
