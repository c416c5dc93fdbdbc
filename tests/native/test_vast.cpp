// Elements whose number, or whose place in bytes, passes 2^32: in addresses that are reserved, of which only the pages
// that are looked at become memory. What is computed there is what is computed on the same numbers side by side.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/mezo_perturb_pass.h"
#include "cpu/variants.h"

namespace {

using namespace fastpeft;

constexpr int64_t kFar = (int64_t{1} << 31) + 7;  // elements from a row to the next
constexpr int64_t kRows = 3, kColumns = 333;
constexpr uint64_t kOffset = 12345;

// Room for rows of float32 that are so far apart.
class Reserved {
  public:
    Reserved()
        : bytes_(4 * (kRows * kFar)),
          data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
    ~Reserved() {
        if (found()) munmap(data_, bytes_);
    }
    Reserved(const Reserved&) = delete;

    bool found() const { return data_ != MAP_FAILED; }
    float* data() const { return static_cast<float*>(data_); }

  private:
    size_t bytes_;
    void* data_;
};

std::vector<float> numbers(int64_t count) {
    std::vector<float> out;
    for (int64_t i = 0; i < count; ++i) out.push_back(static_cast<float>(i % 101 - 50) / 16);
    return out;
}

// a dense matrix to rows that are far apart, or back
void spread(const std::vector<float>& dense, int64_t columns, float* to) {
    for (size_t i = 0; i < dense.size(); ++i) to[static_cast<int64_t>(i) / columns * kFar + i % columns] = dense[i];
}

bool same(const std::vector<float>& dense, int64_t columns, const float* found) {
    for (size_t i = 0; i < dense.size(); ++i) {
        if (found[static_cast<int64_t>(i) / columns * kFar + i % columns] != dense[i]) return false;
    }
    return true;
}

const Term kTerms[] = {{7, 1e-3, 0.99}, {1ull << 40, -2e-3, 1.0}};
const Change kChange = {kTerms, 2, false, true};

// A window around element 2^32 of one tensor, and its end with the beginning of another.
bool perturbs_far_elements(const Variant& variant, void* room) {
    const int64_t numel = (int64_t{1} << 32) + 4099, beyond = 300;
    auto* const data = static_cast<BFloat16*>(room);
    std::vector<float> other = numbers(beyond), other_expected = other;
    const Elements elements(data, 2, {numel}, {1}), small(other.data(), 4, {beyond}, {1});
    const Pass pass({{elements, elements, true, Format::kBFloat16, kOffset, numel},
                     {small, small, true, Format::kFloat32, 5, beyond}},
                    kChange, variant.perturb);
    bool right = pass.numel() == numel + beyond;
    for (const int64_t begin : {(int64_t{1} << 31) - 150, (int64_t{1} << 32) - 150, numel - 300}) {
        std::vector<BFloat16> expected;
        for (int64_t i = 0; i < 300; ++i) {
            expected.push_back(store<BFloat16>(static_cast<float>(i - 100) / 8));
            data[begin + i] = expected.back();
        }
        variant.perturb(expected.data(), Format::kBFloat16, kOffset + begin, expected.size(), kChange);
        const bool is_last = begin + 300 == numel;
        pass.run(begin, begin + 300 + (is_last ? beyond : 0));
        right = right && std::memcmp(data + begin, expected.data(), 600) == 0;
        right = right && data[begin - 1].bits == 0 && (is_last || data[begin + 300].bits == 0);
    }
    variant.perturb(other_expected.data(), Format::kFloat32, 5, beyond, kChange);
    return right && other == other_expected;
}

// Rows far apart, and columns far apart, element by element in C order.
bool perturbs_far_rows(const Variant& variant, float* room) {
    std::vector<float> dense = numbers(kRows * kColumns);
    spread(dense, kColumns, room);
    const Elements rows(room, 4, {kRows, kColumns}, {kFar, 1});
    const Pass by_rows({{rows, rows, true, Format::kFloat32, kOffset, kRows * kColumns}}, kChange, variant.perturb);
    by_rows.run(0, 400);  // as two threads may share it
    by_rows.run(400, by_rows.numel());
    variant.perturb(dense.data(), Format::kFloat32, kOffset, dense.size(), kChange);
    if (!same(dense, kColumns, room)) return false;

    const Elements columns(room, 4, {kColumns, kRows}, {1, kFar});
    const Pass by_columns({{columns, columns, true, Format::kFloat32, 9, kRows * kColumns}}, kChange, variant.perturb);
    by_columns.run(0, by_columns.numel());
    std::vector<float> turned(dense.size());
    for (int64_t m = 0; m < kRows; ++m) {
        for (int64_t n = 0; n < kColumns; ++n) turned[n * kRows + m] = dense[m * kColumns + n];
    }
    variant.perturb(turned.data(), Format::kFloat32, 9, turned.size(), kChange);
    for (int64_t m = 0; m < kRows; ++m) {
        for (int64_t n = 0; n < kColumns; ++n) dense[m * kColumns + n] = turned[n * kRows + m];
    }
    return same(dense, kColumns, room);
}

// The products with a rank: of x and out with rows far apart.
bool multiplies_far_rows(const LowRankOf<float>& run, float* room) {
    const int64_t ranks = 4;
    std::vector<float> x = numbers(kRows * kColumns), factors = numbers(ranks * kColumns);
    const Factors shape = {factors.data(), ranks, kColumns};
    std::vector<float> near(kRows * ranks), far(near), near_sums(ranks * kColumns), far_sums(near_sums);
    spread(x, kColumns, room);
    std::vector<int64_t> order(kRows);
    std::iota(order.begin(), order.end(), 0);
    const RowsOf<float> near_rows = {x.data(), kColumns, order.data(), kRows},
                        far_rows = {room, kFar, order.data(), kRows};
    run.project(near_rows, shape, {near.data(), ranks});
    run.project(far_rows, shape, {far.data(), ranks});
    run.reduce({near.data(), ranks}, near_rows, ranks, kColumns, near_sums.data());
    run.reduce({near.data(), ranks}, far_rows, ranks, kColumns, far_sums.data());
    run.expand({near.data(), ranks}, shape, near_rows);
    run.expand({near.data(), ranks}, shape, far_rows);
    return near == far && near_sums == far_sums && same(x, kColumns, room);
}

}  // namespace

int vast_failures() {
    int failures = 0;
    const auto check = [&](bool right, const Variant& variant, const char* what) {
        if (right) return;
        ++failures;
        std::fprintf(stderr, "failed: %s: %s\n", std::string(variant.name).c_str(), what);
    };
    for (const Variant& variant : variants()) {
        if (!variant.supported) continue;
        const Reserved room;  // all zeros
        if (!room.found()) {
            std::fprintf(stderr, "not run: no %lld bytes of addresses\n", static_cast<long long>(4 * kRows * kFar));
            return failures;
        }
        check(perturbs_far_elements(variant, room.data()), variant, "elements beyond 2^32");
        check(perturbs_far_rows(variant, room.data()), variant, "rows further apart than 2^31 elements");
        check(multiplies_far_rows(variant.low_rank.of_float, room.data()), variant, "products of rows so far apart");
    }
    return failures;
}
