// fastpeft::mezo_perturb_ and mezo_perturb on CUDA tensors.
//
// One launch covers all tensors of a dtype on the current stream.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "mezo_perturb.cuh"
#include "mezo_perturb_arguments.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBlocksPerProcessor = 8;  // 2048 threads, the most that reside on one

// What a call asks for beside its tensors.
struct Request {
    std::vector<int64_t> seeds;
    std::vector<double> scales;
    double decay;
    Options options;
};

template <typename T>
void launch_as(const Launch& launch, bool rademacher, int device) {
    int processors;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    const uint32_t tiles = launch.end_tile[launch.num_parts - 1];
    const uint32_t blocks = std::min<uint32_t>(tiles, processors * kBlocksPerProcessor);
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const auto kernel = rademacher ? perturb<T, true> : perturb<T, false>;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_one(const Launch& launch, Format format, bool rademacher, int device) {
    switch (format) {
        case Format::kFloat32:
            return launch_as<float>(launch, rademacher, device);
        case Format::kFloat64:
            return launch_as<double>(launch, rademacher, device);
        case Format::kBFloat16:
            return launch_as<BFloat16>(launch, rademacher, device);
        case Format::kFloat16:
            return launch_as<Float16>(launch, rademacher, device);
    }
}

// The terms of `request` on the tensors of `launch`: more than fit into one launch take several.
void launch_terms(Launch& launch, Format format, const Request& request, int device) {
    launch.stochastic = request.options.stochastic;
    launch.keep = 1.0 - request.decay;
    size_t done = 0;
    do {
        launch.num_terms = static_cast<int>(std::min<size_t>(request.seeds.size() - done, kMaxTerms));
        for (int i = 0; i < launch.num_terms; ++i) {
            launch.seeds[i] = static_cast<uint64_t>(request.seeds[done + i]);
            launch.scales[i] = request.scales[done + i];
        }
        launch_one(launch, format, request.options.rademacher, device);
        done += launch.num_terms;
        launch.keep = 1.0;
        std::copy_n(launch.target, launch.num_parts, launch.source);
    } while (done < request.seeds.size());
}

// A dense tensor's part in a call; source and target are the same where it is perturbed in place.
struct Task {
    Tensor source, target;
    int64_t offset;
};

void run_all(const std::vector<Task>& tasks, const Request& request) {
    std::map<std::pair<int, Format>, std::vector<const Task*>> groups;
    for (const Task& task : tasks) {
        const Format format = format_of(task.target);
        if (task.target.numel() > 0) groups[{task.target.get_device_index(), format}].push_back(&task);
    }
    Launch launch;
    for (const auto& [key, group] : groups) {
        const auto [device, format] = key;
        const torch::stable::accelerator::DeviceGuard guard(device);
        for (size_t i = 0; i < group.size();) {
            uint32_t tiles = 0;
            for (launch.num_parts = 0; i < group.size() && launch.num_parts < kMaxParts; ++i, ++launch.num_parts) {
                const Task& task = *group[i];
                const uint64_t offset = task.offset, numel = task.target.numel();
                const uint64_t octets = (offset + numel + kGaussians - 1) / kGaussians - offset / kGaussians;
                launch.source[launch.num_parts] = task.source.const_data_ptr();
                launch.target[launch.num_parts] = task.target.mutable_data_ptr();
                launch.offset[launch.num_parts] = offset;
                launch.numel[launch.num_parts] = numel;
                launch.end_tile[launch.num_parts] = tiles += (octets + kTileOctets - 1) / kTileOctets;
            }
            launch_terms(launch, format, request, device);
        }
    }
}

void run_in_place(std::vector<Tensor>& params, const std::vector<int64_t>& offsets, const Request& request) {
    STD_TORCH_CHECK(params.size() == offsets.size(), "mezo_perturb_ takes one offset per parameter");
    std::vector<Task> tasks;
    for (size_t i = 0; i < params.size(); ++i) {
        // flat indices follow the C order of the logical tensor, so other strides go through a copy
        const Tensor dense = params[i].is_contiguous() ? params[i] : torch::stable::contiguous(params[i]);
        tasks.push_back({dense, dense, offsets[i]});
    }
    run_all(tasks, request);
    for (size_t i = 0; i < params.size(); ++i) {
        if (!params[i].is_contiguous()) torch::stable::copy_(params[i], tasks[i].target);
    }
}

Request make_request(std::vector<int64_t> seeds, std::vector<double> scales, double decay, const std::string& noise,
                     const std::string& rounding) {
    STD_TORCH_CHECK(seeds.size() == scales.size(), "mezo_perturb takes one scale per seed");
    Request request;
    request.seeds = std::move(seeds);
    request.scales = std::move(scales);
    request.decay = decay;
    request.options = parse_options(noise, rounding);
    return request;
}

void mezo_perturb_(std::vector<Tensor> params, std::vector<int64_t> offsets, std::vector<int64_t> seeds,
                   std::vector<double> scales, double decay, std::string noise, std::string rounding) {
    run_in_place(params, offsets, make_request(std::move(seeds), std::move(scales), decay, noise, rounding));
}

Tensor mezo_perturb(Tensor param, int64_t offset, std::vector<int64_t> seeds, std::vector<double> scales, double decay,
                    std::string noise, std::string rounding) {
    const Request request = make_request(std::move(seeds), std::move(scales), decay, noise, rounding);
    if (!param.is_contiguous()) {
        std::vector<Tensor> out = {torch::stable::clone(param)};
        run_in_place(out, {offset}, request);
        return out[0];
    }
    Tensor out = torch::stable::empty_like(param);
    run_all({{param, out, offset}}, request);
    return out;
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/ops
STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) {
    m.impl("mezo_perturb_", TORCH_BOX(&mezo_perturb_));
    m.impl("mezo_perturb", TORCH_BOX(&mezo_perturb));
}

}  // namespace fastpeft
