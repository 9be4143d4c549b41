#include "binding/build_info.h"

#include <torch/csrc/stable/version.h>

#include <algorithm>
#include <string_view>

#include "binding/json.h"
#include "config/select.h"

// Defined by the build as strings: the package's version, the CUDA toolkit ("13.0") and the
// architectures ("80,90"); the last two are empty when only the CPU backend is built.
#ifndef FLASH_ATTN_VERSION
#define FLASH_ATTN_VERSION "unknown"
#endif
#ifndef FLASH_ATTN_CUDA_VERSION
#define FLASH_ATTN_CUDA_VERSION ""
#endif
#ifndef FLASH_ATTN_CUDA_ARCHS
#define FLASH_ATTN_CUDA_ARCHS ""
#endif

namespace flash::binding {
namespace {

std::vector<int> parse_archs(std::string_view text) {
  std::vector<int> archs;
  int number = 0;
  bool has_digits = false;
  for (char const c : text) {
    if (c >= '0' && c <= '9') {
      number = 10 * number + (c - '0');
      has_digits = true;
    } else if ((c == ',' || c == ';') && has_digits) {
      archs.push_back(number);
      number = 0;
      has_digits = false;
    }
  }
  if (has_digits) {
    archs.push_back(number);
  }
  return archs;
}

template <class Config>
void append_compiled(std::vector<std::string>& names, std::vector<Config> const& rows) {
  for (Config const& row : rows) {
    std::string const name{std::string_view(row.name())};
    bool const is_listed = std::find(names.begin(), names.end(), name) != names.end();
    if (is_compiled(name) && !is_listed) {
      names.push_back(name);
    }
  }
}

std::vector<std::string> compiled_rows() {
  std::vector<std::string> names;
  if (!cuda_archs().empty()) {
    std::vector<int> const& archs = cuda_archs();
    if (std::find(archs.begin(), archs.end(), 90) != archs.end()) {
      append_compiled(names, sm90_forward_rows());
      append_compiled(names, sm90_backward_rows());
    }
    append_compiled(names, forward_rows());
    append_compiled(names, backward_rows());
  }
  return names;
}

}  // namespace

std::vector<int> const& cuda_archs() {
  static std::vector<int> const archs = parse_archs(FLASH_ATTN_CUDA_ARCHS);
  return archs;
}

std::string build_info() {
  std::string_view const cuda_version = FLASH_ATTN_CUDA_VERSION;
  std::vector<std::string> archs;
  for (int const arch : cuda_archs()) {
    archs.push_back(std::to_string(arch));
  }
  return "{\"version\": " + quoted(FLASH_ATTN_VERSION) +
         ", \"torch_version\": " + quoted(TORCH_VERSION) +
         ", \"cuda_version\": " + (cuda_version.empty() ? "null" : quoted(cuda_version)) +
         ", \"cuda_archs\": " + json_list(archs) + ", \"kernels\": " + quoted(kKernelFilter) +
         ", \"rows\": " + json_list(compiled_rows()) + "}";
}

}  // namespace flash::binding
