// Cuts the work of one call into contiguous pieces, a few per thread: no thread waits for the longest sequence. A block of
// many rows that crosses a thread's share is cut between rows. One of few rows is cut between splits (stream-K), which
// are stored and merged afterwards.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

namespace pagestream {

struct Plan {
  std::vector<Segment> segments;
  std::vector<int64_t> piece_begin;   // segments of piece i: [piece_begin[i], piece_begin[i + 1])
  std::vector<Segment> shared;        // blocks in several segments
  int64_t workspace_floats = 0;

  int64_t num_pieces() const { return static_cast<int64_t>(piece_begin.size()) - 1; }
};

// A tile costs as much as this many rows before the first row is computed: reading, widening, transposing.
constexpr int64_t kTileCostInRows = 8;
// Fewer rows x tiles than this are not worth handing out.
constexpr int64_t kMinCostPerPiece = 20;
constexpr int64_t kPiecesPerThread = 4;
// As many rows rather have their keys read twice than their splits stored and merged; no part of them has fewer than half.
constexpr int64_t kManyRows = 64;

inline int64_t num_rows(const AttentionParams& p, const Segment& block) {
  return int64_t{block.num_positions} * (p.num_heads / p.num_kv_heads);
}

inline int64_t cost_per_tile(const AttentionParams& p, const Segment& block) {
  return kTileCostInRows + num_rows(p, block);
}

// What only the contents of the tensors tell. std::invalid_argument reaches Python as ValueError.
inline void check_sequence(const AttentionParams& p, int32_t s) {
  const int64_t query_length = int64_t{p.query_starts[s + 1]} - p.query_starts[s], context = p.context_lengths[s];
  const std::string where = "paged_attention: sequence " + std::to_string(s) + ": ";
  if (p.query_starts[s] < 0 || p.query_starts[s + 1] > p.num_tokens)
    throw std::invalid_argument(where + "query_starts point outside the " + std::to_string(p.num_tokens) + " rows");
  if (query_length < 0 || query_length > context || context > int64_t{p.max_pages} * p.page_size)
    throw std::invalid_argument(where + std::to_string(query_length) + " new rows of " + std::to_string(context) +
                                " cached tokens in a block table of " + std::to_string(p.max_pages) + " pages");
  for (int64_t i = 0; i * p.page_size < context; ++i) {
    const int32_t page = p.block_tables[s * p.block_table_stride + i];
    if (page < 0 || page >= p.num_pages)
      throw std::invalid_argument(where + "page id " + std::to_string(page) + " at entry " + std::to_string(i) +
                                  " is outside the cache of " + std::to_string(p.num_pages) + " pages");
  }
}

inline Segment row_block(const AttentionParams& p, int32_t s, int32_t head, int32_t row, int32_t positions) {
  const int32_t position = p.context_lengths[s] - p.query_starts[s + 1] + row;
  const int32_t first_visible = p.window > 0 ? std::max(0, position - p.window + 1) : 0;
  const int32_t tile_end = (position + positions + kTile - 1) / kTile;
  return {s, head, row, position, positions, first_visible / kTile, tile_end, false, 0};
}

inline std::vector<Segment> row_blocks(const AttentionParams& p) {
  const int32_t block_positions = std::max(1, kMaxRowsPerBlock / (p.num_heads / p.num_kv_heads));
  std::vector<Segment> blocks;
  for (int32_t s = 0; s < p.num_sequences; ++s) {
    check_sequence(p, s);
    const int32_t row_end = p.query_starts[s + 1];
    for (int32_t head = 0; head < p.num_kv_heads; ++head)
      for (int32_t row = p.query_starts[s]; row < row_end; row += block_positions)
        blocks.push_back(row_block(p, s, head, row, std::min(block_positions, row_end - row)));
  }
  return blocks;
}

inline int64_t cost(const AttentionParams& p, const Segment& s) {
  return (s.tile_end - s.tile_begin) * cost_per_tile(p, s);
}

inline int64_t cost(const AttentionParams& p, const std::vector<Segment>& segments) {
  int64_t total = 0;
  for (const Segment& s : segments) total += cost(p, s);
  return total;
}

// Cuts blocks between rows where a thread's share ends. What is cut comes last: so the longest are begun first.
inline std::vector<Segment> cut_rows(const AttentionParams& p, const std::vector<Segment>& blocks, int64_t share) {
  const int32_t group = p.num_heads / p.num_kv_heads;
  const int32_t fewest = static_cast<int32_t>((kManyRows / 2 + group - 1) / group);  // positions
  std::vector<Segment> whole, parts;
  int64_t used = 0, target = share;  // cost up to which the current thread's share goes
  for (const Segment& block : blocks) {
    Segment rest = block;
    for (; used + cost(p, rest) > target; target += share) {
      const int64_t rows = (target - used) / (rest.tile_end - rest.tile_begin) - kTileCostInRows / 2;
      const int32_t positions = static_cast<int32_t>(std::max(int64_t{0}, rows / group));
      if (positions < fewest || rest.num_positions - positions < fewest) continue;
      parts.push_back(row_block(p, rest.sequence, rest.kv_head, rest.first_row, positions));
      used += cost(p, parts.back());
      rest = row_block(p, rest.sequence, rest.kv_head, rest.first_row + positions, rest.num_positions - positions);
    }
    used += cost(p, rest);
    (rest.num_positions < block.num_positions ? parts : whole).push_back(rest);
  }
  whole.insert(whole.end(), parts.begin(), parts.end());
  return whole;
}

// Cuts blocks into pieces of equal cost that follow those of the plan.
inline void cut_splits(const AttentionParams& p, const std::vector<Segment>& blocks, int64_t pieces,
                       int64_t partial_floats, Plan& plan) {
  const int64_t total = cost(p, blocks), before = plan.num_pieces();
  int64_t used = 0, target = total / pieces;  // cost up to which the current piece goes
  for (const Segment& block : blocks) {
    const int64_t cost = cost_per_tile(p, block);
    Segment piece = block;
    piece.workspace_offset = plan.workspace_floats;
    const size_t first_piece = plan.segments.size();
    for (int32_t tile = block.tile_begin; tile < block.tile_end; tile = piece.tile_end) {
      int64_t wanted = tile + std::max(int64_t{1}, (target - used) / cost);
      // Of many blocks, half a piece too many is sooner done than splits are stored and merged.
      if (static_cast<int64_t>(blocks.size()) > pieces && (block.tile_end - wanted) * cost <= total / pieces / 2)
        wanted = block.tile_end;
      const int64_t split_end = (wanted + kTilesPerSplit - 1) / kTilesPerSplit * kTilesPerSplit;
      piece.tile_begin = tile;
      piece.tile_end = static_cast<int32_t>(std::min(int64_t{block.tile_end}, split_end));
      plan.segments.push_back(piece);
      const int64_t splits = (piece.tile_end + kTilesPerSplit - 1) / kTilesPerSplit - tile / kTilesPerSplit;
      piece.workspace_offset += splits * partial_floats * num_rows(p, block);
      used += (piece.tile_end - tile) * cost;
      while (used >= target && plan.num_pieces() - before + 1 < pieces) {
        plan.piece_begin.push_back(static_cast<int64_t>(plan.segments.size()));
        target = total * (plan.num_pieces() - before + 1) / pieces;
      }
    }
    if (plan.segments.size() > first_piece + 1) {
      for (size_t i = first_piece; i < plan.segments.size(); ++i) plan.segments[i].is_partial = true;
      plan.shared.push_back(block);
      plan.shared.back().workspace_offset = plan.workspace_floats;
      plan.workspace_floats = piece.workspace_offset;
    }
  }
  plan.piece_begin.push_back(static_cast<int64_t>(plan.segments.size()));
}

inline Plan make_plan(const AttentionParams& p, int64_t threads, int64_t partial_floats) {
  const std::vector<Segment> blocks = row_blocks(p);
  const int64_t total = cost(p, blocks);
  std::vector<Segment> many, few;
  for (const Segment& b : blocks) {
    const int64_t rows_of_a_thread = total / threads / (b.tile_end - b.tile_begin);
    const bool is_many = num_rows(p, b) >= kManyRows && rows_of_a_thread >= kManyRows;
    (is_many ? many : few).push_back(b);
  }
  Plan plan;
  plan.piece_begin.push_back(0);
  plan.segments = cut_rows(p, many, std::max(int64_t{1}, cost(p, many) / threads));
  for (size_t i = 1; i <= plan.segments.size(); ++i) plan.piece_begin.push_back(static_cast<int64_t>(i));
  const int64_t left = cost(p, few), most = threads == 1 ? 1 : threads * kPiecesPerThread;
  if (left > 0) {
    const int64_t share = std::max(threads, most * left / total);  // of the pieces, as of the cost
    cut_splits(p, few, std::clamp(left / kMinCostPerPiece, int64_t{1}, share), partial_floats, plan);
  }
  return plan;
}

}  // namespace pagestream
