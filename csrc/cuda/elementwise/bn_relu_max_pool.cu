// y = max_pool(relu((x - mean) * scale + bias)) and its gradients, with window 3, stride 2, padding
// 1 in each spatial dimension; windows, places, winners: ../bn_relu_max_pool.h. With dz the
// gradient that reaches a pixel from the windows that it won, if its ReLU was open:
//
//   grad_bias = sum(dz)      grad_weight = sum(dz * (x - mean)) * inverse_std
//   grad_x = scale * (dz - grad_bias / M - xhat * grad_weight / M), or scale * dz, as in
//   concat_bn_relu_backward.cu
//
// Tiling: tile.cuh. A thread owns V channels (one, where channels are not next to each other) of
// one window after the other; backward, of one pair of pixels 2 o and 2 o + 1 of a line after the
// other. It reads a line of a window at a time, 3 pixels; backward, windows o and o + 1 of a line
// of windows, in which the pair has places that are known at compile time. Neighbouring threads
// find most of that in the L1 cache. So pixels gather: each is owned once, and the order of all
// sums depends on shapes, strides and alignment alone. They leave the kernel as in sums.cuh. Bytes,
// per element of x of s bytes, with p = 2^-dims: forward s + p (s + 1); backward twice s + p (s +
// 1) for sums and gradients, and s written. Two-dimensional bf16: 2.75; 7.5. Limit: memory
// bandwidth, closely followed by instructions, about 20 per element of x in each kernel: 9
// normalisations and comparisons per window forward, 9 comparisons and additions per 4 pixels
// backward. Shared memory: 37 KB at V = 8 for the sums. Why not grad_x first, by gathering, and
// concat_bn_relu_backward on it in place, as on the CPU: a write and a read of the size of x more.
// Why not 2 x 2 pixels per thread: half the reads of windows, but twice the registers, of which 8
// channels leave none.
#include "cuda/elementwise/sums.cuh"
#include "operators/bn_relu_max_pool.h"

namespace efficient_densenet::cuda {
namespace {

constexpr int kBlocks = 2;  // per multiprocessor, at least

// ---------------------------------------------------------------------------------------------
// Device helpers

// x, and what a tile walks over: windows, or pairs of pixels.
struct Images {
  Feature feature;
  RowSpace rows, windows, walked;

  __host__ __device__ int64_t first_channel() const { return 0; }
  __host__ __device__ int64_t end_channel() const { return feature.channels; }
};

// The walked row of that index.
struct Position {
  int64_t image, d, h, w;

  __device__ Position(int64_t row, const RowSpace& rows) {
    const int64_t line = divide(row, rows.sizes[3]), plane = divide(line, rows.sizes[2]);
    image = divide(plane, rows.sizes[1]);
    d = plane - image * rows.sizes[1];
    h = line - plane * rows.sizes[2];
    w = row - line * rows.sizes[3];
  }
};

__device__ inline bool is_index(int64_t i, int64_t size) { return i >= 0 && i < size; }

// A thread's channels of a line of a tensor.
template <typename T, int V>
struct Line {
  T* base;
  int64_t stride;

  __device__ Line(const View& view, int64_t channel, int64_t image, int64_t d, int64_t h)
      : base(static_cast<T*>(view.data) + channel * view.channel_stride +
             image * view.row_strides[0] + d * view.row_strides[1] + h * view.row_strides[2]),
        stride(view.row_strides[3]) {}

  __device__ Pack<T, V>* at(int64_t w) const {
    return reinterpret_cast<Pack<T, V>*>(base + w * stride);
  }
};

// ---------------------------------------------------------------------------------------------
// Forward

// It begins at the 0 of the ReLU, so only what is larger replaces it; and NaN, as in torch.
template <typename T, int V>
struct Maximum {
  using Acc = acc_t<T>;
  Acc values[V] = {};
  int winners[V] = {};

  __device__ void take(const Pack<T, V>& x, const NormCoefficients<Acc> (&channels)[V], int place) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      // As stored: what is equal only once it is rounded is equal.
      const Acc value = widen(narrow<T>(channels[i].normalise(widen(x.values[i]))));
      if (value > values[i] || value != value) {
        values[i] = value;
        winners[i] = place;
      }
    }
  }

  // Of the pixels of one line of window w; the line's first place is `place`.
  __device__ void take_line(const Line<T, V>& x, const NormCoefficients<Acc> (&channels)[V],
                            int64_t w, int64_t width, int place) {
    Pack<T, V> packs[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      packs[i] = *x.at(min(max(pixel_at(w, i), int64_t(0)), width - 1));
    }
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      if (is_index(pixel_at(w, i), width)) take(packs[i], channels, place + i);
    }
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    bn_relu_max_pool_kernel(const __grid_constant__ Images images, RowChunking chunking,
                            BatchNorm bn, const __grid_constant__ Pooled pooled) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, true>;
  const T_ tile(images, images.walked, chunking);
  NormCoefficients<Acc> channels[V];
  load_per_channel<NormCoefficients<Acc>, T_>(
      images, channels, [&](int64_t c) { return NormCoefficients<Acc>::load(bn, c); });
  if (tile.channel >= images.end_channel()) return;
  const int64_t* const sizes = images.rows.sizes;
  tile.template for_each_group<1>([&](int64_t row, auto) {
    const Position window(row, images.walked);
    Maximum<T, V> maximum;
#pragma unroll 1
    for (int i = 0; i < kPlaces * kPlaces; ++i) {
      const int place_d = i / kPlaces, place_h = i % kPlaces;
      const int64_t d = pixel_at(window.d, place_d), h = pixel_at(window.h, place_h);
      if (!is_index(d, sizes[1]) || !is_index(h, sizes[2])) continue;
      const Line<T, V> x(images.feature.x, tile.channel, window.image, d, h);
      maximum.take_line(x, channels, window.w, sizes[3], joint_place(place_d, place_h, 0));
    }
    Pack<T, V> y;
    Pack<uint8_t, V> winners;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      y.values[i] = narrow<T>(maximum.values[i]);
      winners.values[i] = static_cast<uint8_t>(maximum.winners[i]);
    }
    *Line<T, V>(pooled.y, tile.channel, window.image, window.d, window.h).at(window.w) = y;
    if (pooled.winners.data == nullptr) return;
    *Line<uint8_t, V>(pooled.winners, tile.channel, window.image, window.d, window.h).at(window.w) =
        winners;
  });
}

// ---------------------------------------------------------------------------------------------
// Backward

// What reaches pixels 2 o and 2 o + 1 of a line from the windows that they won.
template <typename T, int V>
struct Pair {
  acc_t<T> grads[2][V] = {};

  // Gathers from windows o and o + 1 of one line of windows, in which the line's first place is
  // `place`.
  __device__ void gather(const Line<T, V>& grad_y, const Line<uint8_t, V>& winners, int64_t o,
                         int64_t windows, int place) {
    Pack<T, V> packs[2];
    Pack<uint8_t, V> places[2];
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const int64_t window = min(o + next, windows - 1);
      packs[next] = *grad_y.at(window);
      places[next] = *winners.at(window);
    }
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      if (o + next >= windows) continue;
#pragma unroll
      for (int parity = next; parity < 2; ++parity) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (places[next].values[i] == place + place_in(parity, next)) {
            grads[parity][i] += widen(packs[next].values[i]);
          }
        }
      }
    }
  }

  // From all windows that the pair at `position` lies in.
  __device__ void gather_all(const Images& images, const Pooled& pooled, int64_t channel,
                             const Position& position) {
    const int64_t* const windows = images.windows.sizes;
    const int parity_d = position.d % 2, parity_h = position.h % 2;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int next_d = i / 2, next_h = i % 2;
      const int64_t d = position.d / 2 + next_d, h = position.h / 2 + next_h;
      if (next_d > parity_d || next_h > parity_h || d >= windows[1] || h >= windows[2]) continue;
      const Line<T, V> grad_y(pooled.y, channel, position.image, d, h);
      const Line<uint8_t, V> winners(pooled.winners, channel, position.image, d, h);
      gather(grad_y, winners, position.w, windows[3],
             joint_place(place_in(parity_d, next_d), place_in(parity_h, next_h), 0));
    }
  }
};

// Calls body(pixel of the line, x, what reaches it) for each pixel that the thread owns of the pair
// at `position`.
template <typename T, int V, typename Body>
__device__ void for_each_pixel(const Images& images, const Pooled& pooled, int64_t channel,
                               const Position& position, const Body& body) {
  const Line<T, V> x(images.feature.x, channel, position.image, position.d, position.h);
  const int64_t first = 2 * position.w;
  const bool has_second = first + 1 < images.rows.sizes[3];
  Pack<T, V> packs[2];
  packs[0] = *x.at(first);
  packs[1] = *x.at(first + has_second);
  Pair<T, V> pair;
  pair.gather_all(images, pooled, channel, position);
  body(first, packs[0], pair.grads[0]);
  if (has_second) body(first + 1, packs[1], pair.grads[1]);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    max_pool_sums_kernel(const __grid_constant__ Images images, RowChunking chunking, BatchNorm bn,
                         const __grid_constant__ Pooled pooled,
                         const __grid_constant__ Partials partials,
                         const __grid_constant__ SumsOfBlocks<NormGradients<acc_t<T>>> result) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, true>;
  const T_ tile(images, images.walked, chunking);
  const bool active = tile.channel < images.end_channel();
  NormCoefficients<Acc> channels[V];
  load_per_channel<NormCoefficients<Acc>, T_>(
      images, channels, [&](int64_t c) { return NormCoefficients<Acc>::load(bn, c); });
  Sums<Acc> sums[V] = {};
  const auto add = [&](int64_t, const Pack<T, V>& x, const Acc(&grads)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Acc value = widen(x.values[i]);
      const Acc dz = masked<T>(channels[i], value, grads[i]);
      sums[i].add(dz, dz * (value - channels[i].mean));
    }
  };
  if (active) {
    tile.template for_each_group<1>([&](int64_t row, auto) {
      for_each_pixel<T, V>(images, pooled, tile.channel, Position(row, images.walked), add);
    });
  }
  write_partial_sums(sums, active, tile.channel, partials);
  add_in_last_block(partials, blockIdx.x, blockIdx.y, T_::first_of_block(images),
                    T_::end_of_block(images), result);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    max_pool_grad_x_kernel(const __grid_constant__ Images images, RowChunking chunking,
                           BatchNorm bn, const __grid_constant__ Pooled pooled,
                           const __grid_constant__ Gradients gradients) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, true>;
  const T_ tile(images, images.walked, chunking);
  NormGradCoefficients<Acc> channels[V];
  load_per_channel<NormGradCoefficients<Acc>, T_>(images, channels, [&](int64_t c) {
    return NormGradCoefficients<Acc>::load(bn, gradients, c, images.rows.count);
  });
  if (tile.channel >= images.end_channel()) return;
  tile.template for_each_group<1>([&](int64_t row, auto) {
    const Position position(row, images.walked);
    const Line<T, V> grad_x(images.feature.grad_x, tile.channel, position.image, position.d,
                            position.h);
    for_each_pixel<T, V>(
        images, pooled, tile.channel, position,
        [&](int64_t w, const Pack<T, V>& x, const Acc(&grads)[V]) {
          Pack<T, V> result;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const Acc value = widen(x.values[i]);
            const Acc dz = masked<T>(channels[i], value, grads[i]);
            result.values[i] = narrow<T>(channels[i].grad_x(value, dz, gradients.batch_statistics));
          }
          *grad_x.at(w) = result;
        });
  });
}

// ---------------------------------------------------------------------------------------------
// Host side

// Full vectors of channels, or single elements.
Access choose_access(const KernelArgs& args, const Pooled& pooled) {
  const int vector = 16 / element_size(args.element);
  const bool aligned = all_views(args, &pooled.y, [&](const View& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  });
  const bool winners_aligned = reinterpret_cast<uintptr_t>(pooled.winners.data) % vector == 0;
  const bool fits = aligned && winners_aligned && channels_fit(args, &pooled.y, vector);
  return {channels_fit(args, &pooled.y, 1), fits ? vector : 1, false};
}

// Each line as pairs of pixels, the last one alone where their number is odd.
RowSpace pairs_of(const RowSpace& rows) {
  RowSpace pairs = rows;
  int64_t& width = pairs.sizes[kMaxRowDims - 1];
  pairs.count = rows.count / width * ((width + 1) / 2);
  width = (width + 1) / 2;
  return pairs;
}

// A call that walks over some rows.
struct Call {
  Images images;
  Access access;
  LaunchGeometry geometry;

  Call(const KernelArgs& args, const Pooled& pooled, const RowSpace& walked, int64_t blocks)
      : images{args.features[0], args.rows, pooled_rows(args.rows), walked},
        access(choose_access(args, pooled)),
        geometry(with_rows(args, walked), access, blocks) {}

  // Calls body(T, V) for its kernel.
  template <typename Body>
  void dispatch(Element element, const Body& body) const {
    dispatch_element(element, [&](auto element_tag) {
      constexpr int kFits = 16 / sizeof(element_tag);
      if (access.vector == kFits) return body(element_tag, std::integral_constant<int, kFits>{});
      body(element_tag, std::integral_constant<int, 1>{});
    });
  }

 private:
  static KernelArgs with_rows(KernelArgs args, const RowSpace& rows) {
    args.rows = rows;
    return args;
  }
};

}  // namespace

void bn_relu_max_pool(const KernelArgs& args, const BatchNorm& bn, const Pooled& pooled) {
  const Call call(args, pooled, pooled_rows(args.rows), LaunchGeometry::kElementwiseBlocks);
  call.dispatch(args.element, [&](auto element, auto vector) {
    bn_relu_max_pool_kernel<decltype(element), decltype(vector)::value>
        <<<call.geometry.grid(call.images), call.geometry.block, 0,
           static_cast<cudaStream_t>(args.stream)>>>(call.images, call.geometry.chunking, bn,
                                                     pooled);
    check(cudaGetLastError(), "bn_relu_max_pool_kernel");
  });
}

void bn_relu_max_pool_backward(const KernelArgs& args, const BatchNorm& bn, const Pooled& pooled,
                               const Gradients& gradients) {
  const RowSpace pairs = pairs_of(args.rows);
  const Call sums(args, pooled, pairs, LaunchGeometry::kReductionBlocks);
  const Call grad_x(args, pooled, pairs, LaunchGeometry::kElementwiseBlocks);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const RowChunking& chunking = sums.geometry.chunking;
  const Partials partials = sums.geometry.partials(args);
  sums.dispatch(args.element, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int V = decltype(vector)::value;
    max_pool_sums_kernel<T, V><<<sums.geometry.grid(sums.images), sums.geometry.block, 0, stream>>>(
        sums.images, chunking, bn, pooled, partials,
        {{bn, gradients, args.channels, args.rows.count}});
    check(cudaGetLastError(), "max_pool_sums_kernel");
    max_pool_grad_x_kernel<T, V>
        <<<grad_x.geometry.grid(grad_x.images), grad_x.geometry.block, 0, stream>>>(
            grad_x.images, grad_x.geometry.chunking, bn, pooled, gradients);
    check(cudaGetLastError(), "max_pool_grad_x_kernel");
  });
}

}  // namespace efficient_densenet::cuda
