// An additive bias on the accumulators of a score tile, and its gradient.
#pragma once

#include "device/fresh.cuh"
#include "device/quad.cuh"
#include "device/softcap.cuh"
#include "device/softmax.cuh"

namespace flash {

/// The head whose scores a tile has.
struct ScoreHead {
  int batch, head;
  Sequence const& sequence;
};

/// Rows from a lane's first row to the end of its head's scores.
__device__ __forceinline__ int rows_left(PiecePlacement const& place, ScoreHead const& of) {
  return of.sequence.seqlen_q - place.first_row - fresh_thread_idx() % 32 / 4;
}

/// Calls `visit(n, e, element, is_col)` for a lane's elements of the bias in the row `row` below
/// its first one; is_col is false past the end of the columns. The address is computed anew for
/// every row and moved from one column to the next: held in registers, those of a tile spilled 30
/// to 430 bytes (nvcc 13.0).
template <class T, int kN, class Visit>
__device__ __forceinline__ void for_each_in_row(Bias const& bias, PiecePlacement const& place,
                                                ScoreHead const& of, int row, Visit const& visit) {
  int const lane_idx = fresh_thread_idx() % 32;
  int const lane_row = place.first_row + lane_idx / 4 + row;
  int const lane_col = place.first_col + lane_idx % 4 * 2;
  int const cols_left = of.sequence.seqlen_k - lane_col;
  T* element = static_cast<T*>(bias.ptr) + bias.plane(fresh(of.batch), fresh(of.head)) +
               lane_row * bias.row_stride + lane_col * bias.col_stride;
  int last_col = 0;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int const col = n / 2 * place.col_step + n % 2 * 8 + e;
      element = fresh(element + fresh(col - last_col) * bias.col_stride);
      last_col = col;
      visit(n, e, element, col < cols_left);
    }
  }
}

/// Calls `visit(m, n, e, value)` with the bias of the lane's elements e of fragments (m, n). Those
/// past the end of the rows or columns are left out: no result depends on their scores.
template <DType kDType, int kM, int kN, class Visit>
__device__ __forceinline__ void for_each_bias(Bias const& bias, PiecePlacement const& place,
                                              ScoreHead const& of, Visit const& visit) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = m * place.row_step + 8 * half;
      if (row >= rows_left(place, of)) {
        continue;
      }
      if (kDType == DType::kFp32 || bias.dtype == DType::kFp32) {
        for_each_in_row<float const, kN>(bias, place, of, row,
                                         [&](int n, int e, float const* element, bool is_col) {
                                           if (is_col) {
                                             visit(m, n, 2 * half + e, *element);
                                           }
                                         });
      } else {
        for_each_in_row<uint16_t const, kN>(
            bias, place, of, row, [&](int n, int e, uint16_t const* element, bool is_col) {
              if (is_col) {
                visit(m, n, 2 * half + e, unpack2<kDType>(*element).x);
              }
            });
      }
    }
  }
}

/// Adds the bias to scores in units of score_unit(). Of ForwardParams or BackwardParams.
template <DType kDType, int kM, int kN, class Params>
__device__ __forceinline__ void add_bias(float (&scores)[kM][kN][4], PiecePlacement const& place,
                                         Params const& params, ScoreHead const& of) {
  if (params.scores.bias.ptr == nullptr) {
    return;
  }
  float const unit = score_unit(params.scores, params.softmax_scale);
  float const factor = reciprocal_approx(fresh_float(unit));
  for_each_bias<kDType, kM, kN>(params.scores.bias, place, of,
                                [&](int m, int n, int e, float value) {
                                  scores[m][n][e] = fmaf(value, factor, scores[m][n][e]);
                                });
}

/// Adds `gradient(m, n, e)` of the lane's pairs to their elements of `dbias`. Rows that share an
/// element are summed over the warp first. Called by whole warps.
template <int kM, int kN, class Gradient>
__device__ __forceinline__ void add_bias_gradient(Bias const& dbias, PiecePlacement const& place,
                                                  ScoreHead const& of, Gradient const& gradient) {
  if (dbias.row_stride == 0) {
    for_each_in_row<float, kN>(dbias, place, of, 0, [&](int n, int e, float* element, bool is_col) {
      int const lane_rows = rows_left(place, of);
      float sum = 0.f;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          bool const is_row = m * place.row_step + 8 * half < lane_rows;
          sum += is_row ? gradient(m, n, 2 * half + e) : 0.f;
        }
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      if (is_col && fresh_thread_idx() % 32 < 4) {
        atomicAdd(element, sum);
      }
    });
    return;
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = m * place.row_step + 8 * half;
      if (row < rows_left(place, of)) {
        for_each_in_row<float, kN>(dbias, place, of, row,
                                   [&](int n, int e, float* element, bool is_col) {
                                     float const of_pair = gradient(m, n, 2 * half + e);
                                     if (is_col && dbias.is_shared) {
                                       atomicAdd(element, of_pair);
                                     } else if (is_col) {
                                       *element = of_pair;
                                     }
                                   });
      }
    }
  }
}

}  // namespace flash
