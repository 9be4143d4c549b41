// What every computing warpgroup of the sm90 backward is made of: barriers, mask, products, and the
// arithmetic between them. Rows of its 64-row products are keys.
#pragma once

#include "arith/block_range.h"
#include "device/mma.cuh"
#include "device/wgmma.cuh"
#include "sm90/backward_extras.cuh"
#include "sm90/backward_load.cuh"
#include "sm90/row_softmax.cuh"

namespace flash::sm90 {

template <class Traits>
struct BackwardCore {
  static constexpr Sm90BackwardConfig kConfig = Traits::kConfig;
  static constexpr DType kDType = Traits::kDType;
  static constexpr int kFragmentsS = Traits::kTileM / 8, kStepsM = Traits::kTileM / 16;
  using TileQ = typename Traits::TileQ;
  using TileDout = typename Traits::TileDout;
  using TileK = typename Traits::TileK;
  using TileV = typename Traits::TileV;
  using TileDs = typename Traits::TileDs;
  using Scores = float[kFragmentsS][4];  // 64 keys x tile_m queries
  using Operand = uint32_t[kStepsM][4];  // the same as a left operand of 16 queries a step
  using Group = float[Traits::kGroupCols / 8][4];  // 64 rows of dQ
  static constexpr bool kHasExtras = kConfig.extras != Extras::kNone;

  BackwardKernelParams const& params;
  typename Traits::SharedStorage& shared;
  int warpgroup_idx;   // among the computing ones
  int const warp_idx;  // in its warpgroup
  float const scale_log2;
  KeptKey<kConfig.extras> const dropout_key;
  Ring<Traits::kStages> queries;
  uint32_t key_phase = 0, outbox_phase = 0;

  __device__ __forceinline__ BackwardCore(BackwardKernelParams const& params,
                                          typename Traits::SharedStorage& shared, int warpgroup_idx)
      : params(params),
        shared(shared),
        warpgroup_idx(warpgroup_idx),
        warp_idx(uniform(threadIdx.x / 32 % 4)),
        scale_log2(kLog2E * score_scale()),
        dropout_key(params.problem.dropout) {}

  /// What the maxima are in units of.
  __device__ __forceinline__ float score_scale() const {
    return score_unit_of<kConfig.extras>(params.problem.scores, params.problem.softmax_scale);
  }

  // Registers are scarce: where there is one buffer, its phase is the stage of what has two.
  __device__ __forceinline__ uint32_t one_buffer_phase() const {
    static_assert(Traits::kStages == 2);
    return queries.stage;
  }
  __device__ __forceinline__ auto dout() const {
    if constexpr (Traits::kDoutStages == Traits::kStages) {
      return queries;
    } else {
      static_assert(Traits::kDoutStages == 1);
      return Ring<1>{0, one_buffer_phase()};
    }
  }

  /// With a softcap there are no registers to hold it, and what follows from it, in.
  static __device__ __forceinline__ int lane_idx() {
    if constexpr (kMayCap<kConfig.extras>) {
      return fresh_thread_idx() % 32;
    }
    return threadIdx.x % 32;
  }
  static __device__ __forceinline__ void wait(uint64_t& barrier, uint32_t phase) {
    mbarrier_wait(smem_address(&barrier), phase);
  }
  /// For the whole warp: what its lanes have read may be overwritten.
  static __device__ __forceinline__ void arrive(uint64_t& barrier) {
    __syncwarp();
    if (lane_idx() == 0) {
      mbarrier_arrive(smem_address(&barrier));
    }
  }
  /// Makes what this warp has written to shared memory the copy engine's.
  static __device__ __forceinline__ void hand_over(uint64_t& full) {
    fence_async_proxy();
    arrive(full);
  }
  static __device__ __forceinline__ int uniform(int value) {
    return __shfl_sync(0xffffffffu, value, 0);
  }

  __device__ __forceinline__ char* open_outbox() {
    wait(shared.outbox_empty[warpgroup_idx], outbox_phase ^ 1);
    outbox_phase ^= 1;
    return shared.outbox[warpgroup_idx];
  }

  // ---- Mask ----

  /// Of the item that is worked on. Looked up where it is needed: there are no registers to keep
  /// it.
  __device__ __forceinline__ Sequence sequence() const {
    return sequence_of(params.problem, uniform(shared.item.batch));
  }
  /// Query tiles that need no element mask for the 64 keys from key_begin on, a multiple of 64.
  __device__ __forceinline__ BlockRange full_range(int key_begin) const {
    Sequence const sequence = this->sequence();
    if (key_begin + 64 > sequence.seqlen_k) {
      return {0, 0};
    }
    return full_m_block_range(tile_grid(params.problem, sequence, Traits::kTileM, 64),
                              key_begin / 64);
  }
  /// Hides the queries that don't see a key, and all from keys beyond the end.
  __device__ __forceinline__ void mask(Scores& scores, int key_begin, int m_block) const {
    Sequence const sequence = this->sequence();
    int const lane_col = m_block * Traits::kTileM + lane_idx() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const key = key_begin + warp_idx * 16 + half * 8 + lane_idx() / 4;
      KeyRange const rows =
          visible_keys(transposed(params.problem.mask), key, sequence.seqlen_k, sequence.seqlen_q);
      mask_row(scores, half, rows.begin - lane_col,
               (key < sequence.seqlen_k ? rows.end : 0) - lane_col);
    }
  }

  // ---- Query tiles ----

  /// Where a warpgroup is among the query tiles of an item, in the order of for_each_query_tile().
  struct Walk {
    int first, last, step;  // m_block of a query head's tiles
    BlockRange full;        // tiles that need no element mask
    int steps_left;         // with this one
    int m_block;
    int head;   // of the query tile
    int shift;  // of ALiBi's distances: seqlen_q - seqlen_k

    __device__ __forceinline__ bool needs_mask() const {
      return m_block < full.min || m_block >= full.max;
    }
    __device__ __forceinline__ void advance() {
      head += m_block == last ? step : 0;
      m_block = m_block == last ? first : m_block + step;
      --steps_left;
    }
  };
  __device__ __forceinline__ Walk walk(WorkItem const& item, int key_begin) const {
    int const m_min = uniform(item.m_min), m_max = uniform(item.m_max);
    int const group_size = params.problem.shape.query_heads_per_key_head();
    int const step = params.division.step;
    int const first = step > 0 ? m_min : m_max - 1, last = step > 0 ? m_max - 1 : m_min;
    BlockRange const full = full_range(key_begin);
    int head = 0, shift = 0;
    if constexpr (kHasExtras) {
      head = uniform(item.head_k) * group_size + (step > 0 ? 0 : group_size - 1);
    }
    if constexpr (kMayBend<kConfig.extras>) {
      Sequence const sequence = this->sequence();
      shift = uniform(sequence.seqlen_q - sequence.seqlen_k);
    }
    return {.first = first,
            .last = last,
            .step = step,
            .full = {uniform(full.min), uniform(full.max)},
            .steps_left = group_size * (m_max - m_min),
            .m_block = first,
            .head = head,
            .shift = shift};
  }

  // ---- Extras ----

  using StepExtras = sm90::StepExtras<kConfig.extras, kStepsM, true>;

  /// Of the scores of 64 keys from key_begin on, the rows, and the query tile that `walk` is at.
  __device__ __forceinline__ void prepare_extras(StepExtras& extras, int key_begin,
                                                 Walk const& walk) const {
    if constexpr (kMayBend<kConfig.extras>) {
      BackwardParams const& problem = params.problem;
      extras.prepare(problem.scores, problem.dropout, score_scale(), uniform(shared.item.batch),
                     walk.head, problem.shape.num_heads,
                     {fresh(key_begin) + warp_idx * 16, 0, walk.m_block * Traits::kTileM, 16},
                     walk.shift);
    }
  }
  /// Products to scores in units of score_unit(). Where ALiBi may follow on the softcap also the
  /// derivative of each by the scaled product, packed: 1 without a softcap.
  __device__ __forceinline__ void make_scores(Scores& scores, Operand& derivative,
                                              StepExtras const& extras) const {
    auto& pieces = reinterpret_cast<float (&)[1][kFragmentsS][4]>(scores);
    bool const is_capped = has_softcap<kConfig.extras>(params.problem.scores);
    if (is_capped) {
      cap_scores<kConfig.extras != Extras::kAny>(pieces, params.problem.scores,
                                                 params.problem.softmax_scale);
    }
    if constexpr (kConfig.extras == Extras::kAny) {
#pragma unroll
      for (int n = 0; n < kFragmentsS; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          derivative[n / 2][n % 2 * 2 + half] =
              is_capped ? pack2<kDType>(slope_of_tanh(scores[n][2 * half]),
                                        slope_of_tanh(scores[n][2 * half + 1]))
                        : pack2<kDType>(1.f, 1.f);
        }
      }
    }
    if (has_alibi<kConfig.extras>(params.problem.scores)) {
      subtract_alibi(pieces, {0, 0, 0, 16}, extras.alibi);
    }
  }
  /// What makes a word of dropout's bits beside products, if that is the way.
  template <int kIdx>
  __device__ __forceinline__ auto prepare_word(StepExtras& extras, int key_begin,
                                               Walk const& walk) const {
    return [this, &extras, &walk, key_begin] {
      if constexpr (kDropsBesideProducts<kConfig.extras> && kIdx < StepExtras::Kept::kWords) {
        BackwardParams const& problem = params.problem;
        int const batch_head = uniform(shared.item.batch) * problem.shape.num_heads + walk.head;
        extras.kept.find_word(kIdx, problem.dropout, dropout_key, batch_head,
                              key_begin + warp_idx * 16, walk.m_block * Traits::kTileM);
      }
    };
  }
  __device__ __forceinline__ void drop_some(Scores& dp, StepExtras const& extras) const {
    if (has_dropout<kConfig.extras>(params.problem.dropout)) {
      drop(dp, extras.kept);
    }
  }
  __device__ __forceinline__ void drop_some(Operand& p, StepExtras const& extras) const {
    if (has_dropout<kConfig.extras>(params.problem.dropout)) {
      drop(p, extras.kept);
    }
  }

  // ---- Products ----

  static constexpr auto kNothing = [] {};

  /// S^T or dP^T: 64 rows of `keys` times rows of `queries`. What beside() does is issued between
  /// two of the steps.
  template <class TileKeys, class TileQueries, class Beside = decltype(kNothing)>
  __device__ __forceinline__ void issue_scores(Scores& scores, char* keys, int first_key,
                                               char* rows, Beside const& beside = {}) const {
    uint64_t const a =
        advanced(wgmma_descriptor<TileKeys>(smem_address(keys)), first_key * TileKeys::kRowBytes);
    uint64_t const b = wgmma_descriptor<TileQueries>(smem_address(rows));
#pragma unroll
    for (int step = 0; step < TileKeys::kCols / 16; ++step) {
      Wgmma<Traits::kTileM, kDType>::template ss<false>(
          scores, advanced(a, columns_step<TileKeys>(step)),
          advanced(b, columns_step<TileQueries>(step)), step > 0);
      if (step == TileKeys::kCols / 32 - 1) {
        beside();
      }
    }
    wgmma_commit();
  }
  /// The same with the 64 rows in registers.
  template <class TileQueries, int kSteps, class Beside>
  __device__ __forceinline__ void issue_scores(Scores& scores, Piece const (&keys)[kSteps],
                                               char* rows, Beside const& beside) const {
    uint64_t const b = wgmma_descriptor<TileQueries>(smem_address(rows));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Wgmma<Traits::kTileM, kDType>::template rs<false>(
          scores, keys[step].r, advanced(b, columns_step<TileQueries>(step)), step > 0);
      if (step == kSteps / 2 - 1) {
        beside();
      }
    }
    wgmma_commit();
  }
  /// dV += P^T dO or dK += dS^T Q.
  template <class TileQueries, int kFragments>
  __device__ __forceinline__ void issue_gradient(float (&gradient)[kFragments][4],
                                                 Operand const& left, char* rows,
                                                 int has_sums) const {
    uint64_t const b = wgmma_descriptor<TileQueries>(smem_address(rows));
#pragma unroll
    for (int step = 0; step < kStepsM; ++step) {
      Wgmma<kFragments * 8, kDType>::template rs<true>(
          gradient, left[step], advanced(b, rows_step<TileQueries>(step)), step > 0 ? 1 : has_sums);
    }
    wgmma_commit();
  }

  /// dQ = dS K, from `rows` bytes on into dS and `columns` bytes on into K.
  __device__ __forceinline__ void issue_ds_k(Group& dq, uint32_t ds_stage, int rows,
                                             int columns) const {
    uint64_t const a = advanced(wgmma_descriptor<TileDs>(smem_address(shared.ds[ds_stage])), rows);
    uint64_t const b = advanced(wgmma_descriptor<TileK>(smem_address(shared.k)), columns);
#pragma unroll
    for (int step = 0; step < Traits::kBlockKeys / 16; ++step) {
      Wgmma<Traits::kGroupCols, kDType>::template ss<true, true>(
          dq, advanced(a, rows_step<TileDs>(step)), advanced(b, rows_step<TileK>(step)), step > 0);
    }
    wgmma_commit();
  }

  // ---- Arithmetic ----

  /// lse_log2 or softmax_d of this lane's two queries of fragment n, where they lie.
  struct RowStatistics {
    uint32_t address;

    __device__ __forceinline__ float2 operator()(int n) const {
      return load_shared_float2(address + n * 32);
    }
  };
  /// The same, read while the product is under way that they will be needed with.
  struct ReadStatistics {
    float2 of_fragment[kFragmentsS];

    __device__ __forceinline__ ReadStatistics(RowStatistics const& statistics) {
#pragma unroll
      for (int n = 0; n < kFragmentsS; ++n) {
        of_fragment[n] = statistics(n);
      }
    }
    __device__ __forceinline__ float2 operator()(int n) const { return of_fragment[n]; }
  };
  /// With extras, or those of 128 queries, they don't fit the registers.
  using Statistics =
      std::conditional_t<Traits::kTileM == 64 && !kHasExtras, ReadStatistics, RowStatistics>;
  __device__ __forceinline__ RowStatistics lse_log2() const {
    return {smem_address(shared.lse_log2[queries.stage]) + lane_idx() % 4 * 8};
  }
  __device__ __forceinline__ RowStatistics softmax_d() const {
    return {smem_address(shared.softmax_d[dout().stage]) + lane_idx() % 4 * 8};
  }

  /// P^T = exp2(S^T scale_log2 - lse).
  template <class Statistics>
  __device__ __forceinline__ void exponentiate(Scores const& scores, Statistics const& lse,
                                               Operand& p) const {
    for_each_probability(scores, lse, [&](int n, int half, float left, float right) {
      p[n / 2][n % 2 * 2 + half] = pack2<kDType>(left, right);
    });
  }
  /// The same, and P^T times the softcap's derivative. That is what `sloped` is where ALiBi may
  /// have followed on the softcap; else the scores are tanh, or -inf.
  template <class Statistics>
  __device__ __forceinline__ void exponentiate(Scores const& scores, Statistics const& lse,
                                               Operand& p, Operand& sloped) const {
    for_each_probability(scores, lse, [&](int n, int half, float left, float right) {
      uint32_t& pair = sloped[n / 2][n % 2 * 2 + half];
      if constexpr (kConfig.extras != Extras::kAny) {
        pair = pack2<kDType>(slope_of_tanh(scores[n][2 * half]),
                             slope_of_tanh(scores[n][2 * half + 1]));
      }
      uint32_t const probabilities = pack2<kDType>(left, right);
      p[n / 2][n % 2 * 2 + half] = probabilities;
      pair = multiply2<kDType>(probabilities, pair);
    });
  }
  template <class Statistics, class Visit>
  __device__ __forceinline__ void for_each_probability(Scores const& scores, Statistics const& lse,
                                                       Visit const& visit) const {
#pragma unroll
    for (int n = 0; n < kFragmentsS; ++n) {
      float2 const row_lse = lse(n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visit(n, half, exp2_approx(fmaf(scores[n][2 * half], scale_log2, -row_lse.x)),
              exp2_approx(fmaf(scores[n][2 * half + 1], scale_log2, -row_lse.y)));
      }
    }
  }
  /// dS^T = P^T (dP^T - softmax_d) with P as it went into dV.
  template <class Statistics>
  __device__ __forceinline__ void differentiate(Scores const& dp, Operand const& p,
                                                Statistics const& softmax_d, Operand& ds) const {
    float const scale = kMayDrop<kConfig.extras> ? params.problem.dropout.scale : 1.f;
    auto const less = [&](float gradient, float row_d) {
      return kMayDrop<kConfig.extras> ? fmaf(gradient, scale, -row_d) : gradient - row_d;
    };
#pragma unroll
    for (int n = 0; n < kFragmentsS; ++n) {
      float2 const row_d = softmax_d(n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 const probability = unpack2<kDType>(p[n / 2][n % 2 * 2 + half]);
        ds[n / 2][n % 2 * 2 + half] =
            pack2<kDType>(probability.x * less(dp[n][2 * half], row_d.x),
                          probability.y * less(dp[n][2 * half + 1], row_d.y));
      }
    }
  }
  /// 16 rows of a warp of packed fragments, into a tile in which the warpgroup's rows begin with
  /// first_row.
  template <class Tile, int kSteps>
  __device__ __forceinline__ void store_rows(uint32_t const (&packed)[kSteps][4], char* tile,
                                             int first_row) const {
    int const row = first_row + warp_idx * 16 + lane_idx() % 16;
    uint32_t const row_address = smem_address(tile) + row * Tile::kRowBytes;
    uint32_t const chunk_offset = (lane_idx() / 16 ^ Tile::swizzle(row)) << 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      stmatrix_x4(Tile::moved(row_address, chunk_offset, 0, 16 * step), packed[step][0],
                  packed[step][1], packed[step][2], packed[step][3]);
    }
  }
  /// 64 rows of a gradient, scaled, into a tile of their own, from `gradient`'s fragment
  /// kFirstFragment on.
  template <class Tile, int kFirstFragment, int kFragments>
  __device__ __forceinline__ void store_gradient(float const (&gradient)[kFragments][4],
                                                 float scale, char* tile) const {
    uint32_t packed[Tile::kCols / 16][4];
#pragma unroll
    for (int step = 0; step < Tile::kCols / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const* const pair = &gradient[kFirstFragment + 2 * step + i / 2][i % 2 * 2];
        packed[step][i] = pack2<kDType>(pair[0] * scale, pair[1] * scale);
      }
    }
    store_rows<Tile>(packed, tile, 0);
  }
  template <int kFragments>
  static __device__ __forceinline__ void clear(float (&gradient)[kFragments][4]) {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        gradient[n][e] = 0.f;
      }
    }
  }

  /// Hands a group of dQ over to the sender.
  __device__ __forceinline__ void store_dq(Group const& dq) {
    uint32_t const strip =
        smem_address(open_outbox()) + warp_idx * Traits::kStripBytes + lane_idx() * 16;
#pragma unroll
    for (int n = 0; n < Traits::kGroupCols / 8; ++n) {
      store_shared_float4(strip + n * Traits::kFragmentBytes, dq[n]);
    }
    hand_over(shared.outbox_full[warpgroup_idx]);
  }
};

}  // namespace flash::sm90
