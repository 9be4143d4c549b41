#include "config/compiled_rows.h"
#include "device/tile_source.h"
#include "sm90/launch.h"
#include "sm90/tensor_map.h"
#include "sm90/tile_counter.h"
#include "sm90/unit.h"

namespace flash::sm90 {
namespace {

/// K and V of the heads in a section. Small against L2, because Q and out of its tiles pass through
/// it too: 16 MB are 2 % slower at head dim 256, equal at 128.
constexpr int64_t kSectionBytes = int64_t(8) << 20;

/// As much as a box's row: what would be fetched besides is another box's, which asks for it at the
/// same time. 256 bytes are 6 % slower at 256 tokens and head dims 128 and 256, equal from 1024 on.
constexpr CUtensorMapL2promotion kL2Promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;

struct Views {
  TensorView q, k, v, out;
};

Views views_of(ForwardParams const& params, DType dtype) {
  Shape const& shape = params.shape;
  Sequences const& sequences = params.sequences;
  auto const of_queries = [&](Strided const& tensor, int head_dim) {
    return TensorView{tensor,
                      dtype,
                      sequences.cu_seqlens_q == nullptr,
                      sequences.entries_q,
                      shape.seqlen_q,
                      shape.num_heads,
                      head_dim};
  };
  bool const whole_keys = sequences.cu_seqlens_k == nullptr && sequences.seqused_k == nullptr &&
                          sequences.leftpad_k == nullptr;
  auto const of_keys = [&](Strided const& tensor, int head_dim) {
    return TensorView{
        tensor,  dtype, whole_keys, sequences.entries_k, shape.seqlen_k, shape.num_heads_k,
        head_dim};
  };
  return {of_queries(params.q, shape.head_dim), of_keys(params.k, shape.head_dim),
          of_keys(params.v, shape.head_dim_v), of_queries(params.out, shape.head_dim_v)};
}

/// Without a mask all tiles are equal, and those of one head follow each other. Bounded: the
/// longest first within a section of heads; the last section is so large that its short tiles keep
/// every SM busy to the end.
TileOrder forward_order(Sm90ForwardConfig const& config, ForwardParams const& params,
                        Device const& device) {
  Shape const& shape = params.shape;
  TileOrder order{ceil_div(shape.seqlen_q, config.tile_m),
                  params.sequences.entries_q * shape.num_heads, 1, params.mask.window_right >= 0};
  if (config.mask == MaskClass::kBounded) {
    int64_t const bytes_per_head = shape.kv_bytes_per_query_head(config.dtype);
    int const heads_of_two_tiles_an_sm = ceil_div(2 * device.num_sms, order.num_blocks);
    order.heads_per_section =
        heads_per_section(bytes_per_head, kSectionBytes, order.num_batch_heads);
    order.first_in_last_section = first_in_last_section(
        heads_of_two_tiles_an_sm, order.heads_per_section, order.num_batch_heads);
  }
  return order;
}

int64_t max_listed_tiles(Sm90ForwardConfig const& config, ForwardParams const& params) {
  return max_tiles(params.shape.seqlen_q, params.shape.batch_size, config.tile_m);
}

/// How many tiles at the end of a list come by their work: as many as are in a last section of
/// dense calls.
int tiles_by_work(Sm90ForwardConfig const& config, ForwardParams const& params,
                  Device const& device) {
  int64_t const bytes_per_tile =
      int64_t(config.tile_m) * (config.head_dim + config.head_dim_v) * element_size(config.dtype);
  int64_t const fit = kSectionBytes * params.shape.query_heads_per_key_head() / bytes_per_tile;
  return has_uneven_tiles(params.mask) ? imax(int(fit), 2 * device.num_sms) : 0;
}

/// Packed queries: the tiles are listed first.
LaunchedTiles forward_tiles(Sm90ForwardConfig const& config, ForwardParams const& params,
                            Device const& device, Stream stream) {
  TileOrder order = forward_order(config, params, device);
  if (params.sequences.cu_seqlens_q == nullptr) {
    return {{order, {}}, order.num_tiles()};
  }
  Tiling const tiling{.of_keys = false,
                      .tile_rows = config.tile_m,
                      .other_tile_rows = config.tile_n,
                      .descending = order.descending,
                      .num_by_work = tiles_by_work(config, params, device)};
  order.descending = false;  // the list is in order
  return {{order, list_tiles(packed_problem(params, config.dtype), {tiling, params.workspace},
                             stream, true)},
          max_listed_tiles(config, params) * params.shape.num_heads};
}

}  // namespace

bool can_address(ForwardParams const& params, DType dtype) {
  Views const views = views_of(params, dtype);
  return is_addressable(views.q) && is_addressable(views.k) && is_addressable(views.v) &&
         is_addressable(views.out);
}

std::size_t forward_workspace_bytes(Sm90ForwardConfig const& config, ForwardParams const& params) {
  return params.sequences.cu_seqlens_q == nullptr
             ? 0
             : tile_list_bytes(max_listed_tiles(config, params));
}

void forward(Sm90ForwardConfig const& config, ForwardParams const& params, Device const& device,
             Stream stream) {
  make_context_current(device.index);
  Views const views = views_of(params, config.dtype);
  LaunchedTiles const tiles = forward_tiles(config, params, device, stream);
  int const dim = config.head_dim, dim_v = config.head_dim_v;
  auto const map = [](TensorView const& view, int rows, int cols) {
    return make_tensor_map(view, rows, cols, kL2Promotion);
  };
  ForwardKernelParams const kernel_params{.problem = params,
                                          .q = map(views.q, 64, dim),
                                          .k = map(views.k, config.tile_n, dim),
                                          .v = map(views.v, config.tile_n, dim_v),
                                          .out = map(views.out, 16, dim_v),
                                          .q_rows = views.q.row_map(),
                                          .k_rows = views.k.row_map(),
                                          .v_rows = views.v.row_map(),
                                          .out_rows = views.out.row_map(),
                                          .are_entries = params.sequences.are_entries(),
                                          .tiles = tiles.source,
                                          .tile_counter = tile_counter(device.index, stream)};
  int const num_blocks = int(tiles.num_blocks < device.num_sms ? tiles.num_blocks : device.num_sms);
  launch_in_unit(config, [&]<int kHeadDim>() {
    return ForwardUnit<kHeadDim>::launch(config, kernel_params, num_blocks, stream);
  });
}

}  // namespace flash::sm90
