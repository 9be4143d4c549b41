#include <atomic>
#include <climits>

#include "config/compiled_rows.h"
#include "sm90/launch.h"
#include "sm90/tensor_map.h"
#include "sm90/unit.h"

namespace flash::sm90 {
namespace {

/// Q, dO and fp32 sums of a section: with a second set of sums, which may still be converted, about
/// half of L2.
constexpr int64_t kSectionBytes = int64_t(16) << 20;

std::atomic<int> section_limit{INT_MAX};

struct Views {
  TensorView q, k, v, dout, dk, dv;
};

Views views_of(BackwardParams const& params, DType dtype) {
  Shape const& s = params.shape;
  auto const of_queries = [&](Strided const& tensor, int head_dim) {
    return TensorView{tensor, dtype, true, s.batch_size, s.seqlen_q, s.num_heads, head_dim};
  };
  auto const of_keys = [&](Strided const& tensor, int head_dim) {
    return TensorView{tensor, dtype, true, s.batch_size, s.seqlen_k, s.num_heads_k, head_dim};
  };
  return {of_queries(params.q, s.head_dim), of_keys(params.k, s.head_dim),
          of_keys(params.v, s.head_dim_v),  of_queries(params.dout, s.head_dim_v),
          of_keys(params.dk, s.head_dim),   of_keys(params.dv, s.head_dim_v)};
}

/// Deterministic sums are added in the order in which items are drawn. With a right bound, items
/// that start at their end of the diagonal, the last key tile first, find those before them ahead;
/// from the last query tile back all would start together and wait for each other.
bool is_ascending(BackwardParams const& params) {
  return params.deterministic && params.mask.window_right >= 0;
}

/// A key head's section is over before its slot is needed again, which is what keeps the waits free
/// of cycles: slots >= section. Ascending, a key head's last item is its longest, and only behind
/// that one are its sums converted: a third section is under way meanwhile.
BackwardDivision divide(Sm90BackwardConfig const& config, BackwardParams const& params,
                        int section) {
  Shape const& shape = params.shape;
  bool const ascending = is_ascending(params);
  int const m_blocks = ceil_div(shape.seqlen_q, config.tile_m);
  int const n_blocks = ceil_div(shape.seqlen_k, config.tile_n);
  int const query_tiles = shape.query_heads_per_key_head() * m_blocks;
  int const key_heads = shape.batch_size * shape.num_heads_k;
  return {.m_blocks = m_blocks,
          .query_tiles = query_tiles,
          .key_heads = key_heads,
          .slots = imin((ascending ? 3 : 2) * section, key_heads),
          .items = {n_blocks, key_heads, section, ascending},
          .tiles = {query_tiles, key_heads, section, !ascending},
          .step = ascending ? 1 : -1};
}

/// Tiles and counters are numbered by ints, 16 bytes of the sums by 32 bits.
bool can_number(Sm90BackwardConfig const& config, BackwardDivision const& division) {
  return BackwardWorkspace::sums_bytes(config, division) / 16 <= UINT32_MAX &&
         division.num_tiles() < INT_MAX / 4 &&
         int64_t(division.items.num_blocks) * division.key_heads < INT_MAX;
}

}  // namespace

bool can_address(Sm90BackwardConfig const& config, BackwardParams const& params,
                 Device const& device) {
  Views const views = views_of(params, config.dtype);
  return is_addressable(views.q) && is_addressable(views.k) && is_addressable(views.v) &&
         is_addressable(views.dout) && is_addressable(views.dk) && is_addressable(views.dv) &&
         can_number(config, divide(config, params, backward_section(config, params.shape, device)));
}

int backward_section(Sm90BackwardConfig const& config, Shape const& shape, Device const& device) {
  int const key_heads = shape.batch_size * shape.num_heads_k;
  int64_t const bytes_per_row = (config.head_dim + config.head_dim_v) * element_size(config.dtype) +
                                config.head_dim * int64_t(sizeof(float));
  int64_t const bytes_per_head =
      bytes_per_row * shape.query_heads_per_key_head() * round_up(shape.seqlen_q, config.tile_m);
  int const fit = heads_per_section(bytes_per_head, kSectionBytes, key_heads);
  int const one_item_an_sm =
      imin(device.num_sms / ceil_div(shape.seqlen_k, config.tile_n), key_heads);
  return imin(section_limit.load(std::memory_order_relaxed), imax(fit, one_item_an_sm));
}

std::size_t backward_workspace_bytes(Sm90BackwardConfig const& config, BackwardParams const& params,
                                     int section) {
  BackwardDivision const division = divide(config, params, section);
  return std::size_t(BackwardWorkspace::sums_bytes(config, division) +
                     BackwardWorkspace::lse_bytes(params) +
                     BackwardWorkspace::num_counters(division) * int64_t(sizeof(int)));
}

void backward(Sm90BackwardConfig const& config, BackwardParams const& params, int section,
              Device const& device, Stream stream) {
  make_context_current(device.index);
  Views const views = views_of(params, config.dtype);
  BackwardDivision const division = divide(config, params, section);
  char* const lse =
      static_cast<char*>(params.workspace) + BackwardWorkspace::sums_bytes(config, division);
  int* const counters = reinterpret_cast<int*>(lse + BackwardWorkspace::lse_bytes(params));
  int const dim = config.head_dim, dim_v = config.head_dim_v;
  BackwardKernelParams const kernel_params{
      .problem = params,
      .q = make_tensor_map(views.q, config.tile_m, dim),
      .dout = make_tensor_map(views.dout, config.tile_m, dim_v),
      .k = make_tensor_map(views.k, config.tile_n, dim),
      .v = make_tensor_map(views.v, config.tile_n, dim_v),
      .dk = make_tensor_map(views.dk, 64, dim),
      .dv = make_tensor_map(views.dv, 64, dim_v),
      .division = division,
      .workspace = {.dq_sums = static_cast<float*>(params.workspace),
                    .lse_log2 = reinterpret_cast<float*>(lse),
                    .next = counters,
                    .contributed = counters + 2,
                    .converted = counters + 2 + division.num_tiles()}};
  int const num_blocks = imin(device.num_sms, division.items.num_tiles());
  launch_in_unit(config, [&]<int kHeadDim>() {
    return BackwardUnit<kHeadDim>::launch(config, kernel_params, num_blocks, stream);
  });
}

int limit_section(int heads) {
  return section_limit.exchange(heads);
}

}  // namespace flash::sm90
