// The arithmetic that the bits of noise need.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastpeft {

// Subnormals are kept and rounding is to nearest while this lives, whatever the thread was set to.
class DefaultArithmetic {
  public:
#if defined(__x86_64__)
    DefaultArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80u); }
    ~DefaultArithmetic() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#elif defined(__aarch64__)
    DefaultArithmetic() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~DefaultArithmetic() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

  private:
    uint64_t before_;
#else
    DefaultArithmetic() {}
#endif
    DefaultArithmetic(const DefaultArithmetic&) = delete;
};

}  // namespace fastpeft
