// fastpeft::mezo_perturb_ and mezo_perturb on CPU tensors: checks, threads, strides, and which instruction set runs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.h"
#include "perturb.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastpeft {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 15;  // elements below which another thread costs more than it saves

struct Variant {
    std::string_view name;
    Perturb* perturb;
    bool supported;
};

// Fastest first.
std::vector<Variant> variants() {
    std::vector<Variant> found;
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    found.push_back({"avx512", avx512::perturb, avx512});
    found.push_back({"avx2", avx2::perturb, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")});
#endif
    found.push_back({"baseline", baseline::perturb, true});
    return found;
}

// The fastest that this processor runs, or the one that FASTPEFT_SIMD names. It is read at every call, so that tests
// and benches compare variants in one process.
Perturb* choose_variant() {
    static const std::vector<Variant> all = variants();
    const char* wanted = std::getenv("FASTPEFT_SIMD");
    std::string allowed;
    for (const Variant& variant : all) {
        if (!variant.supported) continue;
        if (wanted == nullptr || wanted == variant.name) return variant.perturb;
        allowed.append(allowed.empty() ? "" : ", ").append(variant.name);
    }
    STD_TORCH_CHECK(false, "FASTPEFT_SIMD is '", wanted, "'; allowed on this processor are ", allowed,
                    ". Correct or unset it.");
}

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

// Where the elements of a tensor lie.
class Elements {
  public:
    explicit Elements(const Tensor& tensor)
        : data_(static_cast<char*>(tensor.mutable_data_ptr())),
          itemsize_(tensor.element_size()),
          contiguous_(tensor.is_contiguous()),
          sizes_(tensor.sizes().begin(), tensor.sizes().end()),
          strides_(tensor.strides().begin(), tensor.strides().end()) {
        if (contiguous_) {
            sizes_.assign(1, tensor.numel());
            strides_.assign(1, 1);
        }
    }

    bool contiguous() const { return contiguous_; }
    char* at(int64_t element) const { return data_ + element * static_cast<int64_t>(itemsize_); }

    void read(int64_t first, int64_t count, char* buffer) const {
        each_row(first, count, [&](char* row, int64_t stride, int64_t length) {
            for (int64_t i = 0; i < length; ++i, row += stride, buffer += itemsize_) copy(buffer, row);
        });
    }

    void write(int64_t first, int64_t count, const char* buffer) const {
        each_row(first, count, [&](char* row, int64_t stride, int64_t length) {
            for (int64_t i = 0; i < length; ++i, row += stride, buffer += itemsize_) copy(row, buffer);
        });
    }

  private:
    void copy(char* to, const char* from) const {
        switch (itemsize_) {
            case 2:
                std::memcpy(to, from, 2);
                break;
            case 4:
                std::memcpy(to, from, 4);
                break;
            default:
                std::memcpy(to, from, 8);
        }
    }

    // The elements first .. first + count - 1 in C order, a row of the last dimension (or a part of it) at a time.
    template <typename Visit>
    void each_row(int64_t first, int64_t count, Visit visit) const {
        const size_t dims = sizes_.size();
        std::vector<int64_t> index(dims);
        int64_t offset = 0;
        for (size_t d = dims; d-- > 0; first /= sizes_[d]) {
            index[d] = first % sizes_[d];
            offset += index[d] * strides_[d];
        }
        while (count > 0) {
            const int64_t length = std::min(count, sizes_[dims - 1] - index[dims - 1]);
            visit(at(offset), strides_[dims - 1] * static_cast<int64_t>(itemsize_), length);
            count -= length;
            // carry like an odometer
            index[dims - 1] += length;
            offset += length * strides_[dims - 1];
            for (size_t d = dims - 1; d > 0 && index[d] == sizes_[d]; --d) {
                offset += strides_[d - 1] - sizes_[d] * strides_[d];
                index[d] = 0;
                ++index[d - 1];
            }
        }
    }

    char* data_;
    size_t itemsize_;
    bool contiguous_;
    std::vector<int64_t> sizes_, strides_;
};

// One tensor's part of the work; source and target are the same tensor where it is perturbed in place.
struct Task {
    Elements source, target;
    bool in_place;
    Format format;
    uint64_t offset;
    int64_t numel;
};

void run(const Task& task, int64_t first, int64_t count, Perturb* perturb, const Change& change) {
    if (task.in_place && task.target.contiguous()) {
        perturb(task.target.at(first), task.format, task.offset + first, count, change);
        return;
    }
    alignas(64) char buffer[kTile * sizeof(double)];
    for (const int64_t end = first + count; first < end;) {
        const int64_t length = std::min<int64_t>(end - first, kTile);
        task.source.read(first, length, buffer);
        perturb(buffer, task.format, task.offset + first, length, change);
        task.target.write(first, length, buffer);
        first += length;
    }
}

// All tensors at once: their elements, one tensor after the other, are split among the threads.
void run_all(const std::vector<Task>& tasks, const std::vector<int64_t>& seeds, const std::vector<double>& scales,
             double decay, const std::string& noise, const std::string& rounding) {
    STD_TORCH_CHECK(seeds.size() == scales.size(), "mezo_perturb takes one scale per seed");
    const Options options = parse_options(noise, rounding);
    std::vector<Term> terms;
    for (size_t i = 0; i < seeds.size(); ++i) {
        terms.push_back({static_cast<uint64_t>(seeds[i]), scales[i], i == 0 ? 1.0 - decay : 1.0});
    }
    const Change change = {terms.data(), terms.size(), options.rademacher, options.stochastic};

    std::vector<int64_t> ends;  // of each tensor in the sequence of all elements
    int64_t total = 0;
    for (const Task& task : tasks) ends.push_back(total += task.numel);
    Perturb* perturb = choose_variant();
    torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
        const DefaultArithmetic arithmetic;
        for (size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); begin < end; ++i) {
            const int64_t stop = std::min(end, ends[i]);
            run(tasks[i], begin - (ends[i] - tasks[i].numel), stop - begin, perturb, change);
            begin = stop;
        }
    });
}

void mezo_perturb_(std::vector<Tensor> params, std::vector<int64_t> offsets, std::vector<int64_t> seeds,
                   std::vector<double> scales, double decay, std::string noise, std::string rounding) {
    STD_TORCH_CHECK(params.size() == offsets.size(), "mezo_perturb_ takes one offset per parameter");
    std::vector<Task> tasks;
    for (size_t i = 0; i < params.size(); ++i) {
        const Elements elements(params[i]);
        tasks.push_back(
            {elements, elements, true, format_of(params[i]), static_cast<uint64_t>(offsets[i]), params[i].numel()});
    }
    run_all(tasks, seeds, scales, decay, noise, rounding);
}

Tensor mezo_perturb(Tensor param, int64_t offset, std::vector<int64_t> seeds, std::vector<double> scales, double decay,
                    std::string noise, std::string rounding) {
    Tensor out = torch::stable::empty_like(param);
    run_all({{Elements(param), Elements(out), false, format_of(param), static_cast<uint64_t>(offset), param.numel()}},
            seeds, scales, decay, noise, rounding);
    return out;
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/_ops.py
STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
    m.impl("mezo_perturb_", TORCH_BOX(&mezo_perturb_));
    m.impl("mezo_perturb", TORCH_BOX(&mezo_perturb));
}

}  // namespace fastpeft
