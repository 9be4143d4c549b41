#include "host/bindings.h"

PYBIND11_MODULE(flash_attn_host, module) {
  flash::host::bind_arith(module);
  flash::host::bind_config(module);
}
