// Cuts the gradients of many parameters, which the backward pass of a block writes in a row, into
// one tensor per parameter with its strides: torch, and DistributedDataParallel, keep a gradient as
// it comes only if it lies in memory as its parameter does.
//
// It is made of ATen's operators, so compilers see these.
#include <torch/csrc/stable/library.h>

#include <functional>
#include <numeric>

#include "common/arguments.h"
#include "common/aten.h"
#include "common/tensors.h"

namespace efficient_densenet {
namespace {

struct Piece {
  Sizes sizes, packed_strides, strides;

  // Whether the packed elements already lie as the parameter's. Where one element is, any stride
  // will do.
  bool fits() const {
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] != 1 && packed_strides[d] != strides[d]) return false;
    }
    return true;
  }

  int64_t elements() const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<>());
  }

  // An expanded parameter has several elements in one place; its gradient has not.
  bool overlaps() const {
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] > 1 && strides[d] == 0) return true;
    }
    return false;
  }
};

Tensor cut(const Tensor& packed, int64_t offset, const Piece& piece) {
  if (piece.fits()) return aten::as_strided(packed, piece.sizes, piece.strides, offset);
  const Tensor part = aten::as_strided(packed, piece.sizes, piece.packed_strides, offset);
  if (piece.overlaps()) return torch::stable::contiguous(part);
  const Tensor copy = aten::new_empty_strided(packed, piece.sizes, piece.strides);
  aten::copy(part, copy);
  return copy;
}

// offset: where the first one begins in the storage. sizes, packed_strides, strides: `dims` numbers
// for each parameter, one after the other. (Nothing is asked of `packed` itself, whose sizes a
// compiler may not know yet; as_strided finds out whether its memory is enough.)
Tensors cut_gradients(const Tensor& packed, int64_t offset, int64_t dims,
                      const std::vector<int64_t>& sizes, const std::vector<int64_t>& packed_strides,
                      const std::vector<int64_t>& strides) {
  const char* const op = "efficient_densenet::cut_gradients";
  EFFICIENT_DENSENET_CHECK(dims > 0 && static_cast<int64_t>(sizes.size()) % dims == 0, op,
                           "dims: expected a divisor of the number of sizes, ", sizes.size(),
                           ", got ", dims);
  EFFICIENT_DENSENET_CHECK(packed_strides.size() == sizes.size() && strides.size() == sizes.size(),
                           op, "strides: expected as many as sizes, ", sizes.size(), ", got ",
                           strides.size(), " and of packed_strides ", packed_strides.size());
  Tensors pieces;
  for (auto begin = sizes.begin(); begin != sizes.end(); begin += dims) {
    const auto part = [&](const std::vector<int64_t>& list) {
      const auto first = list.begin() + (begin - sizes.begin());
      return Sizes(first, first + dims);
    };
    const Piece piece{part(sizes), part(packed_strides), part(strides)};
    pieces.push_back(cut(packed, offset, piece));
    offset += piece.elements();  // which as_strided has found in memory
  }
  return pieces;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "cut_gradients(Tensor(a) packed, int offset, int dims, int[] sizes, int[] packed_strides, "
      "int[] strides) -> Tensor(a)[]");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CompositeImplicitAutograd, m) {
  m.impl("cut_gradients", TORCH_BOX(&cut_gradients));
}

}  // namespace efficient_densenet
