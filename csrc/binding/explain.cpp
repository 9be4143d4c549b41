#include "binding/explain.h"

#include <algorithm>
#include <stdexcept>

#include "binding/build_info.h"
#include "binding/json.h"
#include "config/compiled_arch.h"
#include "config/select.h"
#include "config/smem_limit.h"

namespace flash::binding {
namespace {

// What only has to be there.
constexpr int32_t kSomeSequences = 0;
constexpr float kSomeSlopes = 0.f;
constexpr int64_t kSomeState = 0;

/// Shared memory that compiled code may count on, on a GPU that grants a thread block so much.
int usable_smem_bytes(int compute_capability, int granted) {
  std::vector<int> const archs = cuda_archs();
  return archs.empty()
             ? granted
             : std::min(granted, compiled_smem_limit(compiled_arch(archs, compute_capability)));
}

DType dtype_of(std::string const& name) {
  if (name == "bfloat16" || name == "float16" || name == "float32") {
    return name == "bfloat16" ? DType::kBf16 : name == "float16" ? DType::kFp16 : DType::kFp32;
  }
  throw std::invalid_argument("flash_attn: dtype: expected bfloat16, float16 or float32, got " +
                              name);
}

template <class Config>
std::string row_json(Config const& row) {
  auto const number = [](char const* name, int value) {
    return std::string(", ") + quoted(name) + ": " + std::to_string(value);
  };
  return "{\"name\": " + quoted(std::string_view(row.name())) + number("tile_m", row.tile_m) +
         number("tile_n", row.tile_n) + number("threads", row.num_threads()) +
         number("smem_bytes", row.smem_bytes()) + "}";
}

/// `why_not` has a line a reason.
std::string reasons_json(std::string const& why_not) {
  std::vector<std::string> reasons;
  std::size_t begin = 0;
  while (begin < why_not.size()) {
    std::size_t const end = std::min(why_not.find('\n', begin), why_not.size());
    std::size_t const text = why_not.find_first_not_of(' ', begin);
    if (text < end) {
      reasons.push_back(why_not.substr(text, end - text));
    }
    begin = end + 1;
  }
  return json_list(reasons);
}

template <class Config>
std::string selection_json(Selection<Config> const& selection) {
  return selection.found ? row_json(selection.row) : reasons_json(selection.why_not);
}

template <class Config>
std::string selection_json(Config const* row) {
  return row != nullptr ? row_json(*row) : json_list({});
}

/// What both passes are selected by.
template <class Params>
Params params_of(SelectionProblem const& problem) {
  Params params{};
  params.shape = {.batch_size = int(problem.batch_size),
                  .seqlen_q = int(problem.seqlen_q),
                  .seqlen_k = int(problem.seqlen_k),
                  .num_heads = 1,
                  .num_heads_k = 1,
                  .head_dim = int(problem.head_dim),
                  .head_dim_v = int(problem.head_dim_v)};
  params.mask = {int(problem.window_left), int(problem.window_right)};
  params.scores.softcap = problem.softcap ? 1.f : 0.f;
  params.scores.alibi_slopes = problem.alibi ? &kSomeSlopes : nullptr;
  params.dropout.rng_state = problem.dropout ? &kSomeState : nullptr;
  if (problem.packed) {
    params.sequences.cu_seqlens_q = params.sequences.cu_seqlens_k = &kSomeSequences;
  }
  return params;
}

}  // namespace

std::string select_kernel(bool backward, int64_t family, int64_t compute_capability,
                          int64_t smem_bytes, std::string dtype_name, int64_t batch_size,
                          int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v,
                          int64_t window_left, int64_t window_right, bool softcap, bool alibi,
                          bool dropout, bool packed) {
  SelectionProblem const problem{batch_size, seqlen_q,    seqlen_k,     head_dim,
                                 head_dim_v, window_left, window_right, softcap,
                                 alibi,      dropout,     packed};
  DType const dtype = dtype_of(dtype_name);
  int const smem = usable_smem_bytes(int(compute_capability), int(smem_bytes));
  if (family == 90) {
    return backward ? selection_json(
                          select_sm90_backward(dtype, params_of<BackwardParams>(problem), smem))
                    : selection_json(
                          select_sm90_forward(dtype, params_of<ForwardParams>(problem), smem));
  }
  KernelRequest const request{int(compute_capability), dtype, int(std::max(head_dim, head_dim_v)),
                              softcap || alibi || dropout, smem};
  return backward ? selection_json(select_backward(request))
                  : selection_json(select_forward(request));
}

}  // namespace flash::binding
