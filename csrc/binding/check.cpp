#include "binding/check.h"

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

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

std::string sizes_text(Tensor const& tensor) {
  std::string text = "(";
  for (int64_t const size : tensor.sizes()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + ")";
}

bool on_same_device(Tensor const& a, Tensor const& b) {
  return a.device().type() == b.device().type() && a.get_device_index() == b.get_device_index();
}

bool same_sizes(Tensor const& a, Tensor const& b) {
  if (a.dim() != b.dim()) {
    return false;
  }
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) != b.size(dim)) {
      return false;
    }
  }
  return true;
}

void check_rank_4(char const* name, Tensor const& tensor) {
  check(tensor.dim() == 4, name, ": expected (batch, seqlen, heads, head_dim), got sizes ",
        sizes_text(tensor));
  for (int64_t const size : tensor.sizes()) {
    check(size <= kMaxSize, name, ": expected sizes up to ", kMaxSize, ", got ",
          sizes_text(tensor));
  }
}

void check_head_dim(char const* name, Tensor const& tensor) {
  check(tensor.size(3) >= 1 && tensor.size(3) <= kMaxHeadDim, name,
        ": expected head_dim from 1 to ", kMaxHeadDim, ", got ", tensor.size(3));
}

void check_same_kind(char const* name, Tensor const& tensor, char const* expected_name,
                     Tensor const& expected) {
  check(tensor.scalar_type() == expected.scalar_type(), name, ": expected the dtype of ",
        expected_name, " (", torch::headeronly::toString(expected.scalar_type()), "), got ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(on_same_device(tensor, expected), name, ": expected the device of ", expected_name);
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

Shape checked_shape(Tensor const& q, Tensor const& k, Tensor const& v) {
  check_rank_4("q", q);
  check_rank_4("k", k);
  check_rank_4("v", v);
  check_same_kind("k", k, "q", q);
  check_same_kind("v", v, "k", k);
  check(k.size(0) == q.size(0), "k: expected the batch size of q (", q.size(0), "), got ",
        k.size(0));
  check(k.size(3) == q.size(3), "k: expected the head_dim of q (", q.size(3), "), got ", k.size(3));
  check(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
        "v: expected the sizes of k ", sizes_text(k), " but for the last, got ", sizes_text(v));
  check_head_dim("q", q);
  check_head_dim("v", v);
  check(k.size(2) >= 1 && q.size(2) >= 1 && q.size(2) % k.size(2) == 0,
        "q: expected a number of heads that is a multiple of the ", k.size(2), " heads of k, got ",
        q.size(2));
  check(q.size(0) * q.size(2) <= kMaxSize, "q: expected batch * heads up to ", kMaxSize, ", got ",
        q.size(0) * q.size(2));
  return {int(q.size(0)), int(q.size(1)), int(k.size(1)), int(q.size(2)),
          int(k.size(2)), int(q.size(3)), int(v.size(3))};
}

void check_like(char const* name, Tensor const& tensor, char const* expected_name,
                Tensor const& expected) {
  check_same_kind(name, tensor, expected_name, expected);
  check(same_sizes(tensor, expected), name, ": expected the sizes of ", expected_name, " ",
        sizes_text(expected), ", got ", sizes_text(tensor));
}

void check_out(char const* name, Tensor const& tensor, Tensor const& q, Tensor const& v) {
  check_same_kind(name, tensor, "q", q);
  check(tensor.dim() == 4 && tensor.size(0) == q.size(0) && tensor.size(1) == q.size(1) &&
            tensor.size(2) == q.size(2) && tensor.size(3) == v.size(3),
        name, ": expected sizes (", q.size(0), ", ", q.size(1), ", ", q.size(2), ", ", v.size(3),
        "), got ", sizes_text(tensor));
}

void check_row_statistic(char const* name, Tensor const& tensor, Tensor const& q) {
  check(tensor.scalar_type() == ScalarType::Float, name, ": expected dtype Float, got ",
        torch::headeronly::toString(tensor.scalar_type()));
  check(on_same_device(tensor, q), name, ": expected the device of q");
  check(tensor.dim() == 3 && tensor.size(0) == q.size(0) && tensor.size(1) == q.size(2) &&
            tensor.size(2) == q.size(1),
        name, ": expected sizes (", q.size(0), ", ", q.size(2), ", ", q.size(1), "), got ",
        sizes_text(tensor));
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
