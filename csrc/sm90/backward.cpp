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

int num_clusters(Sm90BackwardConfig const& config, Device const& device) {
  return device.num_sms / config.cluster_blocks();
}

bool is_packed(BackwardParams const& params) {
  return params.sequences.cu_seqlens_q != nullptr;
}

Views views_of(BackwardParams const& params, DType dtype) {
  Shape const& s = params.shape;
  bool const whole = !is_packed(params);
  auto const of_queries = [&](Strided const& tensor, int head_dim) {
    return TensorView{tensor,     dtype,       whole,   params.sequences.entries_q,
                      s.seqlen_q, s.num_heads, head_dim};
  };
  auto const of_keys = [&](Strided const& tensor, int head_dim) {
    return TensorView{tensor,     dtype,         whole,   params.sequences.entries_k,
                      s.seqlen_k, s.num_heads_k, head_dim};
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

/// Query tiles of a query head, and how many key tiles of a key head there may be.
int query_blocks(Sm90BackwardConfig const& config, BackwardParams const& params) {
  return is_packed(params) ? params.softmax_d_rows / config.tile_m
                           : ceil_div(params.shape.seqlen_q, config.tile_m);
}
int64_t max_key_blocks(Sm90BackwardConfig const& config, BackwardParams const& params) {
  Shape const& shape = params.shape;
  return is_packed(params) ? max_tiles(shape.seqlen_k, shape.batch_size, config.tile_n)
                           : ceil_div(shape.seqlen_k, config.tile_n);
}

/// A key head's section is over before its slot is needed again, which is what keeps the waits free
/// of cycles: slots >= section. Ascending, a key head's last item is its longest, and only behind
/// that one are its sums converted: a third section is under way meanwhile. A key head has the
/// tiles of all packed sequences, longest first.
BackwardDivision divide(Sm90BackwardConfig const& config, BackwardParams const& params,
                        int section) {
  Shape const& shape = params.shape;
  bool const ascending = is_ascending(params);
  int const m_blocks = query_blocks(config, params);
  int const n_blocks = int(max_key_blocks(config, params));
  int const group_size = shape.query_heads_per_key_head();
  int const key_heads = params.sequences.entries_k * shape.num_heads_k;
  BackwardDivision division{.m_blocks = m_blocks,
                            .query_tiles = group_size * m_blocks,
                            .key_heads = key_heads,
                            .slots = imin((ascending ? 3 : 2) * section, key_heads),
                            .items = {{n_blocks, key_heads, section, ascending}, {}},
                            .tiles = {{group_size * m_blocks, key_heads, section, !ascending}, {}},
                            .step = ascending ? 1 : -1};
  if (is_packed(params)) {
    division.items.order = {n_blocks, key_heads, section, false};  // lists are in order
    division.tiles.order = {m_blocks, shape.num_heads, group_size * section, false};
  }
  return division;
}

/// Of Q, dO and sums, a row of all query heads that read a key head.
int64_t bytes_per_row(Sm90BackwardConfig const& config, BackwardParams const& params) {
  int64_t const of_head = (config.head_dim + config.head_dim_v) * element_size(config.dtype) +
                          config.head_dim * int64_t(sizeof(float));
  return of_head * params.shape.query_heads_per_key_head();
}

/// Where the lists of packed tiles are written, behind the rest of the workspace.
struct Lists {
  ListRequest items, tiles;
  int64_t bytes;
};

/// A list ends with the tiles of `rows_by_work` rows in the order of their work.
Lists lists_of(Sm90BackwardConfig const& config, BackwardParams const& params, int rows_by_work,
               char* memory) {
  if (!is_packed(params)) {
    return {};
  }
  Shape const& shape = params.shape;
  bool const ascending = is_ascending(params);
  int64_t const items_bytes = int64_t(tile_list_bytes(max_key_blocks(config, params)));
  int64_t const tiles_bytes =
      int64_t(tile_list_bytes(max_tiles(shape.seqlen_q, shape.batch_size, config.tile_m)));
  return {{{.of_keys = true,
            .tile_rows = config.tile_n,
            .other_tile_rows = config.tile_m,
            .descending = ascending,
            .num_by_work = rows_by_work / config.tile_n},
           memory},
          {{.of_keys = false,
            .tile_rows = config.tile_m,
            .other_tile_rows = config.tile_n,
            .descending = !ascending,
            .num_by_work = rows_by_work / config.tile_m},
           memory + items_bytes},
          items_bytes + tiles_bytes};
}

/// As many as are in a section of dense calls. Deterministic sums need the order of a sequence's
/// tiles.
int rows_by_work(Sm90BackwardConfig const& config, BackwardParams const& params,
                 Device const& device) {
  int const section = imax(int(kSectionBytes / bytes_per_row(config, params)),
                           num_clusters(config, device) * config.tile_n);
  return has_uneven_tiles(params.mask) && !params.deterministic ? section : 0;
}

/// Tiles and counters are numbered by ints, 16 bytes of the sums by 32 bits.
bool can_number(Sm90BackwardConfig const& config, BackwardDivision const& division) {
  return BackwardWorkspace::sums_bytes(config, division) / 16 <= UINT32_MAX &&
         division.num_tiles() < INT_MAX / 4 &&
         int64_t(division.items.order.num_blocks) * division.key_heads < INT_MAX;
}

}  // namespace

bool can_address(Sm90BackwardConfig const& config, BackwardParams const& params,
                 Device const& device) {
  Views const views = views_of(params, config.dtype);
  return is_addressable(views.q) && is_addressable(views.k) && is_addressable(views.v) &&
         is_addressable(views.dout) && is_addressable(views.dk) && is_addressable(views.dv) &&
         can_number(config, divide(config, params, backward_section(config, params, device)));
}

int backward_section(Sm90BackwardConfig const& config, BackwardParams const& params,
                     Device const& device) {
  Shape const& shape = params.shape;
  int const key_heads = params.sequences.entries_k * shape.num_heads_k;
  int64_t const bytes_per_head =
      bytes_per_row(config, params) * round_up(shape.seqlen_q, config.tile_m);
  int const fit = heads_per_section(bytes_per_head, kSectionBytes, key_heads);
  int const one_item_an_sm =
      imin(num_clusters(config, device) / ceil_div(shape.seqlen_k, config.tile_n), key_heads);
  return imin(section_limit.load(std::memory_order_relaxed), imax(fit, one_item_an_sm));
}

std::size_t backward_workspace_bytes(Sm90BackwardConfig const& config, BackwardParams const& params,
                                     int section) {
  BackwardDivision const division = divide(config, params, section);
  return std::size_t(BackwardWorkspace::sums_bytes(config, division) +
                     BackwardWorkspace::lse_bytes(params) +
                     BackwardWorkspace::num_counters(division) * int64_t(sizeof(int)) +
                     lists_of(config, params, 0, nullptr).bytes);
}

void backward(Sm90BackwardConfig const& config, BackwardParams const& params, int section,
              Device const& device, Stream stream) {
  make_context_current(device.index);
  Views const views = views_of(params, config.dtype);
  BackwardDivision division = divide(config, params, section);
  char* const lse =
      static_cast<char*>(params.workspace) + BackwardWorkspace::sums_bytes(config, division);
  int* const counters = reinterpret_cast<int*>(lse + BackwardWorkspace::lse_bytes(params));
  if (is_packed(params)) {
    int* const end = counters + BackwardWorkspace::num_counters(division);
    Lists const lists = lists_of(config, params, rows_by_work(config, params, device),
                                 reinterpret_cast<char*>(end));
    list_tiles(packed_problem(params, config.dtype), lists.items, lists.tiles, stream, true);
    division.items.list = lists.items.list();
    division.tiles.list = lists.tiles.list();
  }
  int const dim = config.head_dim, dim_v = config.head_dim_v;
  int const stored_keys = config.is_paired() ? 16 : 64;
  int const query_rows = config.tile_m / config.cluster_blocks();
  BackwardKernelParams const kernel_params{
      .problem = params,
      .q = make_tensor_map(views.q, query_rows, dim),
      .dout = make_tensor_map(views.dout, query_rows, dim_v),
      .k = make_tensor_map(views.k, config.block_keys(), dim),
      .v = make_tensor_map(views.v, config.block_keys(), dim_v),
      .dk = make_tensor_map(views.dk, stored_keys, dim),
      .dv = make_tensor_map(views.dv, stored_keys, dim_v),
      .rows = views.q.row_map(),
      .division = division,
      .workspace = {.dq_sums = static_cast<float*>(params.workspace),
                    .lse_log2 = reinterpret_cast<float*>(lse),
                    .next = counters,
                    .contributed = counters + 2,
                    .converted = counters + 2 + division.num_tiles()}};
  int64_t const num_items =
      int64_t(division.items.order.num_blocks) * division.items.order.num_batch_heads;
  int const clusters = num_clusters(config, device);
  int const num_blocks = config.cluster_blocks() * int(num_items < clusters ? num_items : clusters);
  launch_in_unit(config, [&]<int kHeadDim>() {
    return BackwardUnit<kHeadDim>::launch(config, kernel_params, num_blocks, stream);
  });
}

int limit_section(int heads) {
  return section_limit.exchange(heads);
}

}  // namespace flash::sm90
