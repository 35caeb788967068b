// Memory for one call: the thread's own, kept from call to call, so that a call allocates nothing.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace onnxq {

inline constexpr std::size_t cache_line = 64;  // bytes; also the widest vector

constexpr std::size_t round_up(std::size_t value, std::size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

struct AlignedDelete {
    std::align_val_t alignment{cache_line};
    void operator()(std::byte* memory) const { ::operator delete[](memory, alignment); }
};

// Bytes that begin at a cache line; large ones lie in huge pages where the system has them.
class AlignedBuffer {
  public:
    AlignedBuffer() = default;
    explicit AlignedBuffer(std::size_t size);

    std::byte* data() const { return memory_.get(); }
    std::size_t size() const { return size_; }
    template <class T>
    T* as(std::size_t offset = 0) const {
        return reinterpret_cast<T*>(data() + offset);
    }

  private:
    std::unique_ptr<std::byte[], AlignedDelete> memory_;
    std::size_t size_ = 0;
};

// Parts of the thread's buffer, taken in the order in which they are reserved:
//
//     Scratch scratch;
//     auto x = scratch.reserve<float>(rows * columns);
//     scratch.allocate();
//     x.get()[0] = ...
class Scratch {
  public:
    template <class T>
    class Part {
      public:
        Part(const Scratch* scratch, std::size_t offset) : scratch_(scratch), offset_(offset) {}
        T* get() const { return scratch_->buffer_.as<T>(offset_); }

      private:
        const Scratch* scratch_;
        std::size_t offset_;
    };

    Scratch() : buffer_(std::exchange(kept(depth()++), AlignedBuffer())) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { kept(--depth()) = std::move(buffer_); }

    template <class T>
    Part<T> reserve(std::size_t count) {
        Part<T> part(this, used_);
        used_ += round_up(count * sizeof(T), cache_line);
        return part;
    }
    void allocate() {
        if (buffer_.size() < used_) buffer_ = AlignedBuffer(used_);
    }

  private:
    static constexpr std::size_t deepest = 3;  // a call in two parts, and a piece of its work on its thread

    static std::size_t& depth() {
        thread_local std::size_t count = 0;
        return count;
    }
    static AlignedBuffer& kept(std::size_t depth) {
        thread_local AlignedBuffer buffers[deepest];
        return buffers[depth];
    }
    AlignedBuffer buffer_;
    std::size_t used_ = 0;
};

}  // namespace onnxq
