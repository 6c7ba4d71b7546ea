// The update of running statistics: the only place where these and num_batches_tracked move.
#include "operators/running_statistics.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "common/tensors.h"

namespace efficient_densenet {
namespace {

// The lists of the operator: one entry per batch, then one per norm. An empty tensor stands for one
// that a norm does not have.
struct Lists {
  const Tensors &mean, &var;
  const std::vector<int64_t>& rows;     // values per channel
  const std::vector<int64_t>& batches;  // of which mean and var a norm takes its own
  const std::vector<int64_t>& begins;   // of a norm's first channel in these
  const Tensors &running_mean, &running_var, &num_batches_tracked;
  const std::vector<double>& momentum;
  const std::vector<bool>& cumulative;
};

class Update {
 public:
  Update(const char* op, const Lists& lists) : op_(op), checks_(op, lists.mean.at(0).device()) {
    const size_t norms = lists.begins.size();
    checks_.check(lists.batches.size() == norms && lists.running_mean.size() == norms &&
                      lists.running_var.size() == norms &&
                      lists.num_batches_tracked.size() == norms && lists.momentum.size() == norms &&
                      lists.cumulative.size() == norms,
                  "begins: expected lists with one entry per norm, as many as begins, ", norms);
    checks_.check(lists.var.size() == lists.mean.size() && lists.rows.size() == lists.mean.size(),
                  "mean: expected as many as of var and of rows, got ", lists.mean.size());
    for (size_t i = 0; i < lists.mean.size(); ++i) check_batch(lists, i);
    for (size_t i = 0; i < norms; ++i) {
      const RunningStatistics norm = this->norm(lists, i);
      const bool has_any = norm.running_mean.data != nullptr || norm.running_var.data != nullptr ||
                           norm.num_batches_tracked != nullptr;
      if (has_any) norms_.push_back(norm);
    }
  }

  const std::vector<RunningStatistics>& norms() const { return norms_; }

 private:
  void check_batch(const Lists& lists, size_t i) const {
    const int64_t rows = lists.rows[i];
    checks_.check(rows == 0 || rows > 1,
                  "rows: expected 0 or more than one value per channel, got ", rows);
    const int64_t count = lists.mean[i].numel();
    checks_.contiguous("mean", lists.mean[i], ScalarType::Double, count);
    checks_.contiguous("var", lists.var[i], ScalarType::Double, count);
  }

  RunningBuffer buffer(const char* name, const Tensor& tensor) const {
    if (tensor.numel() == 0) return {nullptr, 1, Element::kFloat};
    checks_.expect(tensor.dim() == 1, name, tensor, "one dimension");
    checks_.any_strides(name, tensor, tensor.scalar_type(), Access::kWrite);
    return {tensor.data_ptr(), tensor.stride(0), element_of(op_, name, tensor)};
  }

  RunningStatistics norm(const Lists& lists, size_t i) const {
    const int64_t batch = lists.batches[i], batches = static_cast<int64_t>(lists.mean.size());
    checks_.check(batch >= 0 && batch < batches, "batches: expected numbers below ", batches,
                  ", got ", batch);
    const Tensor &mean = lists.running_mean[i], &var = lists.running_var[i];
    const Tensor& tracked = lists.num_batches_tracked[i];
    const int64_t count = lists.mean[batch].numel(), rows = lists.rows[batch];
    int64_t channels = std::max(mean.numel(), var.numel());
    const int64_t begin = lists.begins[i];
    checks_.expect(mean.numel() == 0 || var.numel() == 0 || mean.numel() == var.numel(),
                   "running_var", var, "as many elements as running_mean has, ", mean.numel());
    checks_.check(begin >= 0 && begin <= count && channels <= count - begin,
                  "begins: expected the first of ", channels, " channels among those of mean, ",
                  count, ", got ", begin);
    if (rows == 0) channels = 0;  // an empty batch is counted, and has no statistics
    const auto at = [&](const Tensor& statistics) {
      return static_cast<const double*>(statistics.data_ptr()) + begin;
    };
    RunningStatistics norm{at(lists.mean[batch]),
                           at(lists.var[batch]),
                           static_cast<double>(rows) / static_cast<double>(rows - 1),
                           buffer("running_mean", mean),
                           buffer("running_var", var),
                           nullptr,
                           channels,
                           lists.momentum[i],
                           lists.cumulative[i]};
    if (tracked.numel() > 0) {
      norm.num_batches_tracked = static_cast<int64_t*>(
          checks_.contiguous("num_batches_tracked", tracked, ScalarType::Long, 1));
    }
    return norm;
  }

  const char* op_;
  ArgumentChecks checks_;
  std::vector<RunningStatistics> norms_;
};

// Whether two norms of the list move the same memory.
bool share_memory(const std::vector<RunningStatistics>& norms) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;  // begin, end
  const auto add = [&](const void* data, int64_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (data != nullptr) ranges.emplace_back(begin, begin + static_cast<uintptr_t>(bytes));
  };
  const auto bytes = [](const RunningBuffer& buffer, int64_t channels) {
    const int64_t size = is_double(buffer.element) ? 8 : buffer.element == Element::kFloat ? 4 : 2;
    return channels == 0 ? 0 : ((channels - 1) * buffer.stride + 1) * size;
  };
  for (const RunningStatistics& norm : norms) {
    add(norm.running_mean.data, bytes(norm.running_mean, norm.channels));
    add(norm.running_var.data, bytes(norm.running_var, norm.channels));
    add(norm.num_batches_tracked, sizeof(int64_t));
  }
  std::sort(ranges.begin(), ranges.end());
  const auto overlap = [](const auto& a, const auto& b) { return b.first < a.second; };
  return std::adjacent_find(ranges.begin(), ranges.end(), overlap) != ranges.end();
}

// A norm that several layers share moves once for each, one after the other.
void update_on_cuda(const std::vector<RunningStatistics>& norms, void* stream) {
  if (!share_memory(norms)) return cuda::update_running_statistics(norms, stream);
  for (const RunningStatistics& norm : norms) cuda::update_running_statistics({norm}, stream);
}

void update_running_statistics(const Tensors& mean, const Tensors& var,
                               const std::vector<int64_t>& rows,
                               const std::vector<int64_t>& batches,
                               const std::vector<int64_t>& begins, const Tensors& running_mean,
                               const Tensors& running_var, const Tensors& num_batches_tracked,
                               const std::vector<double>& momentum,
                               const std::vector<bool>& cumulative) {
  const char* const op = "efficient_densenet::update_running_statistics";
  EFFICIENT_DENSENET_CHECK(!mean.empty(), op, "mean: expected at least one batch, got none");
  const Update update(op, {mean, var, rows, batches, begins, running_mean, running_var,
                           num_batches_tracked, momentum, cumulative});
  const Launcher launcher(mean[0].device());
  if (launcher.is_cpu()) return cpu::update_running_statistics(update.norms());
  update_on_cuda(update.norms(), launcher.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "update_running_statistics(Tensor[] mean, Tensor[] var, int[] rows, int[] batches, "
      "int[] begins, Tensor(a!)[] running_mean, Tensor(b!)[] running_var, "
      "Tensor(c!)[] num_batches_tracked, float[] momentum, bool[] cumulative) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CPU, m) {
  m.impl("update_running_statistics", TORCH_BOX(&update_running_statistics));
}
// Also in a build without CUDA, where csrc/cpu_only.cpp answers with what to do.
STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) {
  m.impl("update_running_statistics", TORCH_BOX(&update_running_statistics));
}

}  // namespace efficient_densenet
