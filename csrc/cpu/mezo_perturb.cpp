// fastpeft::mezo_perturb_ and mezo_perturb on CPU tensors: checks, threads, and which instruction set runs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "mezo_perturb_arguments.h"
#include "mezo_perturb_pass.h"
#include "variants.h"

namespace fastpeft {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 15;  // elements below which another thread costs more than it saves

// A tensor without gaps, in C order, is one row, whatever its shape.
Elements elements_of(const Tensor& tensor) {
    std::vector<int64_t> sizes{tensor.numel()}, strides{1};
    if (!tensor.is_contiguous()) {
        sizes.assign(tensor.sizes().begin(), tensor.sizes().end());
        strides.assign(tensor.strides().begin(), tensor.strides().end());
    }
    return {tensor.mutable_data_ptr(), tensor.element_size(), std::move(sizes), std::move(strides)};
}

// All tensors at once: their elements, one tensor after the other, are split among the threads.
void run_all(std::vector<Task> tasks, const std::vector<int64_t>& seeds, const std::vector<double>& scales,
             double decay, const std::string& noise, const std::string& rounding) {
    STD_TORCH_CHECK(seeds.size() == scales.size(), "mezo_perturb takes one scale per seed");
    const Options options = parse_options(noise, rounding);
    std::vector<Term> terms;
    for (size_t i = 0; i < seeds.size(); ++i) {
        terms.push_back({static_cast<uint64_t>(seeds[i]), scales[i], i == 0 ? 1.0 - decay : 1.0});
    }
    const Change change = {terms.data(), terms.size(), options.rademacher, options.stochastic};
    const Pass pass(std::move(tasks), change, choose_variant().perturb);
    torch::stable::parallel_for(0, pass.numel(), kGrain, [&](int64_t begin, int64_t end) { pass.run(begin, end); });
}

void mezo_perturb_(std::vector<Tensor> params, std::vector<int64_t> offsets, std::vector<int64_t> seeds,
                   std::vector<double> scales, double decay, std::string noise, std::string rounding) {
    STD_TORCH_CHECK(params.size() == offsets.size(), "mezo_perturb_ takes one offset per parameter");
    std::vector<Task> tasks;
    for (size_t i = 0; i < params.size(); ++i) {
        const Elements elements = elements_of(params[i]);
        tasks.push_back(
            {elements, elements, true, format_of(params[i]), static_cast<uint64_t>(offsets[i]), params[i].numel()});
    }
    run_all(std::move(tasks), seeds, scales, decay, noise, rounding);
}

Tensor mezo_perturb(Tensor param, int64_t offset, std::vector<int64_t> seeds, std::vector<double> scales, double decay,
                    std::string noise, std::string rounding) {
    Tensor out = torch::stable::empty_like(param);
    run_all(
        {{elements_of(param), elements_of(out), false, format_of(param), static_cast<uint64_t>(offset), param.numel()}},
        seeds, scales, decay, noise, rounding);
    return out;
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/ops
STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
    m.impl("mezo_perturb_", TORCH_BOX(&mezo_perturb_));
    m.impl("mezo_perturb", TORCH_BOX(&mezo_perturb));
}

}  // namespace fastpeft
