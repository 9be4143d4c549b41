#include "config/compiled_rows.h"
#include "sm90/launch.h"
#include "sm90/tensor_map.h"
#include "sm90/tile_counter.h"
#include "sm90/unit.h"

namespace flash::sm90 {
namespace {

/// K and V of the heads in a section. Small against L2, because Q and out of its tiles pass through
/// it too: 16 MB are 2 % slower at head dim 256, equal at 128.
constexpr int64_t kSectionBytes = int64_t(8) << 20;

struct Views {
  TensorView q, k, v, out;
};

Views views_of(ForwardParams const& params, DType dtype) {
  Shape const& s = params.shape;
  return {{params.q, dtype, s.batch_size, s.seqlen_q, s.num_heads, s.head_dim},
          {params.k, dtype, s.batch_size, s.seqlen_k, s.num_heads_k, s.head_dim},
          {params.v, dtype, s.batch_size, s.seqlen_k, s.num_heads_k, s.head_dim_v},
          {params.out, dtype, s.batch_size, s.seqlen_q, s.num_heads, s.head_dim_v}};
}

/// Without a mask all tiles are equal, and those of one head follow each other. Bounded: the
/// longest first within a section of heads; the last section is so large that its short tiles keep
/// every SM busy to the end.
TileOrder forward_order(Sm90ForwardConfig const& config, ForwardParams const& params,
                        Device const& device) {
  Shape const& shape = params.shape;
  TileOrder order{ceil_div(shape.seqlen_q, config.tile_m), shape.batch_size * shape.num_heads, 1,
                  params.mask.window_right >= 0};
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

}  // namespace

bool can_address(ForwardParams const& params, DType dtype) {
  Views const views = views_of(params, dtype);
  return is_addressable(views.q) && is_addressable(views.k) && is_addressable(views.v) &&
         is_addressable(views.out);
}

void forward(Sm90ForwardConfig const& config, ForwardParams const& params, Device const& device,
             Stream stream) {
  make_context_current(device.index);
  Views const views = views_of(params, config.dtype);
  int const dim = config.head_dim, dim_v = config.head_dim_v;
  ForwardKernelParams const kernel_params{.problem = params,
                                          .q = make_tensor_map(views.q, 64, dim),
                                          .k = make_tensor_map(views.k, config.tile_n, dim),
                                          .v = make_tensor_map(views.v, config.tile_n, dim_v),
                                          .out = make_tensor_map(views.out, 16, dim_v),
                                          .order = forward_order(config, params, device),
                                          .tile_counter = tile_counter(device.index, stream)};
  int const num_blocks = imin(device.num_sms, kernel_params.order.num_tiles());
  launch_in_unit(config, [&]<int kHeadDim>() {
    return ForwardUnit<kHeadDim>::launch(config, kernel_params, num_blocks, stream);
  });
}

}  // namespace flash::sm90
