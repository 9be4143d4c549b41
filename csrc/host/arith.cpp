#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "arith/block_range.h"
#include "arith/dropout.h"
#include "arith/philox.h"
#include "arith/sequence.h"
#include "arith/tile_order.h"
#include "host/bindings.h"
#include "params.h"

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
  Philox4 const bits = philox4x32_7({c0, c1, c2, c3}, key_x, key_y);
  return py::make_tuple(bits.x, bits.y, bits.z, bits.w);
}

/// (seqlen_q, seqlen_k) booleans of dropout_keeps(row, col).
py::array_t<bool> kept_matrix(int last_kept_byte, int64_t seed, int64_t offset, int batch_head,
                              int seqlen_q, int seqlen_k) {
  Dropout const dropout{nullptr, last_kept_byte, 1.f};
  py::array_t<bool> matrix({seqlen_q, seqlen_k});
  auto view = matrix.mutable_unchecked<2>();
  for (int row = 0; row < seqlen_q; ++row) {
    for (int col = 0; col < seqlen_k; ++col) {
      view(row, col) = dropout_keeps(dropout, seed, offset, batch_head, row, col);
    }
  }
  return matrix;
}

using Values = std::optional<std::vector<int32_t>>;

int32_t const* data_of(Values const& values) {
  return values ? values->data() : nullptr;
}

/// A row for each sequence: entry_q, first_q, seqlen_q, entry_k, first_k, seqlen_k, and the row of
/// softmax_d where it begins.
py::array_t<int> sequence_table(int batch_size, int rows_q, int rows_k, int entries_k,
                                Values const& cu_seqlens_q, Values const& cu_seqlens_k,
                                Values const& seqused_k, Values const& leftpad_k,
                                Values const& batch_idx_k) {
  Sequences const sequences{.entries_q = cu_seqlens_q ? 1 : batch_size,
                            .entries_k = cu_seqlens_k ? 1 : entries_k,
                            .cu_seqlens_q = data_of(cu_seqlens_q),
                            .cu_seqlens_k = data_of(cu_seqlens_k),
                            .seqused_k = data_of(seqused_k),
                            .leftpad_k = data_of(leftpad_k),
                            .batch_idx_k = data_of(batch_idx_k)};
  py::array_t<int> table({batch_size, 7});
  auto view = table.mutable_unchecked<2>();
  for (int batch = 0; batch < batch_size; ++batch) {
    Sequence const one = sequence_of(sequences, batch, rows_q, rows_k);
    int const row[] = {one.entry_q,
                       one.first_q,
                       one.seqlen_q,
                       one.entry_k,
                       one.first_k,
                       one.seqlen_k,
                       first_softmax_d_row(one, sequences, batch)};
    for (int col = 0; col < 7; ++col) {
      view(batch, col) = row[col];
    }
  }
  return table;
}

/// Rows of softmax_d with packed queries.
int packed_softmax_d_rows(int batch_size, int rows_q) {
  int32_t const begins_at_0 = 0;
  Sequences sequences{};
  sequences.cu_seqlens_q = &begins_at_0;
  return softmax_d_rows({batch_size, rows_q, 0, 1, 1, 8, 8}, sequences);
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
  module.def("philox4x32_7", philox);
  module.def("kept_matrix", kept_matrix);
  module.def("sequence_table", sequence_table, py::arg("batch_size"), py::arg("rows_q"),
             py::arg("rows_k"), py::arg("entries_k"), py::arg("cu_seqlens_q") = py::none(),
             py::arg("cu_seqlens_k") = py::none(), py::arg("seqused_k") = py::none(),
             py::arg("leftpad_k") = py::none(), py::arg("batch_idx_k") = py::none());
  module.def("packed_softmax_d_rows", packed_softmax_d_rows);
  module.def("ceil_div", ceil_div);
  module.def("round_up", round_up);
}

}  // namespace flash::host
