// The update of running statistics: the only place where these and num_batches_tracked move.
#include "operators/running_statistics.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "common/tensors.h"

namespace efficient_densenet {
namespace {

// The lists of the operator: one entry per norm. An empty tensor stands for one that a norm does
// not have.
struct Norms {
  const std::vector<int64_t>& begins;  // of a norm's first channel in mean and var
  const Tensors &running_mean, &running_var, &num_batches_tracked;
  const std::vector<double>& momentum;
  const std::vector<bool>& cumulative;
};

class Update {
 public:
  Update(const char* op, const Tensor& mean, const Tensor& var, const Norms& lists)
      : op_(op), checks_(op, mean.device()), lists_(lists), count_(mean.numel()) {
    mean_ = statistics("mean", mean);
    var_ = statistics("var", var);
    const size_t norms = lists.begins.size();
    checks_.check(lists.running_mean.size() == norms && lists.running_var.size() == norms &&
                      lists.num_batches_tracked.size() == norms && lists.momentum.size() == norms &&
                      lists.cumulative.size() == norms,
                  "begins: expected lists with one entry per norm, as many as begins, ", norms);
    for (size_t i = 0; i < norms; ++i) norms_.push_back(norm(i));
  }

  const std::vector<RunningStatistics>& norms() const { return norms_; }

 private:
  const double* statistics(const char* name, const Tensor& tensor) const {
    return static_cast<const double*>(checks_.contiguous(name, tensor, ScalarType::Double, count_));
  }

  RunningBuffer buffer(const char* name, const Tensor& tensor) const {
    if (tensor.numel() == 0) return {nullptr, Element::kFloat};
    const Element element = element_of(op_, name, tensor);
    return {checks_.contiguous(name, tensor, tensor.scalar_type(), tensor.numel()), element};
  }

  RunningStatistics norm(size_t i) const {
    const Tensor &mean = lists_.running_mean[i], &var = lists_.running_var[i];
    const Tensor& tracked = lists_.num_batches_tracked[i];
    const int64_t channels = std::max(mean.numel(), var.numel()), begin = lists_.begins[i];
    checks_.expect(mean.numel() == 0 || var.numel() == 0 || mean.numel() == var.numel(),
                   "running_var", var, "as many elements as running_mean has, ", mean.numel());
    checks_.check(begin >= 0 && begin <= count_ && channels <= count_ - begin,
                  "begins: expected the first of ", channels, " channels among those of mean, ",
                  count_, ", got ", begin);
    RunningStatistics norm{
        mean_ + begin, var_ + begin, buffer("running_mean", mean), buffer("running_var", var),
        nullptr,       channels,     lists_.momentum[i],           lists_.cumulative[i]};
    if (tracked.numel() > 0) {
      norm.num_batches_tracked = static_cast<int64_t*>(
          checks_.contiguous("num_batches_tracked", tracked, ScalarType::Long, 1));
    }
    return norm;
  }

  const char* op_;
  ArgumentChecks checks_;
  const Norms& lists_;
  int64_t count_;
  const double *mean_, *var_;
  std::vector<RunningStatistics> norms_;
};

// Whether two norms of the list move the same memory.
bool share_memory(const std::vector<RunningStatistics>& norms) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;  // begin, end
  const auto add = [&](const void* data, int64_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (data != nullptr) ranges.emplace_back(begin, begin + static_cast<uintptr_t>(bytes));
  };
  const auto size = [](Element element) {
    return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
  };
  for (const RunningStatistics& norm : norms) {
    add(norm.running_mean.data, norm.channels * size(norm.running_mean.element));
    add(norm.running_var.data, norm.channels * size(norm.running_var.element));
    add(norm.num_batches_tracked, sizeof(int64_t));
  }
  std::sort(ranges.begin(), ranges.end());
  const auto overlap = [](const auto& a, const auto& b) { return b.first < a.second; };
  return std::adjacent_find(ranges.begin(), ranges.end(), overlap) != ranges.end();
}

// A norm that several layers share moves once for each, one after the other.
void update_on_cuda(const std::vector<RunningStatistics>& norms, int64_t rows, void* stream) {
  if (!share_memory(norms)) return cuda::update_running_statistics(norms, rows, stream);
  for (const RunningStatistics& norm : norms) {
    cuda::update_running_statistics({norm}, rows, stream);
  }
}

void update_running_statistics(const Tensor& mean, const Tensor& var, int64_t rows,
                               const std::vector<int64_t>& begins, const Tensors& running_mean,
                               const Tensors& running_var, const Tensors& num_batches_tracked,
                               const std::vector<double>& momentum,
                               const std::vector<bool>& cumulative) {
  const char* const op = "efficient_densenet::update_running_statistics";
  EFFICIENT_DENSENET_CHECK(rows == 0 || rows > 1, op,
                           "rows: expected 0 or more than one value per channel, got ", rows);
  const Norms lists{begins, running_mean, running_var, num_batches_tracked, momentum, cumulative};
  std::vector<RunningStatistics> norms = Update(op, mean, var, lists).norms();
  if (rows == 0) {  // an empty batch is counted, and has no statistics
    for (RunningStatistics& norm : norms) norm.channels = 0;
  }
  const Launcher launcher(mean.device());
  if (launcher.is_cpu()) return cpu::update_running_statistics(norms, rows);
  update_on_cuda(norms, rows, launcher.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "update_running_statistics(Tensor mean, Tensor var, int rows, int[] begins, "
      "Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] num_batches_tracked, "
      "float[] momentum, bool[] cumulative) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CPU, m) {
  m.impl("update_running_statistics", TORCH_BOX(&update_running_statistics));
}
// Also in a build without CUDA, where csrc/cpu_only.cpp answers with what to do.
STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) {
  m.impl("update_running_statistics", TORCH_BOX(&update_running_statistics));
}

}  // namespace efficient_densenet
