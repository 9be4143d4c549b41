// JSON of texts without quotes, backslashes and control characters.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace flash::binding {

inline std::string quoted(std::string_view text) {
  std::string result{'"'};
  return result.append(text).append(1, '"');
}

inline std::string json_list(std::vector<std::string> const& texts) {
  std::string list{'['};
  for (std::string const& text : texts) {
    list.append(list.size() > 1 ? ", " : "").append(quoted(text));
  }
  return list.append(1, ']');
}

}  // namespace flash::binding
