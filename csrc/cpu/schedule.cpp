#include "cpu/schedule.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/tiles.h"

namespace flash::cpu {
namespace {

/// What of a section's q, dout and dq the last cache is counted on to hold.
constexpr int64_t kSectionBytes = 8 << 20;

Sequence sequence_at(Shape const& shape, Sequences const& sequences, int batch) {
  return sequence_of(sequences, batch, shape.seqlen_q, shape.seqlen_k);
}

/// The sequences by the length that a tile's work grows with, the longest first.
std::vector<int> by_length(Shape const& shape, Sequences const& sequences, int Sequence::* length) {
  std::vector<int> lengths(shape.batch_size), batches(shape.batch_size);
  for (int batch = 0; batch < shape.batch_size; ++batch) {
    lengths[batch] = sequence_at(shape, sequences, batch).*length;
  }
  std::iota(batches.begin(), batches.end(), 0);
  std::stable_sort(batches.begin(), batches.end(),
                   [&](int a, int b) { return lengths[a] > lengths[b]; });
  return batches;
}

struct KeyHead {
  int batch_head;
  int num_blocks;
  int64_t query_bytes;  // q, dout and dq of its query heads, in fp32
};

std::vector<KeyHead> key_heads(Shape const& shape, Sequences const& sequences) {
  int64_t const bytes_per_row = int64_t(sizeof(float)) * shape.query_heads_per_key_head() *
                                (2 * shape.head_dim + shape.head_dim_v);
  std::vector<KeyHead> heads;
  heads.reserve(int64_t(shape.batch_size) * shape.num_heads_k);
  for (int const batch : by_length(shape, sequences, &Sequence::seqlen_q)) {
    Sequence const sequence = sequence_at(shape, sequences, batch);
    for (int head_k = 0; head_k < shape.num_heads_k; ++head_k) {
      heads.push_back({batch * shape.num_heads_k + head_k, ceil_div(sequence.seqlen_k, kTileN),
                       bytes_per_row * sequence.seqlen_q});
    }
  }
  return heads;
}

/// The end of the section that begins at `begin`: heads that fit the cache, and one a thread.
size_t section_end(std::vector<KeyHead> const& heads, size_t begin, size_t num_threads) {
  size_t end = begin;
  int64_t bytes = 0;
  while (end < heads.size()) {
    bytes += heads[end].query_bytes;
    if (bytes > kSectionBytes && end - begin >= num_threads) {
      break;
    }
    ++end;
  }
  return end;
}

}  // namespace

std::vector<Tile> query_tiles(Shape const& shape, Sequences const& sequences) {
  std::vector<Tile> tiles;
  for (int const batch : by_length(shape, sequences, &Sequence::seqlen_k)) {
    int const blocks = ceil_div(sequence_at(shape, sequences, batch).seqlen_q, kTileM);
    for (int head = 0; head < shape.num_heads; ++head) {
      // Causal: the last query tiles see the most keys.
      for (int block = blocks - 1; block >= 0; --block) {
        tiles.push_back({block, batch * shape.num_heads + head});
      }
    }
  }
  return tiles;
}

std::vector<Tile> key_tiles(Shape const& shape, Sequences const& sequences, int num_threads) {
  std::vector<KeyHead> const heads = key_heads(shape, sequences);
  std::vector<Tile> tiles;
  for (size_t begin = 0, end; begin < heads.size(); begin = end) {
    end = section_end(heads, begin, std::max(num_threads, 1));
    int most_blocks = 0;
    for (size_t idx = begin; idx < end; ++idx) {
      most_blocks = std::max(most_blocks, heads[idx].num_blocks);
    }
    for (int block = 0; block < most_blocks; ++block) {
      for (size_t idx = begin; idx < end; ++idx) {
        if (block < heads[idx].num_blocks) {
          tiles.push_back({block, heads[idx].batch_head});
        }
      }
    }
  }
  return tiles;
}

int64_t num_pairs(Shape const& shape, Sequences const& sequences) {
  int64_t pairs = 0;
  for (int batch = 0; batch < shape.batch_size; ++batch) {
    Sequence const sequence = sequence_at(shape, sequences, batch);
    pairs += int64_t(sequence.seqlen_q) * sequence.seqlen_k;
  }
  return pairs * shape.num_heads;
}

std::vector<RowSpan> unused_rows(int32_t const* cu_seqlens, int batch_size, int rows) {
  std::vector<RowSpan> unused;
  if (cu_seqlens == nullptr) {
    return unused;
  }
  int used = 0;
  for (int batch = 0; batch < batch_size; ++batch) {
    RowSpan const span = packed_rows(cu_seqlens, batch, rows);
    if (span.begin > used) {
      unused.push_back({used, span.begin});
    }
    used = std::max(used, span.end);
  }
  if (used < rows) {
    unused.push_back({used, rows});
  }
  return unused;
}

void zero_rows(Strided const& x, std::vector<RowSpan> const& spans, int heads, int cols,
               DType dtype) {
  int64_t const size = element_size(dtype);
  for (RowSpan const& span : spans) {
    for (int row = span.begin; row < span.end; ++row) {
      for (int head = 0; head < heads; ++head) {
        int64_t const first = x.offset(0, head) + row * x.row_stride;
        std::memset(static_cast<char*>(x.ptr) + first * size, 0, cols * size);
      }
    }
  }
}

}  // namespace flash::cpu
