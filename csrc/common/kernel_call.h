// What the operators of single tensor-core kernels share: x [M, C] and the norm that reads it.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/tensors.h"
#include "operators/packed_weights.h"

namespace efficient_densenet {

// Parameters of a norm, as such an operator takes them.
struct NormTensors {
  const Tensor &mean, &var;
  const std::optional<Tensor>&weight, &bias;
  double eps;
};

class KernelCall {
 public:
  // x is called `name` by the operator.
  KernelCall(const char* op, const char* name, const Tensor& x, const NormTensors& norm)
      : checks_(op, x.device()), x_(x), launch_(x.device()), element_(element_of(op, name, x)) {
    checks_.expect(x.dim() == 2 && x.numel() > 0, name, x, "a matrix with rows and channels");
    rows_ = x.size(0);
    channels_ = x.size(1);
    const View view = check_matrix(name, x, x.scalar_type(), rows_, channels_);
    const auto optional = [&](const char* what, const std::optional<Tensor>& tensor) {
      return tensor ? numbers(what, *tensor, ScalarType::Float, channels_) : nullptr;
    };
    bn_ = {static_cast<const double*>(numbers("mean", norm.mean, ScalarType::Double, channels_)),
           static_cast<const double*>(numbers("var", norm.var, ScalarType::Double, channels_)),
           optional("weight", norm.weight), optional("bias", norm.bias), norm.eps};
    args_.element = element_;
    args_.rows = {1, {rows_, 1, 1, 1}, rows_};
    args_.channels = channels_;
    args_.features = {{view, {}, 0, channels_}};
  }

  const ArgumentChecks& checks() const { return checks_; }

  void check_kernels(const std::string& why) const { checks_.check(why.empty(), why); }

  // A matrix on the device of x; its rows may be apart.
  View check_matrix(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows,
                    int64_t columns) const {
    const int64_t stride = checks_.channels_last(name, tensor, dtype, {rows, columns});
    return {tensor.data_ptr(), 1, {stride}};
  }

  void* numbers(const char* name, const Tensor& tensor, ScalarType dtype, int64_t count) const {
    return checks_.contiguous(name, tensor, dtype, count);
  }

  // mean and var of a result, [2, channels].
  Statistics statistics(const char* name, const Tensor& tensor, int64_t channels) const {
    auto* const data =
        static_cast<double*>(numbers(name, tensor, ScalarType::Double, 2 * channels));
    return {data, data + channels, nullptr};
  }

  Tensor packed(const WeightsToPack& weights) const {
    const int64_t bytes = cuda::packed_bytes(element_, rows_, weights, 0);
    Tensor memory = empty({bytes}, ScalarType::Byte, x_.device());
    cuda::pack_weights(element_, rows_, {{weights, memory.data_ptr()}}, {}, launch_.stream());
    return memory;
  }

  template <typename Kernel, typename... Others>
  void run(Kernel kernel, const Others&... others) {
    launch_(kernel, args_, bn_, others...);
  }
  template <typename Kernel, typename... Others>
  void run_without_norm(Kernel kernel, const Others&... others) {
    launch_(kernel, args_, others...);
  }

  Element element() const { return element_; }
  ScalarType dtype() const { return x_.scalar_type(); }
  int device_index() const { return x_.device().index(); }
  int64_t rows() const { return rows_; }
  int64_t channels() const { return channels_; }

 private:
  ArgumentChecks checks_;
  const Tensor& x_;
  Launcher launch_;
  Element element_;
  int64_t rows_, channels_;
  BatchNorm bn_;
  KernelArgs args_{};
};

}  // namespace efficient_densenet
