// The host side of the elementwise kernels: in which direction a call is walked (tile.cuh), how
// much a block gets, and a kernel for each element type and width of access.
#pragma once

#include <algorithm>

#include "common/checks.h"
#include "cuda/elementwise/last_block.cuh"

namespace efficient_densenet::cuda {

inline void check(cudaError_t error, const char* what) {
  EFFICIENT_DENSENET_CHECK(error == cudaSuccess, "efficient_densenet", what, ": ",
                           cudaGetErrorString(error));
}

template <typename Body>
void dispatch_element(Element element, const Body& body) {
  switch (element) {
    case Element::kDouble:
      return body(double{});
    case Element::kFloat:
      return body(float{});
    case Element::kHalf:
      return body(__half{});
    case Element::kBFloat16:
      return body(__nv_bfloat16{});
  }
}

inline int element_size(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

// Calls body(view) for every tensor of a call until one answers false.
template <typename Body>
bool all_views(const KernelArgs& args, const View* other, const Body& body) {
  for (const Feature& feature : args.features) {
    if (!body(feature.x)) return false;
    if (feature.grad_x.data != nullptr && !body(feature.grad_x)) return false;
  }
  return other == nullptr || body(*other);
}

// How a call is walked: direction, elements per access, and whether it is about one matrix.
struct Access {
  bool channels_inner;
  int vector;
  bool matrix;
};

inline bool channels_fit(const KernelArgs& args, const View* other, int vector) {
  for (const Feature& feature : args.features) {
    if (feature.first_channel % vector != 0 || feature.channels % vector != 0) return false;
  }
  return all_views(args, other, [&](const View& view) {
    for (int d = 0; d < args.rows.dims; ++d) {
      if (view.row_strides[d] % vector != 0) return false;
    }
    return view.channel_stride == 1;
  });
}

inline bool rows_fit(const KernelArgs& args, const View* other, int vector) {
  const int inner = args.rows.dims - 1;
  if (args.rows.sizes[inner] % vector != 0) return false;
  return all_views(args, other, [&](const View& view) {
    for (int d = 0; d < inner; ++d) {
      if (view.row_strides[d] % vector != 0) return false;
    }
    return view.row_strides[inner] == 1 && view.channel_stride % vector == 0;
  });
}

inline bool is_matrix(const KernelArgs& args, const View* other) {
  return args.features.size() == 1 && args.rows.dims == 1 && args.channels > 0 &&
         channels_fit(args, other, 1);
}

// Accesses of at most 16 bytes. Lists have no kernels for two elements of less than 8 bytes.
inline Access choose_access(const KernelArgs& args, const View* other) {
  const int size = element_size(args.element);
  const bool matrix = is_matrix(args, other);
  const auto aligned = [&](int vector) {
    return all_views(args, other, [&](const View& view) {
      return reinterpret_cast<uintptr_t>(view.data) % (vector * size) == 0;
    });
  };
  for (int vector = 16 / size; vector > 1; vector /= 2) {
    if (!aligned(vector) || (vector == 2 && size < 8 && !matrix)) continue;
    if (channels_fit(args, other, vector)) return {true, vector, matrix};
    if (!matrix && rows_fit(args, other, vector)) return {false, vector, false};
  }
  return {channels_fit(args, other, 1), 1, matrix};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of up to kThreads threads: as wide as the channels need, which are shared out evenly
// where that is more than kMaxWidth accesses.
inline dim3 block_shape(const KernelArgs& args, const Access& access) {
  if (!access.channels_inner) return dim3(1, kThreads);
  const int64_t columns = std::max<int64_t>(1, ceil_div(args.channels, access.vector));
  const auto width = static_cast<unsigned>(ceil_div(columns, ceil_div(columns, kMaxWidth)));
  return dim3(width, kThreads / width);
}

inline int64_t channel_blocks(int64_t channels, const Access& access, const dim3& block) {
  return ceil_div(channels,
                  static_cast<int64_t>(block.x) * (access.channels_inner ? access.vector : 1));
}

// Chunks such that a call has about `blocks` blocks and no chunk is shorter than a few steps. The
// numbers depend on shapes, strides and alignment, never on the device, so that sums are the same
// everywhere.
inline RowChunking choose_row_chunks(const KernelArgs& args, const Access& access,
                                     const dim3& block, int64_t blocks) {
  const int64_t step = static_cast<int64_t>(block.y) * (access.channels_inner ? 1 : access.vector);
  const int64_t shortest = 2 * kUnroll * step;
  const int64_t column_blocks = ceil_div(blocks, channel_blocks(args.channels, access, block));
  const int64_t rows =
      std::max(shortest, ceil_div(ceil_div(args.rows.count, column_blocks), step) * step);
  const int64_t fitting = std::max(rows, ceil_div(ceil_div(args.rows.count, 65535), step) * step);
  return {fitting, static_cast<int>(ceil_div(args.rows.count, fitting))};
}

// Memory for the partial results of so many groups of blocks; kept where they are left to the
// kernel behind.
inline Partials make_partials(const KernelArgs& args, int64_t channels, int blocks, int64_t groups,
                              bool leaves = false) {
  // Each block of the kernel behind reads what is left, of all groups.
  const int teams = leaves ? Partials::teams_of(blocks, channels, 2048)
                           : Partials::teams_of(blocks, ceil_div(channels, groups));
  const int64_t numbers = (blocks + teams) * channels;
  double* const first = leaves ? static_cast<double*>(args.kept(2 * numbers * sizeof(double)))
                               : args.workspace(2 * numbers);
  return {first,  first + numbers, channels,
          blocks, teams,           args.tickets(groups * Partials::group_tickets(teams))};
}

// The geometry of a call.
struct LaunchGeometry {
  Access access;
  dim3 block;
  RowChunking chunking;

  // Blocks in all: enough to fill a large GPU several times over, but few enough that the partial
  // results of a reduction stay small.
  static constexpr int64_t kElementwiseBlocks = 4096;
  static constexpr int64_t kReductionBlocks = 528;

  LaunchGeometry(const KernelArgs& args, const View* other, int64_t blocks)
      : LaunchGeometry(args, choose_access(args, other), blocks) {}

  LaunchGeometry(const KernelArgs& args, const Access& access, int64_t blocks)
      : access(access),
        block(block_shape(args, access)),
        chunking(choose_row_chunks(args, access, block, blocks)) {}

  // Of a reduction over the rows: a group of blocks is one blockIdx.x.
  Partials partials(const KernelArgs& args) const {
    return make_partials(args, args.channels, chunking.chunks,
                         channel_blocks(args.channels, access, block));
  }

  template <typename Inputs>
  dim3 grid(const Inputs& inputs) const {
    const int64_t channels = inputs.end_channel() - inputs.first_channel();
    return dim3(channel_blocks(channels, access, block), chunking.chunks);
  }
};

template <int V, bool kChannelsInner, typename Inputs_>
struct AccessTag {
  static constexpr int vector = V;
  static constexpr bool channels_inner = kChannelsInner;
  using Inputs = Inputs_;
};

// Calls body(inputs) for the matrix, or for each kMaxFeatures features; empty features have no
// channels to own.
template <typename Inputs, typename Body>
void for_each_inputs(const KernelArgs& args, const Body& body) {
  if constexpr (std::is_same_v<Inputs, Matrix>) {
    body(Matrix{args.features[0]});
  } else {
    FeatureList list{};
    for (const Feature& feature : args.features) {
      if (feature.channels == 0) continue;
      list.items[list.count++] = feature;
      if (list.count == kMaxFeatures) {
        body(list);
        list.count = 0;
      }
    }
    if (list.count > 0) body(list);
  }
}

// Calls body with T and V as types, for one matrix.
template <typename Body>
void dispatch_matrix(Element element, int vector, const Body& body) {
  dispatch_element(element, [&](auto element_tag) {
    constexpr int kFits = 16 / sizeof(element_tag);
    const auto with_vector = [&](auto v) {
      body(element_tag, AccessTag<decltype(v)::value, true, Matrix>{});
    };
    if (vector == kFits) return with_vector(std::integral_constant<int, kFits>{});
    if constexpr (kFits > 4) {
      if (vector == 4) return with_vector(std::integral_constant<int, 4>{});
    }
    if constexpr (kFits > 2) {
      if (vector == 2) return with_vector(std::integral_constant<int, 2>{});
    }
    with_vector(std::integral_constant<int, 1>{});
  });
}

// Calls body with T, V, the direction and the kind of inputs as types: the few combinations that
// kernels exist for.
template <typename Body>
void dispatch(const KernelArgs& args, const Access& access, const Body& body) {
  if (access.matrix) return dispatch_matrix(args.element, access.vector, body);
  dispatch_element(args.element, [&](auto element) {
    constexpr int kFits = 16 / sizeof(element);
    const auto with_vector = [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      if (access.channels_inner) {
        body(element, AccessTag<V, true, FeatureList>{});
      } else {
        body(element, AccessTag<V, false, FeatureList>{});
      }
    };
    if constexpr (kFits == 8) {
      if (access.vector == 4) return with_vector(std::integral_constant<int, 4>{});
    }
    if (access.vector == kFits) return with_vector(std::integral_constant<int, kFits>{});
    with_vector(std::integral_constant<int, 1>{});
  });
}

// Launches the kernel that kernel_for(element, access) answers, once for each inputs. A kernel's
// first arguments are those, the rows and their chunks.
template <typename KernelFor, typename... Arguments>
void launch_over_inputs(const char* name, const KernelFor& kernel_for, const KernelArgs& args,
                        const LaunchGeometry& geometry, const Arguments&... arguments) {
  dispatch(args, geometry.access, [&](auto element, auto access) {
    const auto kernel = kernel_for(element, access);
    using Inputs = typename decltype(access)::Inputs;
    for_each_inputs<Inputs>(args, [&](const Inputs& inputs) {
      kernel<<<geometry.grid(inputs), geometry.block, 0, static_cast<cudaStream_t>(args.stream)>>>(
          inputs, args.rows, geometry.chunking, arguments...);
      check(cudaGetLastError(), name);
    });
  });
}

}  // namespace efficient_densenet::cuda
