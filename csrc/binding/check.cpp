#include "binding/check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace flash::binding {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

/// Of any dimension: rounded up to whole tiles it still is an int.
constexpr int64_t kMaxSize = kMaxInt - 255;

template <class... Parts>
[[noreturn]]
void fail(Parts const&... parts) {
  std::ostringstream text;
  text << "flash_attn: ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void check(bool condition, Parts const&... parts) {
  if (!condition) [[unlikely]] {
    fail(parts...);
  }
}

/// Sizes of a tensor. Turned into text only where a check fails.
struct Sizes {
  static constexpr int kMaxRank = 8;
  int rank;
  int64_t size[kMaxRank];

  explicit Sizes(Tensor const& tensor) : rank(int(std::min<int64_t>(tensor.dim(), kMaxRank))) {
    for (int dim = 0; dim < rank; ++dim) {
      size[dim] = tensor.size(dim);
    }
  }
  friend bool operator==(Sizes const& a, Sizes const& b) {
    return a.rank == b.rank && std::equal(a.size, a.size + a.rank, b.size);
  }
  friend std::ostream& operator<<(std::ostream& text, Sizes const& sizes) {
    text << "(";
    for (int dim = 0; dim < sizes.rank; ++dim) {
      text << (dim > 0 ? ", " : "") << sizes.size[dim];
    }
    return text << ")";
  }
};

void check_sizes(char const* name, Tensor const& tensor, Sizes const& expected) {
  Sizes const sizes(tensor);
  check(sizes == expected, name, ": expected sizes ", expected, ", got ", sizes);
}

bool on_same_device(Tensor const& a, Tensor const& b) {
  return a.device().type() == b.device().type() && a.get_device_index() == b.get_device_index();
}

/// Sizes of a tensor of rows: (entries, rows, heads, cols), or (rows, heads, cols) if packed.
struct RowSizes {
  int64_t entries, rows, heads, cols;
};

RowSizes row_sizes(char const* name, Tensor const& tensor, bool packed) {
  check(tensor.dim() == (packed ? 3 : 4), name, ": expected ",
        packed ? "(total, heads, head_dim)" : "(batch, seqlen, heads, head_dim)", ", got sizes ",
        Sizes(tensor));
  for (int64_t const size : tensor.sizes()) {
    check(size <= kMaxSize, name, ": expected sizes up to ", kMaxSize, ", got ", Sizes(tensor));
  }
  int64_t const last = tensor.dim() - 1;
  return {packed ? 1 : tensor.size(0), tensor.size(last - 2), tensor.size(last - 1),
          tensor.size(last)};
}

void check_head_dim(char const* name, int64_t head_dim) {
  check(head_dim >= 1 && head_dim <= kMaxHeadDim, name, ": expected head_dim from 1 to ",
        kMaxHeadDim, ", got ", head_dim);
}

void check_same_kind(char const* name, Tensor const& tensor, char const* expected_name,
                     Tensor const& expected) {
  check(tensor.scalar_type() == expected.scalar_type(), name, ": expected the dtype of ",
        expected_name, " (", torch::headeronly::toString(expected.scalar_type()), "), got ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(on_same_device(tensor, expected), name, ": expected the device of ", expected_name);
}

/// fp32 on the device of q.
void check_float(char const* name, Tensor const& tensor, Tensor const& q, bool contiguous = true) {
  check(tensor.scalar_type() == ScalarType::Float, name, ": expected dtype Float, got ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(on_same_device(tensor, q), name, ": expected the device of q");
  check(!contiguous || tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

/// One int32 a sequence, or null.
int32_t const* index_pointer(char const* name, std::optional<Tensor> const& tensor, Tensor const& q,
                             int64_t size) {
  if (!tensor) {
    return nullptr;
  }
  check(tensor->scalar_type() == ScalarType::Int, name, ": expected dtype Int, got ",
        torch::headeronly::toString(tensor->scalar_type()));
  check(on_same_device(*tensor, q), name, ": expected the device of q");
  check(tensor->dim() == 1 && tensor->size(0) == size && tensor->is_contiguous(), name,
        ": expected a contiguous tensor of sizes (", size, "), got ", Sizes(*tensor));
  return static_cast<int32_t const*>(tensor->data_ptr());
}

int64_t batch_size(RowSizes const& q, RowSizes const& k, SequenceTensors const& given) {
  if (!given.cu_seqlens_q && !given.cu_seqlens_k && !given.batch_idx_k) {
    check(k.entries == q.entries, "k: expected the batch size of q (", q.entries, "), got ",
          k.entries);
    return q.entries;
  }
  auto const packed_batch = [](char const* name, Tensor const& cu_seqlens) {
    check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, name,
          ": expected sizes (batch + 1), got ", Sizes(cu_seqlens));
    return cu_seqlens.size(0) - 1;
  };
  int64_t const batch =
      given.cu_seqlens_q ? packed_batch("cu_seqlens_q", *given.cu_seqlens_q) : q.entries;
  if (given.cu_seqlens_k) {
    check(!given.batch_idx_k, "batch_idx_k: expected None with packed keys");
  } else if (given.batch_idx_k) {
    check(k.entries >= 1 || batch == 0, "k: expected at least one entry, got none");
  } else {
    check(k.entries == batch, "k: expected a batch size of ", batch, ", got ", k.entries);
  }
  return batch;
}

/// `tensor` as it broadcasts to the scores. Its sizes have been checked.
Bias broadcast(Tensor const& tensor, DType dtype, Shape const& shape) {
  int64_t const sizes[] = {shape.batch_size, shape.num_heads, shape.seqlen_q, shape.seqlen_k};
  int64_t strides[4] = {};
  bool is_shared = false;
  for (int64_t dim = 0; dim < 4; ++dim) {
    int64_t const own = dim + tensor.dim() - 4;
    strides[dim] = own >= 0 && tensor.size(own) > 1 ? tensor.stride(own) : 0;
    is_shared |= strides[dim] == 0 && sizes[dim] > 1;
  }
  return {tensor.data_ptr(), dtype, is_shared, strides[0], strides[1], strides[2], strides[3]};
}

/// Of the dtype of q or fp32, of sequences that are whole entries.
Bias checked_bias(Tensor const& bias, Tensor const& q, Problem const& problem) {
  check(problem.sequences.are_entries(),
        "bias: expected None with packed sequences or a cache, whose pairs have no rows of it");
  check(bias.scalar_type() == ScalarType::Float || bias.scalar_type() == q.scalar_type(),
        "bias: expected dtype Float or that of q (", torch::headeronly::toString(q.scalar_type()),
        "), got ", torch::headeronly::toString(bias.scalar_type()));
  check(on_same_device(bias, q), "bias: expected the device of q");
  Shape const& shape = problem.shape;
  int64_t const sizes[] = {shape.batch_size, shape.num_heads, shape.seqlen_q, shape.seqlen_k};
  bool fits = bias.dim() <= 4;
  for (int64_t dim = 0; fits && dim < bias.dim(); ++dim) {
    fits = bias.size(dim) == 1 || bias.size(dim) == sizes[dim + 4 - bias.dim()];
  }
  check(fits, "bias: expected sizes that broadcast to (", sizes[0], ", ", sizes[1], ", ", sizes[2],
        ", ", sizes[3], "), got ", Sizes(bias));
  DType const dtype = bias.scalar_type() == ScalarType::Float ? DType::kFp32 : checked_dtype(q);
  return broadcast(bias, dtype, shape);
}

}  // namespace

DType checked_dtype(Tensor const& q) {
  switch (q.scalar_type()) {
    case ScalarType::Half:
      return DType::kFp16;
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Float:
      return DType::kFp32;
    default:
      fail("q: expected dtype Half, BFloat16 or Float, got ",
           torch::headeronly::toString(q.scalar_type()));
  }
}

Problem checked_problem(Tensor const& q, Tensor const& k, Tensor const& v,
                        SequenceTensors const& given) {
  bool const packed_q = given.cu_seqlens_q.has_value(), packed_k = given.cu_seqlens_k.has_value();
  RowSizes const q_sizes = row_sizes("q", q, packed_q), k_sizes = row_sizes("k", k, packed_k),
                 v_sizes = row_sizes("v", v, packed_k);
  check_same_kind("k", k, "q", q);
  check_same_kind("v", v, "k", k);
  check(k_sizes.cols == q_sizes.cols, "k: expected the head_dim of q (", q_sizes.cols, "), got ",
        k_sizes.cols);
  check(v_sizes.entries == k_sizes.entries && v_sizes.rows == k_sizes.rows &&
            v_sizes.heads == k_sizes.heads,
        "v: expected the sizes of k ", Sizes(k), " but for the last, got ", Sizes(v));
  check_head_dim("q", q_sizes.cols);
  check_head_dim("v", v_sizes.cols);
  check(k_sizes.heads >= 1 && q_sizes.heads >= 1 && q_sizes.heads % k_sizes.heads == 0,
        "q: expected a number of heads that is a multiple of the ", k_sizes.heads,
        " heads of k, got ", q_sizes.heads);

  int64_t const batch = batch_size(q_sizes, k_sizes, given);
  check(batch * q_sizes.heads <= kMaxSize, "q: expected batch * heads up to ", kMaxSize, ", got ",
        batch * q_sizes.heads);
  check(!packed_q || q_sizes.rows + 128 * batch <= kMaxSize,
        "q: expected total + 128 * batch up to ", kMaxSize, ", got ", q_sizes.rows + 128 * batch);
  return {{int(batch), int(q_sizes.rows), int(k_sizes.rows), int(q_sizes.heads), int(k_sizes.heads),
           int(q_sizes.cols), int(v_sizes.cols)},
          {.entries_q = int(q_sizes.entries),
           .entries_k = int(k_sizes.entries),
           .cu_seqlens_q = index_pointer("cu_seqlens_q", given.cu_seqlens_q, q, batch + 1),
           .cu_seqlens_k = index_pointer("cu_seqlens_k", given.cu_seqlens_k, q, batch + 1),
           .seqused_k = index_pointer("seqused_k", given.seqused_k, q, batch),
           .leftpad_k = index_pointer("leftpad_k", given.leftpad_k, q, batch),
           .batch_idx_k = index_pointer("batch_idx_k", given.batch_idx_k, q, batch)}};
}

ScoreOptions checked_scores(double softcap, std::optional<Tensor> const& alibi_slopes,
                            std::optional<Tensor> const& bias, Tensor const& q,
                            Problem const& problem) {
  Shape const& shape = problem.shape;
  check(std::isfinite(float(softcap)) && softcap >= 0,
        "softcap: expected a number that is 0 (none) or above, got ", softcap);
  ScoreOptions result{.softcap = float(softcap),
                      .alibi_slopes = nullptr,
                      .alibi_batch_stride = 0,
                      .bias = bias ? checked_bias(*bias, q, problem) : Bias{}};
  if (alibi_slopes) {
    Tensor const& slopes = *alibi_slopes;
    check_float("alibi_slopes", slopes, q);
    bool const per_sequence = slopes.dim() == 2 && slopes.size(0) == shape.batch_size;
    check((per_sequence || slopes.dim() == 1) && slopes.size(slopes.dim() - 1) == shape.num_heads,
          "alibi_slopes: expected sizes (", shape.num_heads, ") or (", shape.batch_size, ", ",
          shape.num_heads, "), got ", Sizes(slopes));
    result.alibi_slopes = static_cast<float const*>(slopes.data_ptr());
    result.alibi_batch_stride = per_sequence ? shape.num_heads : 0;
  }
  return result;
}

Bias checked_dbias(Tensor const& dbias, std::optional<Tensor> const& bias, Problem const& problem,
                   bool deterministic) {
  check(bias.has_value(), "dbias: expected None without a bias");
  check_float("dbias", dbias, *bias);
  check_sizes("dbias", dbias, Sizes(*bias));
  Bias const result = broadcast(dbias, DType::kFp32, problem.shape);
  check(!deterministic || !result.is_shared,
        "deterministic: expected False with the gradient of a bias that is broadcast, of sizes ",
        Sizes(*bias), ": its sums have no fixed order");
  return result;
}

Dropout checked_dropout(double dropout_p, std::optional<Tensor> const& rng_state, Tensor const& q) {
  check(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected 0 <= dropout_p < 1, got ", dropout_p);
  if (dropout_p == 0) {
    return {nullptr, 255, 1.f};
  }
  check(rng_state.has_value(), "rng_state: expected the seed and offset of dropout, got None");
  Tensor const& state = *rng_state;
  check(state.scalar_type() == ScalarType::Long && state.dim() == 1 && state.size(0) == 2 &&
            state.is_contiguous() && on_same_device(state, q),
        "rng_state: expected two Longs (seed, offset) on the device of q, got sizes ", Sizes(state),
        " of ", torch::headeronly::toString(state.scalar_type()));
  return {static_cast<int64_t const*>(state.data_ptr()), int(std::floor((1 - dropout_p) * 255)),
          float(1 / (1 - dropout_p))};
}

float const* checked_sink(std::optional<Tensor> const& sink, Tensor const& q, Shape const& shape) {
  if (!sink) {
    return nullptr;
  }
  check_float("sink", *sink, q);
  check(sink->dim() == 1 && sink->size(0) == shape.num_heads, "sink: expected sizes (",
        shape.num_heads, "), got ", Sizes(*sink));
  return static_cast<float const*>(sink->data_ptr());
}

void check_like(char const* name, Tensor const& tensor, char const* expected_name,
                Tensor const& expected) {
  check_same_kind(name, tensor, expected_name, expected);
  check(Sizes(tensor) == Sizes(expected), name, ": expected the sizes of ", expected_name, " ",
        Sizes(expected), ", got ", Sizes(tensor));
}

void check_out(char const* name, Tensor const& tensor, Tensor const& q, Tensor const& v) {
  check_same_kind(name, tensor, "q", q);
  Sizes expected(q);
  expected.size[expected.rank - 1] = v.size(v.dim() - 1);
  check_sizes(name, tensor, expected);
}

void check_row_statistic(char const* name, Tensor const& tensor, Tensor const& q) {
  check_float(name, tensor, q, false);
  Sizes expected(q);
  --expected.rank;
  std::swap(expected.size[expected.rank - 1], expected.size[expected.rank - 2]);
  check_sizes(name, tensor, expected);
}

void check_rows_contiguous(char const* name, Tensor const& tensor) {
  int64_t const last = tensor.dim() - 1;
  check(tensor.stride(last) == 1 || tensor.size(last) <= 1, name,
        ": expected a contiguous last dimension, got stride ", tensor.stride(last));
}

void check_writable(char const* name, Tensor const& tensor) {
  check_rows_contiguous(name, tensor);
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    check(tensor.stride(dim) != 0 || tensor.size(dim) <= 1, name,
          ": expected a tensor to write to, got an expanded one (stride 0 in dimension ", dim, ")");
  }
}

float checked_scale(double softmax_scale) {
  float const scale = float(softmax_scale);
  check(std::isfinite(scale) && scale > 0,
        "softmax_scale: expected a number that float32 holds as finite and above 0, got ",
        softmax_scale);
  return scale;
}

int window_bound(int64_t bound) {
  return bound < 0 ? -1 : int(bound > kMaxInt ? kMaxInt : bound);
}

}  // namespace flash::binding
