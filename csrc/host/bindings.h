// flash_attn_host: arith/ and config/ in Python, so that brute-force tests need neither torch nor a
// GPU.
#pragma once

#include <pybind11/pybind11.h>

namespace flash::host {

void bind_arith(pybind11::module_& module);
void bind_config(pybind11::module_& module);

}  // namespace flash::host
