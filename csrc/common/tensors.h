// What the operators share: element types, strides of rows, device and workspace of a call.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/arguments.h"
#include "common/kernel_args.h"

namespace efficient_densenet {

inline Element element_of(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      fail(op, name, ": expected float64, float32, float16 or bfloat16, got ", describe(x));
  }
}

inline ScalarType parameter_type(Element element) {
  return is_double(element) ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Device& device) {
  return torch::stable::empty(sizes, dtype, std::nullopt, device);
}

// Of a call's arrays [C], one number per channel: checks, pointers, new ones.
struct ChannelArrays {
  const char* op;
  Element element;  // of the features
  int64_t channels;
  Device device;

  void* pointer(const char* name, const Tensor& tensor, ScalarType dtype) const {
    return ArgumentChecks(op, device).contiguous(name, tensor, dtype, Sizes{channels});
  }

  void* parameter(const char* name, const std::optional<Tensor>& tensor) const {
    return tensor.has_value() ? pointer(name, *tensor, parameter_type(element)) : nullptr;
  }

  BatchNorm batch_norm(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, double eps) const {
    return {static_cast<const double*>(pointer("mean", mean, ScalarType::Double)),
            static_cast<const double*>(pointer("var", var, ScalarType::Double)),
            parameter("weight", weight), parameter("bias", bias), eps};
  }

  Tensor make(ScalarType dtype) const { return empty({channels}, dtype, device); }
  Tensor make_parameter() const { return make(parameter_type(element)); }
};

// Adds the tensors of a call one after the other, then merges the row dimensions of all.
class Geometry {
 public:
  Geometry(const char* op, const char* name, const Tensor& first)
      : checks_(op, first.device()), first_(first) {
    checks_.expect(first.dim() >= 2 && first.dim() <= 1 + kMaxRowDims, name, first,
                   "[N, C, *spatial] with 0 to 3 spatial dimensions");
  }

  // Sizes are those of the first tensor, but for the channels.
  void add(const char* name, const Tensor& tensor, int64_t channels, Access access, View* view) {
    Sizes sizes;
    for (int64_t d = 0; d < first_.dim(); ++d) sizes.push_back(first_.size(d));
    sizes[1] = channels;
    checks_.has_sizes(name, tensor, sizes);
    checks_.any_strides(name, tensor, first_.scalar_type(), access);
    view->data = tensor.data_ptr();
    view->channel_stride = tensor.stride(1);
    tensors_.push_back(tensor);
    views_.push_back(view);
  }

  // Call once all tensors were added; fills the row strides of their views.
  RowSpace merge_rows() {
    RowSpace rows{1, {1, 1, 1, 1}, 1};
    for (View* view : views_) view->row_strides[0] = 0;
    bool first = true;
    for (int64_t d = 0; d < first_.dim(); ++d) {
      const int64_t size = first_.size(d);
      if (d == 1) continue;
      rows.count *= size;
      if (size == 1) continue;
      const bool new_dim = first || !can_merge(rows.dims - 1, d);
      if (new_dim && !first) ++rows.dims;
      const int last = rows.dims - 1;
      rows.sizes[last] = new_dim ? size : rows.sizes[last] * size;
      for (size_t i = 0; i < views_.size(); ++i) {
        views_[i]->row_strides[last] = tensors_[i].stride(d);
      }
      first = false;
    }
    return rows;
  }

 private:
  bool can_merge(int outer, int64_t inner) const {
    for (size_t i = 0; i < views_.size(); ++i) {
      if (views_[i]->row_strides[outer] != tensors_[i].stride(inner) * first_.size(inner)) {
        return false;
      }
    }
    return true;
  }

  ArgumentChecks checks_;
  Tensor first_;
  Tensors tensors_;
  std::vector<View*> views_;
};

// Runs the kernels of one operator on its device; CUDA ones on torch's current stream.
class Launcher {
 public:
  explicit Launcher(const Device& device) : device_(device) {
    if (device.is_cpu()) return;
    guard_.emplace(device.index());
    stream_ = cuda::current_stream(device.index());
  }

  // Enough for nearly every call: 16 KB.
  static constexpr int64_t kTickets = 4096;

  // Memory of the caller that is 0 before the first kernel runs. Without it, or where it is too
  // little, the launcher fills its own, which is a launch.
  void use_tickets(void* memory, int64_t count) {
    tickets_ = static_cast<uint32_t*>(memory);
    num_tickets_ = count;
  }

  bool is_cpu() const { return device_.is_cpu(); }
  void* stream() const { return stream_; }

  // Calls the kernel of the device, with scratch that is reused by the next call: kernels of one
  // stream run one after the other. It is freed with the launcher, in stream order as well.
  template <typename... Parameters, typename... Others>
  void operator()(void (*cpu_kernel)(const KernelArgs&, Parameters...),
                  void (*cuda_kernel)(const KernelArgs&, Parameters...), KernelArgs& args,
                  const Others&... others) {
    if (is_cpu()) return cpu_kernel(args, others...);
    (*this)(cuda_kernel, args, others...);
  }

  // Of a kernel that there is for CUDA only.
  template <typename... Parameters, typename... Others>
  void operator()(void (*cuda_kernel)(const KernelArgs&, Parameters...), KernelArgs& args,
                  const Others&... others) {
    args.stream = stream_;
    args.workspace = [this](int64_t doubles) {
      if (!workspace_ || workspace_->numel() < doubles) {
        workspace_.reset();
        workspace_ = empty({doubles}, ScalarType::Double, device_);
      }
      return static_cast<double*>(workspace_->data_ptr());
    };
    args.kept = [this](int64_t bytes) {
      kept_turn_ = 1 - kept_turn_;
      std::optional<Tensor>& memory = kept_[kept_turn_];
      if (!memory || memory->numel() < bytes) {
        memory.reset();
        memory = empty({bytes}, ScalarType::Byte, device_);
      }
      return memory->data_ptr();
    };
    args.tickets = [this](int64_t count) {
      if (count > num_tickets_) {
        tickets_memory_ = empty({std::max(count, kTickets)}, ScalarType::Int, device_);
        torch::stable::zero_(*tickets_memory_);
        use_tickets(tickets_memory_->data_ptr(), tickets_memory_->numel());
      }
      return tickets_;
    };
    cuda_kernel(args, others...);
  }

 private:
  Device device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
  std::optional<Tensor> workspace_, tickets_memory_, kept_[2];
  int kept_turn_ = 0;
  uint32_t* tickets_ = nullptr;
  int64_t num_tickets_ = 0;
};

}  // namespace efficient_densenet
