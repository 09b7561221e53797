// The CUDA kernels' part of the extension module.
#pragma once

#include "../python.h"

namespace gspo::gpu {

extern PyMethodDef kMethods[];

}  // namespace gspo::gpu
