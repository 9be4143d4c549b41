// Tiles between tensors of the input dtype and fp32 scratch matrices.
#pragma once

#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace flash::cpu {

template <class T>
[[gnu::always_inline]]
inline T* row_pointer(Strided const& x, RowRange const& rows, int row) {
  return static_cast<T*>(x.ptr) + x.offset(rows.entry, rows.head) +
         int64_t(rows.first + rows.begin + row) * x.row_stride;
}

/// Writes zeros up to the next column panel, so that products may read whole panels.
template <class Isa, class T>
void load_row(T const* from, int cols, float* to) {
  int c = 0;
  for (; c + Isa::kWidth <= cols; c += Isa::kWidth) {
    Isa::store(to + c, Isa::load(from + c));
  }
  if (c < cols) {
    T tail[Isa::kWidth] = {};
    std::memcpy(tail, from + c, (cols - c) * sizeof(T));
    Isa::store(to + c, Isa::load(tail));
    c += Isa::kWidth;
  }
  for (; c % kPanelCols != 0; c += Isa::kWidth) {
    Isa::store(to + c, typename Isa::Float{});
  }
}

/// Rows past the range are zeroed up to a whole register block.
template <class Isa, class T>
void load_tile(Strided const& from, RowRange const& rows, int cols, Matrix to) {
  for (int row = 0; row < rows.count; ++row) {
    load_row<Isa>(row_pointer<T const>(from, rows, row), cols, to.data + row * to.stride);
  }
  for (int row = rows.count; row % kMicroRows != 0; ++row) {
    std::memset(to.data + row * to.stride, 0, to.stride * sizeof(float));
  }
}

/// to = factor * from, rounded to T.
template <class Isa, class T>
void store_row(float const* from, float factor, int cols, T* to) {
  typename Isa::Float const scale = Isa::broadcast(factor);
  int c = 0;
  for (; c + Isa::kWidth <= cols; c += Isa::kWidth) {
    Isa::store(to + c, Isa::load(from + c) * scale);
  }
  if (c < cols) {
    T tail[Isa::kWidth];
    Isa::store(tail, Isa::load(from + c) * scale);
    std::memcpy(to + c, tail, (cols - c) * sizeof(T));
  }
}

template <class Isa, class T>
void store_tile(Matrix from, float factor, Strided const& to, RowRange const& rows, int cols) {
  for (int row = 0; row < rows.count; ++row) {
    store_row<Isa>(from.data + row * from.stride, factor, cols, row_pointer<T>(to, rows, row));
  }
}

/// to[c][r] = from[r][c]; columns past `rows` are zeroed up to a whole panel.
template <class Isa>
void transpose(Matrix from, int rows, int cols, Matrix to) {
  for (int c = 0; c < cols; ++c) {
    float* const to_row = to.data + c * to.stride;
    int r = 0;
    for (; r < rows; ++r) {
      to_row[r] = from.data[r * from.stride + c];
    }
    for (; r % kPanelCols != 0; ++r) {
      to_row[r] = 0.0f;
    }
  }
}

template <class Isa>
void fill_zero(Matrix x, int rows) {
  std::memset(x.data, 0, sizeof(float) * rows * x.stride);
}

}  // namespace flash::cpu
