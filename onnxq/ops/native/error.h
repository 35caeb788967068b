// What is wrong with a model, in one line. Caught where the runtime calls in, and handed to it.
#pragma once

#include <sstream>
#include <stdexcept>

namespace onnxq {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream line;
    (line << ... << parts);
    throw Error(line.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) fail(parts...);
}

}  // namespace onnxq
