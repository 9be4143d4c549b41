// Which rows of the kernel tables a build compiles: FLASH_ATTN_KERNELS narrows a development build.
#pragma once

#include <string_view>

#include "params.h"

#ifndef FLASH_ATTN_KERNELS
#define FLASH_ATTN_KERNELS ""
#endif

namespace flash {

/// Comma-separated prefixes of row names such as "fwd/sm80/128/bf16"; empty compiles every row.
inline constexpr std::string_view kKernelFilter = FLASH_ATTN_KERNELS;

/// True if `name`, made of the `/`-separated parts, starts with one of the filter's prefixes.
constexpr bool is_compiled(std::string_view name) {
  std::string_view rest = kKernelFilter;
  if (rest.empty()) {
    return true;
  }
  while (!rest.empty()) {
    std::size_t const comma = rest.find(',');
    std::string_view const prefix = rest.substr(0, comma);
    if (!prefix.empty() && name.starts_with(prefix)) {
      return true;
    }
    rest = comma == std::string_view::npos ? std::string_view{} : rest.substr(comma + 1);
  }
  return false;
}

/// Name of a row, "fwd/sm80/128/bf16" or "fwd/sm80/128/bf16/extras", in a fixed buffer so that it
/// can be made at compile time.
struct RowName {
  char text[32] = {};

  constexpr operator std::string_view() const { return text; }
};

constexpr RowName row_name(std::string_view pass, int arch, int head_dim, DType dtype,
                           bool extras = false) {
  RowName name;
  std::size_t size = 0;
  auto append = [&](std::string_view part) {
    for (char const c : part) {
      name.text[size++] = c;
    }
  };
  auto append_number = [&](int number) {
    if (number >= 100) {
      name.text[size++] = char('0' + number / 100);
    }
    name.text[size++] = char('0' + number / 10 % 10);
    name.text[size++] = char('0' + number % 10);
  };
  append(pass);
  append("/sm");
  append_number(arch);
  append("/");
  append_number(head_dim);
  append("/");
  append(dtype == DType::kBf16 ? "bf16" : dtype == DType::kFp16 ? "fp16" : "fp32");
  append(extras ? "/extras" : "");
  return name;
}

}  // namespace flash
