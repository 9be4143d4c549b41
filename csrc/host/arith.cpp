#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "arith/block_range.h"
#include "arith/philox.h"
#include "arith/tile_order.h"
#include "host/bindings.h"

namespace py = pybind11;

namespace flash::host {
namespace {

/// (seqlen_q, seqlen_k) booleans of attends(i, j).
py::array_t<bool> attends_matrix(Mask mask, int seqlen_q, int seqlen_k) {
  py::array_t<bool> matrix({seqlen_q, seqlen_k});
  auto view = matrix.mutable_unchecked<2>();
  for (int i = 0; i < seqlen_q; ++i) {
    for (int j = 0; j < seqlen_k; ++j) {
      view(i, j) = attends(mask, i, j, seqlen_q, seqlen_k);
    }
  }
  return matrix;
}

/// (num_blocks, 2) table of range_of(grid, block).
template <class RangeOf>
py::array_t<int> range_table(TileGrid const& grid, int num_blocks, RangeOf const& range_of) {
  py::array_t<int> table({num_blocks, 2});
  auto view = table.mutable_unchecked<2>();
  for (int block = 0; block < num_blocks; ++block) {
    BlockRange const range = range_of(grid, block);
    view(block, 0) = range.min;
    view(block, 1) = range.max;
  }
  return table;
}

/// (num_tiles, 2) table of (block, batch_head) in the order they are taken.
py::array_t<int> order_table(TileOrder const& order) {
  py::array_t<int> table({order.num_tiles(), 2});
  auto view = table.mutable_unchecked<2>();
  for (int idx = 0; idx < order.num_tiles(); ++idx) {
    Tile const tile = order.tile(idx);
    view(idx, 0) = tile.block;
    view(idx, 1) = tile.batch_head;
  }
  return table;
}

py::tuple philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key_x,
                 uint32_t key_y) {
  Philox4 const bits = philox4x32_10({c0, c1, c2, c3}, key_x, key_y);
  return py::make_tuple(bits.x, bits.y, bits.z, bits.w);
}

}  // namespace

void bind_arith(py::module_& module) {
  py::class_<Mask>(module, "Mask")
      .def(py::init<int, int>(), py::arg("window_left") = -1, py::arg("window_right") = -1)
      .def_readonly("window_left", &Mask::window_left)
      .def_readonly("window_right", &Mask::window_right)
      .def("is_bounded", &Mask::is_bounded);
  py::class_<TileGrid>(module, "TileGrid")
      .def(py::init<int, int, int, int, Mask>(), py::arg("tile_m"), py::arg("tile_n"),
           py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("mask"))
      .def("num_m_blocks", &TileGrid::num_m_blocks)
      .def("num_n_blocks", &TileGrid::num_n_blocks);
  module.def("attends_matrix", attends_matrix);
  module.def("n_block_ranges", [](TileGrid const& grid) {
    return range_table(grid, grid.num_m_blocks(), n_block_range);
  });
  module.def("full_n_block_ranges", [](TileGrid const& grid) {
    return range_table(grid, grid.num_m_blocks(), full_n_block_range);
  });
  module.def("m_block_ranges", [](TileGrid const& grid) {
    return range_table(grid, grid.num_n_blocks(), m_block_range);
  });
  module.def("full_m_block_ranges", [](TileGrid const& grid) {
    return range_table(grid, grid.num_n_blocks(), full_m_block_range);
  });
  py::class_<TileOrder>(module, "TileOrder")
      .def(py::init<int, int, int, bool, int>(), py::arg("num_blocks"), py::arg("num_batch_heads"),
           py::arg("heads_per_section"), py::arg("descending"),
           py::arg("first_in_last_section") = INT_MAX)
      .def("table", order_table);
  module.def("heads_per_section", heads_per_section);
  module.def("first_in_last_section", first_in_last_section);
  module.def("hides_any_key", hides_any_key);
  module.def("philox4x32_10", philox);
  module.def("ceil_div", ceil_div);
  module.def("round_up", round_up);
}

}  // namespace flash::host
