// Random nodes, right and wrong, for all operators:
//
//     fuzz SECONDS [SEED]
//
// Where a node is right, y must be what a plain sum over decoded weights gives; where it is wrong,
// a status with a message. Sanitizers, with which this is built, watch over the rest.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "cases.h"

namespace {

using namespace onnxq::fake;

int complain(std::uint32_t seed, const Case& c, const std::string& what) {
    std::printf("seed %u: %s: %s\n%s", seed, c.node.op.c_str(), what.c_str(),
                description(c.node).c_str());
    return 1;
}

}  // namespace

int main(int count, char** arguments) {
    const auto seconds = std::chrono::seconds(count > 1 ? std::atoi(arguments[1]) : 60);
    const auto end = std::chrono::steady_clock::now() + seconds;
    auto seed = static_cast<std::uint32_t>(count > 2 ? std::atoi(arguments[2]) : 0);
    const bool once = count > 2;
    std::size_t right = 0, refused = 0, computed = 0;
    do {
        Case c = random_case(++seed - (once ? 1 : 0));
        setenv("ONNXQ_OPS_ISA", c.isa.c_str(), 1);
        try {
            const Outcome outcome = run(c.node);
            if (c.is_right && !outcome.error.empty())
                return complain(seed, c, "refused: " + outcome.error);
            if (c.is_right) {
                const std::string wrong = c.compare(*outcome.y);
                if (!wrong.empty()) return complain(seed, c, wrong);
                right++;
            } else {
                outcome.error.empty() ? computed++ : refused++;
            }
        } catch (const std::exception& error) {
            return complain(seed, c, error.what());
        }
    } while (!once && std::chrono::steady_clock::now() < end);
    std::printf("%zu right nodes agree; of %zu spoilt ones %zu were refused, %zu were still right\n",
                right, refused + computed, refused, computed);
    return 0;
}
