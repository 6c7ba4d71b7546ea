// What the operators of single tensor-core kernels share: x [M, C] and the norm that reads it.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/tensors.h"

namespace efficient_densenet {

// Parameters of a norm, as such an operator takes them.
struct NormTensors {
  const Tensor &mean, &var;
  const std::optional<Tensor>&weight, &bias;
  double eps;
};

class KernelCall {
 public:
  KernelCall(const char* op, const char* name, const Tensor& x, const NormTensors& norm)
      : op_(op),
        x_(x),
        launch_(x.device()),
        element_(element_of(op, name, x)),
        rows_(x.size(0)),
        channels_(x.size(1)) {
    check(rows_ > 0 && channels_ > 0, name, ": expected rows and channels");
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

  void check(bool condition, const char* name, const char* what) const {
    EFFICIENT_DENSENET_CHECK(condition, op_, name, what);
  }

  void check_kernels(const std::string& why) const {
    check(why.empty(), "no kernels: ", why.c_str());
  }

  // A matrix on the device of x; its rows may be apart.
  View check_matrix(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows,
                    int64_t columns) const {
    check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
          ": expected a matrix of other sizes");
    check(tensor.scalar_type() == dtype && tensor.device() == x_.device() &&
              (tensor.stride(1) == 1 || columns == 1),
          name, ": expected another dtype or device, or columns next to each other");
    return {tensor.data_ptr(), 1, {tensor.stride(0)}};
  }

  void* numbers(const char* name, const Tensor& tensor, ScalarType dtype, int64_t count) const {
    check(tensor.numel() == count && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
              tensor.device() == x_.device(),
          name, ": expected contiguous memory on the device of x, of another dtype or size");
    return tensor.data_ptr();
  }

  // mean and var of a result, [2, channels].
  Statistics statistics(const char* name, const Tensor& tensor, int64_t channels) const {
    auto* const data =
        static_cast<double*>(numbers(name, tensor, ScalarType::Double, 2 * channels));
    return {data, data + channels, nullptr};
  }

  Tensor new_bytes(int64_t count) const { return empty({count}, ScalarType::Byte, x_.device()); }

  template <typename Kernel, typename... Others>
  void run(Kernel kernel, const Others&... others) {
    launch_(kernel, args_, bn_, others...);
  }

  Element element() const { return element_; }
  ScalarType dtype() const { return x_.scalar_type(); }
  int device_index() const { return x_.device().index(); }
  int64_t rows() const { return rows_; }
  int64_t channels() const { return channels_; }
  void* stream() const { return launch_.stream(); }
  KernelArgs& args() { return args_; }

 private:
  const char* op_;
  const Tensor& x_;
  Launcher launch_;
  Element element_;
  int64_t rows_, channels_;
  BatchNorm bn_;
  KernelArgs args_{};
};

}  // namespace efficient_densenet
