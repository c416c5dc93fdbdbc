// A pass over all tensors at once, as parts that any threads may run: where the elements lie. Nothing of torch, so the
// C++ tests run it by itself.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "mezo_perturb.h"

namespace fastpeft {

// Where the elements of a tensor lie.
class Elements {
  public:
    // Strides count elements. A tensor without gaps, in C order, is to be given as one dimension.
    Elements(void* data, size_t itemsize, std::vector<int64_t> sizes, std::vector<int64_t> strides)
        : data_(static_cast<char*>(data)),
          itemsize_(itemsize),
          sizes_(std::move(sizes)),
          strides_(std::move(strides)) {}

    bool contiguous() const { return sizes_.size() == 1 && strides_[0] == 1; }
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

class Pass {
  public:
    Pass(std::vector<Task> tasks, const Change& change, Perturb* perturb)
        : tasks_(std::move(tasks)), change_(change), perturb_(perturb) {
        for (const Task& task : tasks_) ends_.push_back(numel() + task.numel);
    }

    int64_t numel() const { return ends_.empty() ? 0 : ends_.back(); }

    // The elements begin .. end - 1 of all tensors, one after the other.
    void run(int64_t begin, int64_t end) const {
        const DefaultArithmetic arithmetic;
        for (size_t i = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin(); begin < end; ++i) {
            const int64_t stop = std::min(end, ends_[i]);
            run(tasks_[i], begin - (ends_[i] - tasks_[i].numel), stop - begin);
            begin = stop;
        }
    }

  private:
    void run(const Task& task, int64_t first, int64_t count) const {
        if (task.in_place && task.target.contiguous()) {
            perturb_(task.target.at(first), task.format, task.offset + first, count, change_);
            return;
        }
        alignas(64) char buffer[kNoiseTile * sizeof(double)];
        for (const int64_t end = first + count; first < end;) {
            const int64_t length = std::min<int64_t>(end - first, kNoiseTile);
            task.source.read(first, length, buffer);
            perturb_(buffer, task.format, task.offset + first, length, change_);
            task.target.write(first, length, buffer);
            first += length;
        }
    }

    std::vector<Task> tasks_;
    std::vector<int64_t> ends_;  // of each tensor in the sequence of all elements
    Change change_;
    Perturb* perturb_;
};

}  // namespace fastpeft
