#include "config/select.h"

#include <iterator>

namespace flash {
namespace {

template <class Config, std::size_t... kCounts>
std::vector<Config> joined(Config const (&... tables)[kCounts]) {
  std::vector<Config> rows;
  (rows.insert(rows.end(), std::begin(tables), std::end(tables)), ...);
  return rows;
}

/// The first row of a table of the sm90 family that holds the head_dims and that serves() besides;
/// null if there is none.
template <class Config, std::size_t kCount, class Serves>
Config const* first_sm90_row(Config const (&bf16)[kCount], Config const (&fp16)[kCount],
                             DType dtype, Shape const& shape, int smem_bytes,
                             Serves const& serves) {
  if (dtype == DType::kFp32) {
    return nullptr;
  }
  for (Config const& row : dtype == DType::kBf16 ? bf16 : fp16) {
    if (shape.head_dim <= row.head_dim && shape.head_dim_v <= row.head_dim_v &&
        row.smem_bytes() <= smem_bytes && is_compiled(row.name()) && serves(row)) {
      return &row;
    }
  }
  return nullptr;
}

/// Why `row` can't serve the request; empty if it can.
template <class Config>
std::string reason_against(Config const& row, KernelRequest const& request) {
  if (!is_compiled(row.name())) {
    return "left out of this build by FLASH_ATTN_KERNELS";
  }
  if (request.compute_capability < row.arch) {
    return "needs compute capability " + std::to_string(row.arch / 10) + "." +
           std::to_string(row.arch % 10);
  }
  if (request.head_dim > row.head_dim) {
    return "head_dim is at most " + std::to_string(row.head_dim);
  }
  if (row.smem_bytes() > request.smem_bytes) {
    return "needs " + std::to_string(row.smem_bytes()) +
           " bytes of shared memory, the device has " + std::to_string(request.smem_bytes);
  }
  return "";
}

/// True if blocks_per_sm thread blocks of `row` run side by side: CUDA reserves 1 KB of an SM's
/// shared memory for each, and grants one block all of it but that.
template <class Config>
bool fills_sm(Config const& row, KernelRequest const& request) {
  constexpr int kReserved = 1024;
  return row.blocks_per_sm * (row.smem_bytes() + kReserved) <= request.smem_bytes + kReserved;
}

template <class Config>
Selection<Config> select(std::vector<Config> const& rows, KernelRequest const& request) {
  std::string why_not;
  Config const* first = nullptr;  // row that serves the request, of the smallest head_dim
  for (Config const& row : rows) {
    if (row.dtype != request.dtype || row.extras != request.extras) {
      continue;
    }
    std::string const reason = reason_against(row, request);
    if (!reason.empty()) {
      why_not += "\n  " + std::string(std::string_view(row.name())) + ": " + reason;
      continue;
    }
    if (first != nullptr && row.head_dim != first->head_dim) {
      break;
    }
    if (fills_sm(row, request)) {
      return {row, true, ""};
    }
    first = first == nullptr ? &row : first;
  }
  if (first != nullptr) {
    return {*first, true, ""};
  }
  return {{}, false, why_not.empty() ? "\n  no kernel of this dtype" : why_not};
}

/// The length that tiles are chosen for. Packed sequences' is a mean in which each counts as often
/// as it has rows; of it two lower bounds are known, the mean that counts all alike, and what one
/// longest sequence among empty ones would make.
int usual_seqlen_q(ForwardParams const& params) {
  int const rows = params.shape.seqlen_q;
  if (params.sequences.cu_seqlens_q == nullptr || rows == 0) {
    return rows;
  }
  int64_t const longest = params.max_seqlen_q;
  return imax(rows / imax(params.shape.batch_size, 1), int(longest * longest / rows));
}

}  // namespace

std::vector<ForwardConfig> forward_rows() {
  return joined(kForwardRows<DType::kBf16>, kForwardRows<DType::kFp16>, kForwardRows<DType::kFp32>);
}

std::vector<BackwardConfig> backward_rows() {
  return joined(kBackwardRows<DType::kBf16>, kBackwardRows<DType::kFp16>,
                kBackwardRows<DType::kFp32>);
}

Selection<ForwardConfig> select_forward(KernelRequest const& request) {
  return select(forward_rows(), request);
}

Selection<BackwardConfig> select_backward(KernelRequest const& request) {
  return select(backward_rows(), request);
}

std::vector<Sm90ForwardConfig> sm90_forward_rows() {
  return joined(kSm90ForwardRows<DType::kBf16>, kSm90ForwardRows<DType::kFp16>);
}

std::vector<Sm90BackwardConfig> sm90_backward_rows() {
  return joined(kSm90BackwardRows<DType::kBf16>, kSm90BackwardRows<DType::kFp16>);
}

Sm90ForwardConfig const* select_sm90_forward(DType dtype, ForwardParams const& params,
                                             int smem_bytes) {
  if (params.scores.bias.ptr != nullptr) {
    return nullptr;  // its kernels have no registers for the addresses
  }
  Shape const& shape = params.shape;
  // Lengths that only the device knows: the mask may hide keys.
  bool const is_bounded = params.sequences.are_entries()
                              ? hides_any_key(params.mask, shape.seqlen_q, shape.seqlen_k)
                              : params.mask.is_bounded();
  int const seqlen_q = usual_seqlen_q(params);
  MaskClass const mask_class = is_bounded ? MaskClass::kBounded : MaskClass::kNone;
  return first_sm90_row(kSm90ForwardRows<DType::kBf16>, kSm90ForwardRows<DType::kFp16>, dtype,
                        shape, smem_bytes, [&](Sm90ForwardConfig const& row) {
                          return serves_options(row.extras, params) &&
                                 (row.extras != Extras::kNone || row.mask == mask_class) &&
                                 seqlen_q <= row.max_seqlen_q;
                        });
}

Sm90BackwardConfig const* select_sm90_backward(DType dtype, BackwardParams const& params,
                                               int smem_bytes) {
  if (params.scores.bias.ptr != nullptr) {
    return nullptr;
  }
  Sequences const& sequences = params.sequences;
  if ((sequences.cu_seqlens_q == nullptr) != (sequences.cu_seqlens_k == nullptr)) {
    return nullptr;  // key heads are numbered by entries, of which queries and keys need as many
  }
  return first_sm90_row(kSm90BackwardRows<DType::kBf16>, kSm90BackwardRows<DType::kFp16>, dtype,
                        params.shape, smem_bytes, [&](Sm90BackwardConfig const& row) {
                          return serves_options(row.extras, params);
                        });
}

}  // namespace flash
