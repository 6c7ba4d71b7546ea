// dense_block_pool over whole images. In dense_block_average.cu.
#pragma once

#include "../dense_block.h"

namespace efficient_densenet::cuda {

void average_images(const Problem& problem, const BatchNorm& bn, const Pooling& pooling,
                    const View& y);

}  // namespace efficient_densenet::cuda
