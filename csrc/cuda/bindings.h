// The CUDA kernels' part of the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace gspo::gpu {

void bind(pybind11::module_& m);

}  // namespace gspo::gpu
