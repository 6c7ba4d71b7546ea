// average_pool over whole images. In dense_block_average.cu.
#pragma once

#include "dense_block/kernels.h"

namespace efficient_densenet::cuda {

void average_images(const KernelArgs& args, const BatchNorm& bn, const Pooling& pooling,
                    const View& y);

}  // namespace efficient_densenet::cuda
