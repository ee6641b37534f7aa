// Each sample's positions are laid out in one line ("flat"): the lines of the output one after the
// other, `pitch` positions apart. With zeros between the lines, the input under a kernel tap is
// then the input's own flat layout, shifted by a constant; so the input is packed once, for each
// phase of the stride, and a tap only changes where its reading begins.
//
// The left operand has its channels in the rows of a tile, and may begin at any position; the right
// one has them in the columns, with positions in pairs. A convolution's input is on the left, and
// its gradient on the right. Where there is a single tap the wider of the two is on the left, since
// the right one is what a block of samples is limited by.
//
// A task is what shares one packed left operand: the taps of 16 input channels, or 64 rows.
// Samples go in blocks whose packed operands stay in the second-level cache, and a sample that does
// not fit there goes in segments, whose sums are added up before they are squared.
// As in outer.cpp, threads share the samples of small outputs and the tasks of large ones, and the
// shape alone decides, so the result has the same bits for any number of threads.

#include "matrix.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "workspace.h"

namespace fastfisher::cpu {
namespace {

// Bytes that the right operand of a block may take, and a task's left one.
constexpr int64_t kRightBytes = int64_t{1} << 20;
constexpr int64_t kLeftBytes = int64_t{1} << 19;
// The sums of a part of the samples, and the sums of a sample's earlier segments, at most.
constexpr int64_t kPartialBytes = int64_t{1} << 16;
constexpr int64_t kSegmentSumBytes = int64_t{1} << 25;
constexpr int64_t kParts = 16;
// Channels of a block whose taps are unrolled into rows of their own: with more, too few rows of a
// tile would be empty otherwise.
constexpr int64_t kUnrolledChannels = 8;
constexpr int64_t kRowBlocks = 4;
// Chunks that are packed of one block of channels before the next one's, an even number; and blocks
// that a thread packs.
constexpr int64_t kChunksAtOnce = 2;
constexpr int64_t kBlocksAtOnce = 8;
constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kElement = 2;  // bytes of a bfloat16

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Where the flat positions of one operand lie in memory.
struct Positions {
  std::vector<MatrixPiece> pieces;
  std::vector<int32_t> first_piece;
};

// A rectangle of an operand as it lies in the flat layout.
struct Rectangle {
  int64_t lines, columns;            // of the operand, from its first
  int64_t first_line, first_column;  // of the flat layout's beginning in it; may be negative
  int64_t line_stride, column_stride;
};

Positions locate(Rectangle r, int64_t pitch, int64_t count) {
  if (pitch == r.columns && r.first_column == 0 && r.first_line == 0 &&
      r.line_stride == r.columns * r.column_stride) {
    pitch = r.columns *= r.lines;
    r.lines = 1;
  }
  Positions result;
  const auto offset_of = [&](int64_t flat) {
    const int64_t line = flat / pitch + r.first_line;
    const int64_t column = flat % pitch + r.first_column;
    const bool inside = line >= 0 && line < r.lines && column >= 0 && column < r.columns;
    return inside ? line * r.line_stride + column * r.column_stride : int64_t{-1};
  };
  for (int64_t chunk = 0; chunk < count; chunk += kMatrixChunk) {
    result.first_piece.push_back(int32_t(result.pieces.size()));
    bool open = false;
    for (int64_t lane = 0; lane < kMatrixChunk; ++lane) {
      const int64_t offset = offset_of(chunk + lane);
      if (offset < 0) {
        open = false;
        continue;
      }
      const int64_t begin = offset - lane * r.column_stride;
      if (!open || result.pieces.back().offset != begin) result.pieces.push_back({begin, 0});
      open = true;
      result.pieces.back().lanes |= uint16_t(1u << lane);
    }
  }
  result.first_piece.push_back(int32_t(result.pieces.size()));
  return result;
}

// One left operand of a task: 16 rows, and the output that each stands for.
struct Source {
  int64_t offset;  // bytes from the packed sample's start
  int64_t rows;
};

// What shares one packed left operand.
struct Task {
  int64_t first_channel, channels;
  bool unrolled;  // its rows are (tap, channel), else the sources are taps or blocks of 16 channels
  int64_t first_source;  // in the order of all tasks
  std::vector<Source> sources;
};

struct Tap {
  int64_t phase;
  int64_t shift;  // positions
  int64_t line, position;
};

class MatrixOuter {
 public:
  MatrixOuter(const MatrixKernels& kernels, const Problem& problem, const void* g, const void* x,
              bool is_bfloat16, float* out, float alpha)
      : k_(kernels),
        p_(problem),
        g_(static_cast<const char*>(g)),
        x_(static_cast<const char*>(x)),
        is_bfloat16_(is_bfloat16),
        out_(out),
        alpha_(alpha),
        terms_(is_bfloat16 ? 1 : 3) {
    single_ = p_.kernel_height * p_.kernel_width == 1 && p_.pad_h == 0 && p_.pad_w == 0;
    gradient_left_ = single_ && p_.rows >= p_.columns;
    plan_flat();
  }

  // Whether the vector kernels would take longer. Both by what they were measured to take, in
  // cycles for a sample, over the layers of the benchmarks' models.
  bool is_faster() const {
    if (steps_ == 0) return false;  // a tail alone gains what its packing costs
    const int64_t left = left_channels();
    const int64_t taps = int64_t(taps_.size());
    const int64_t rest = left % kMatrixSide;
    int64_t sources = left / kMatrixSide * taps;
    if (rest > 0) sources += is_unrolled(rest) ? ceil_div(rest * taps, kMatrixSide) : taps;
    const double tiles = double(sources * right_blocks());
    const double left_blocks = double(ceil_div(left, kMatrixSide)) * double(phases_.size());
    const double blocks = left_blocks + double(right_blocks());
    // Rows of a shifted operand lie across cache lines.
    const double step = (single_ ? 115 : 150) / (terms_ == 1 ? 4.0 : 1.0);
    const double pack = 0.5 * double(steps_ * kMatrixDepth) + 1.5 * double(tail_);
    double cycles = tiles * (double(steps_) * step + double(tail_steps_) * 20 + 70) +
                    pack * double(kMatrixSide) * blocks;
    if (!single_) cycles += tiles * double(kMatrixTile) * 3 / double(p_.samples);
    const double products =
        double(p_.rows * p_.columns * taps) * double(p_.out_height * p_.out_width);
    return cycles < products / (is_unrolled(left) ? 13 : 26);
  }

  void run() {
    plan_segments();
    plan_tasks();
    for (const Phase& phase : phases_) left_positions_.push_back(locate_left(phase));
    right_positions_ = locate_right();
    const int64_t sums = sum_elements() * int64_t(sizeof(float));
    if (p_.samples > 1 && sums <= kPartialBytes) {
      run_by_samples();
    } else {
      run_by_tasks();
    }
  }

 private:
  struct Phase {
    int64_t line, position;
  };

  // ---- plan --------------------------------------------------------------------------------

  // Phases, taps and the pitch. A tap's line is output line * stride + kh * dilation - pad; what is
  // left of that after a multiple of the stride is its phase.
  void plan_flat() {
    const auto line_of = [&](int64_t kh) { return kh * p_.dilation_h - p_.pad_h; };
    const auto position_of = [&](int64_t kw) { return kw * p_.dilation_w - p_.pad_w; };
    const int64_t least_h = floor_div(line_of(0), p_.stride_h);
    const int64_t least_w = floor_div(position_of(0), p_.stride_w);
    const int64_t most_w = floor_div(position_of(p_.kernel_width - 1), p_.stride_w);
    first_line_ = least_h;
    first_position_ = least_w;
    // Positions between two lines are zeros of the one's end and the other's beginning at once.
    const int64_t before = -least_w;
    const int64_t reach = p_.out_width + most_w - least_w;
    const int64_t widest = ceil_div(p_.width, p_.stride_w);
    pitch_ = std::max({p_.out_width, reach - before, std::min(reach, before + widest)});
    for (int64_t kh = 0; kh < p_.kernel_height; ++kh) {
      for (int64_t kw = 0; kw < p_.kernel_width; ++kw) {
        const int64_t h = floor_div(line_of(kh), p_.stride_h);
        const int64_t w = floor_div(position_of(kw), p_.stride_w);
        const Phase phase{line_of(kh) - h * p_.stride_h, position_of(kw) - w * p_.stride_w};
        const int64_t shift = (h - least_h) * pitch_ + w - least_w;
        taps_.push_back({phase_index(phase), shift, kh, kw});
        most_shift_ = std::max(most_shift_, shift);
      }
    }
    const int64_t positions = (p_.out_height - 1) * pitch_ + p_.out_width;
    const int64_t rest = positions % kMatrixDepth;
    if (single_ && terms_ > 1 && rest > 0 && rest <= kMatrixSide) tail_ = rest;
    steps_ = ceil_div(positions - tail_, kMatrixDepth);
    if (tail_ > 0) tail_steps_ = tail_steps(tail_);
  }

  int64_t phase_index(const Phase& phase) {
    for (size_t i = 0; i < phases_.size(); ++i) {
      if (phases_[i].line == phase.line && phases_[i].position == phase.position) return int64_t(i);
    }
    phases_.push_back(phase);
    return int64_t(phases_.size()) - 1;
  }

  bool is_unrolled(int64_t channels) const {
    return taps_.size() > 1 && channels <= kUnrolledChannels;
  }

  int64_t left_channels() const { return gradient_left_ ? p_.rows : p_.columns; }
  int64_t right_channels() const { return gradient_left_ ? p_.columns : p_.rows; }
  int64_t right_blocks() const { return ceil_div(right_channels(), kMatrixSide); }

  // Elements of one channel: whole cache lines, an odd number of them, so that the rows of a tile
  // lie in different sets of the cache.
  static int64_t row_elements(int64_t positions) {
    return (ceil_div(positions * kElement, kLine) | 1) * kLine / kElement;
  }

  void plan_segments() {
    const int64_t right_step = right_blocks() * terms_ * kMatrixSide * kLine;
    const int64_t left_step =
        (single_ ? std::min(kRowBlocks, ceil_div(left_channels(), kMatrixSide))
                 : int64_t(phases_.size())) *
        terms_ * kMatrixSide * kLine;
    int64_t most = std::min(kRightBytes / right_step, kLeftBytes / left_step);
    const int64_t sums = right_blocks() * ceil_div(left_channels(), kMatrixSide) *
                         int64_t(taps_.size()) * kMatrixTile * int64_t(sizeof(float));
    if (sums > kSegmentSumBytes) most = steps_;
    if (steps_ > 0) {
      segments_ = ceil_div(steps_, std::clamp<int64_t>(most, 1, steps_));
      segment_steps_ = ceil_div(steps_, segments_);
      segments_ = ceil_div(steps_, segment_steps_);
    }
    packed_positions_ = round_up(segment_steps_ * kMatrixDepth + most_shift_, kMatrixDepth);
    left_row_ = row_elements(packed_positions_) * kElement;
    right_block_ = (terms_ * segment_steps_ + tail_steps_) * kMatrixSide * kLine;
    right_sample_ = right_blocks() * right_block_;
    block_ = 1;
    if (segments_ == 1) {
      const int64_t left = (single_ ? kRowBlocks : int64_t(phases_.size())) * kMatrixSide *
                           (terms_ * left_row_ + tail_steps_ * kLine);
      block_ = std::min(kRightBytes / right_sample_, kLeftBytes / left);
      block_ = std::clamp<int64_t>(block_, 1, p_.samples);
      block_ = ceil_div(p_.samples, ceil_div(p_.samples, block_));  // no short last one
    }
  }

  void plan_tasks() {
    const int64_t channels = left_channels();
    const int64_t blocks = ceil_div(channels, kMatrixSide);
    if (single_) {
      const int64_t tasks = ceil_div(blocks, kRowBlocks);
      for (int64_t t = 0, block = 0; t < tasks; ++t) {
        const int64_t end = blocks * (t + 1) / tasks;
        Task task{block * kMatrixSide,
                  std::min(channels, end * kMatrixSide) - block * kMatrixSide,
                  false,
                  block,
                  {}};
        for (int64_t i = 0; block < end; ++block, ++i) {
          const int64_t rows = std::min(kMatrixSide, channels - block * kMatrixSide);
          task.sources.push_back({i * kMatrixSide * left_row_, rows});
        }
        tasks_.push_back(std::move(task));
      }
      source_count_ = blocks;
      return;
    }
    for (int64_t c = 0; c < channels; c += kMatrixSide) {
      const int64_t count = std::min(kMatrixSide, channels - c);
      Task task{c, count, is_unrolled(count), source_count_, {}};
      if (task.unrolled) {
        const int64_t rows = count * int64_t(taps_.size());
        unrolled_rows_ = round_up(rows, kMatrixSide);
        for (int64_t row = 0; row < rows; row += kMatrixSide) {
          task.sources.push_back({row * unrolled_row(), std::min(kMatrixSide, rows - row)});
        }
      } else {
        for (const Tap& tap : taps_) {
          task.sources.push_back({tap.phase * phase_bytes() + tap.shift * kElement, count});
        }
      }
      source_count_ += int64_t(task.sources.size());
      tasks_.push_back(std::move(task));
    }
  }

  int64_t phase_bytes() const { return terms_ * kMatrixSide * left_row_; }
  int64_t unrolled_row() const { return row_elements(segment_steps_ * kMatrixDepth) * kElement; }

  // A task's packed left operand: rows of one term, bytes of one row, of a term, of a tail's step
  // and of a sample.
  int64_t left_rows(const Task& task) const {
    if (single_) return round_up(task.channels, kMatrixSide);
    return task.unrolled ? unrolled_rows_ : kMatrixSide;
  }
  int64_t left_row(const Task& task) const { return task.unrolled ? unrolled_row() : left_row_; }
  int64_t left_term(const Task& task) const { return left_rows(task) * left_row(task); }
  int64_t left_tail_step(const Task& task) const { return left_rows(task) * kLine; }
  int64_t left_sample(const Task& task) const {
    if (!single_ && !task.unrolled) return int64_t(phases_.size()) * phase_bytes();
    return terms_ * left_term(task) + tail_steps_ * left_tail_step(task);
  }

  // Bytes of one term of a packed block of the right operand.
  int64_t right_term() const { return segment_steps_ * kMatrixSide * kLine; }

  int64_t most_left_bytes() const {
    int64_t most = 0;
    for (const Task& task : tasks_) most = std::max(most, block_ * left_sample(task));
    // What an unrolled block is copied from.
    return most + int64_t(phases_.size()) * phase_bytes();
  }

  int64_t sum_elements() const { return right_blocks() * source_count_ * kMatrixTile; }

  Positions locate_left(const Phase& phase) const {
    // A tail may take up another chunk.
    const int64_t count =
        (segments_ - 1) * segment_steps_ * kMatrixDepth + packed_positions_ + kMatrixDepth;
    if (gradient_left_) return locate(gradient(), pitch_, count);
    return locate(input(phase), pitch_, count);
  }

  Positions locate_right() const {
    const int64_t count = (segments_ * segment_steps_ + 1) * kMatrixDepth;
    if (gradient_left_) return locate(input(phases_[0]), pitch_, count);
    return locate(gradient(), pitch_, count);
  }

  Rectangle gradient() const {
    return {p_.out_height, p_.out_width, 0, 0, p_.g_stride[2], p_.g_stride[3]};
  }

  Rectangle input(const Phase& phase) const {
    // With a single tap nothing outside of the output's positions is read.
    int64_t lines = ceil_div(p_.height - phase.line, p_.stride_h);
    int64_t columns = ceil_div(p_.width - phase.position, p_.stride_w);
    if (single_) {
      lines = p_.out_height;
      columns = p_.out_width;
    }
    return {lines,
            std::min(columns, pitch_ + first_position_),
            first_line_,
            first_position_,
            p_.x_stride[2] * p_.stride_h,
            p_.x_stride[3] * p_.stride_w};
  }

  // ---- pack --------------------------------------------------------------------------------

  MatrixOperand operand(bool is_gradient, int64_t n, int64_t channel, int64_t channels,
                        const Positions& positions, const Phase& phase) const {
    const int64_t* const stride = is_gradient ? p_.g_stride : p_.x_stride;
    int64_t offset = n * stride[0] + channel * stride[1];
    if (!is_gradient) offset += phase.line * stride[2] + phase.position * stride[3];
    const int64_t size = is_bfloat16_ ? kElement : int64_t(sizeof(float));
    const char* const data = (is_gradient ? g_ : x_) + offset * size;
    const int64_t step = is_gradient ? stride[3] : stride[3] * p_.stride_w;
    return {data,
            is_bfloat16_,
            stride[1],
            step,
            channels,
            positions.pieces.data(),
            positions.first_piece.data()};
  }

  // Blocks [from, to) of a sample, position by position: they share the pages that those lie in.
  void pack_right(char* sample, int64_t n, int64_t from, int64_t to, int64_t segment) const {
    const int64_t chunks = segment_steps_ * kMatrixDepth / kMatrixChunk;
    const int64_t term = right_term();
    for (int64_t chunk = 0; chunk < chunks; chunk += kChunksAtOnce) {
      const int64_t count = std::min(kChunksAtOnce, chunks - chunk);
      for (int64_t block = from; block < to; ++block) {
        char* const at = sample + block * right_block_ + chunk * kMatrixChunk / 2 * kLine;
        k_.pack_right(at, term, right_operand(n, block), segment * chunks + chunk, count, terms_);
      }
    }
    if (tail_ == 0 || segment != segments_ - 1) return;
    for (int64_t block = from; block < to; ++block) {
      char* const at = sample + block * right_block_ + terms_ * term;
      k_.pack_right_tail(at, right_operand(n, block), tail_chunk(), tail_);
    }
  }

  MatrixOperand right_operand(int64_t n, int64_t block) const {
    const int64_t first = block * kMatrixSide;
    return operand(!gradient_left_, n, first, std::min(kMatrixSide, right_channels() - first),
                   right_positions_, phases_[0]);
  }

  int64_t tail_chunk() const { return steps_ * kMatrixDepth / kMatrixChunk; }

  void pack_left(char* to, char* scratch, const Task& task, int64_t n, int64_t segment) const {
    const int64_t first = segment * segment_steps_ * kMatrixDepth / kMatrixChunk;
    const int64_t chunks = packed_positions_ / kMatrixChunk;
    if (single_) {
      const int64_t term = left_term(task);
      const auto rows = [&](const Source& source) { return source.offset / left_row_; };
      const auto left_operand = [&](const Source& source) {
        return operand(gradient_left_, n, task.first_channel + rows(source), source.rows,
                       left_positions_[0], phases_[0]);
      };
      for (int64_t chunk = 0; chunk < chunks; chunk += kChunksAtOnce) {
        const int64_t count = std::min(kChunksAtOnce, chunks - chunk);
        for (const Source& source : task.sources) {
          k_.pack_left(to + source.offset + chunk * kMatrixChunk * kElement, term, left_row_,
                       left_operand(source), first + chunk, count, terms_);
        }
      }
      if (tail_ == 0 || segment != segments_ - 1) return;
      for (const Source& source : task.sources) {
        k_.pack_left_tail(to + terms_ * term + rows(source) * kLine, left_tail_step(task),
                          left_operand(source), tail_chunk(), tail_);
      }
      return;
    }
    char* const planes = task.unrolled ? scratch : to;
    for (size_t i = 0; i < phases_.size(); ++i) {
      k_.pack_left(
          planes + int64_t(i) * phase_bytes(), kMatrixSide * left_row_, left_row_,
          operand(false, n, task.first_channel, task.channels, left_positions_[i], phases_[i]),
          first, chunks, terms_);
    }
    if (!task.unrolled) return;
    const int64_t bytes = segment_steps_ * kMatrixDepth * kElement;
    for (int64_t term = 0; term < terms_; ++term) {
      char* row = to + term * left_term(task);
      for (const Tap& tap : taps_) {
        const char* from = planes + tap.phase * phase_bytes() + term * kMatrixSide * left_row_ +
                           tap.shift * kElement;
        for (int64_t c = 0; c < task.channels; ++c, row += unrolled_row(), from += left_row_) {
          std::copy(from, from + bytes, row);
        }
      }
    }
  }

  // ---- compute -----------------------------------------------------------------------------

  // The tiles of one task over a block of packed samples, added to `sums`, or to out without them.
  void compute(const Task& task, const char* left, const char* right, int64_t count,
               int64_t segment, float* sums, float* partial) const {
    alignas(64) float stack[kMatrixPair * kMatrixPair * kMatrixTile];
    MatrixTile tile{};
    tile.left_row = left_row(task);
    tile.left_term = left_term(task);
    tile.left_sample = left_sample(task);
    tile.right_term = right_term();
    tile.right_block = right_block_;
    tile.right_sample = right_sample_;
    tile.partial_block = source_count_ * kMatrixTile;
    tile.sum_block = sums != nullptr ? tile.partial_block : kMatrixPair * kMatrixTile;
    tile.steps = std::min(segment_steps_, steps_ - segment * segment_steps_);
    tile.samples = count;
    tile.first = segment == 0;
    tile.last = segment == segments_ - 1;
    tile.tail_steps = tile.last ? tail_steps_ : 0;
    tile.left_tail_step = left_tail_step(task);
    const char* const left_tail = left + terms_ * tile.left_term;
    const int64_t sources = int64_t(task.sources.size());
    for (int64_t b = 0; b < right_blocks(); b += kMatrixPair) {
      tile.right = right + b * tile.right_block;
      tile.right_tail = tile.right + terms_ * tile.right_term;
      tile.blocks = std::min(kMatrixPair, right_blocks() - b);
      for (int64_t s = 0; s < sources; s += kMatrixPair) {
        tile.sources = std::min(kMatrixPair, sources - s);
        for (int64_t i = 0; i < tile.sources; ++i) {
          tile.left[i] = left + task.sources[s + i].offset;
          tile.left_tail[i] = left_tail + (s + i) * kMatrixSide * kLine;
        }
        const int64_t at = (b * source_count_ + task.first_source + s) * kMatrixTile;
        tile.partial = segments_ > 1 ? partial + at : nullptr;
        if (sums != nullptr) {
          tile.sums = sums + at;
          k_.tile(tile, terms_);
          continue;
        }
        std::fill(std::begin(stack), std::end(stack), 0.0f);
        tile.sums = stack;
        if (tile.last) ask_for_out(task, s, b, tile);
        k_.tile(tile, terms_);
        if (tile.last) add_to_out(task, s, b, tile, stack);
      }
    }
  }

  // The row and the column of out that the tile of source s and block b begins at.
  std::pair<int64_t, int64_t> place_in_out(const Task& task, int64_t s, int64_t b) const {
    const int64_t left = (task.first_source + s) * kMatrixSide;
    const int64_t right = b * kMatrixSide;
    return gradient_left_ ? std::pair(left, right) : std::pair(right, left);
  }

  // By the time that the sums are done, what they are added to is near.
  void ask_for_out(const Task& task, int64_t s, int64_t b, const MatrixTile& tile) const {
    const auto [row, column] = place_in_out(task, s, b);
    const int64_t count = kMatrixSide * (gradient_left_ ? tile.sources : tile.blocks);
    const int64_t rows = std::min(count, p_.rows - row);
    for (int64_t r = 0; r < rows; ++r) {
      const float* const at = out_ + (row + r) * p_.out_stride[0] + column;
      __builtin_prefetch(at, 1);
      __builtin_prefetch(at + kMatrixSide, 1);
    }
  }

  void add_to_out(const Task& task, int64_t s, int64_t b, const MatrixTile& tile,
                  const float* sums) const {
    for (int64_t i = 0; i < tile.sources; ++i) {
      for (int64_t j = 0; j < tile.blocks; ++j) {
        const auto [row, column] = place_in_out(task, s + i, b + j);
        const float* const from = sums + j * tile.sum_block + i * kMatrixTile;
        const auto add = gradient_left_ ? k_.add_tile : k_.add_transposed_tile;
        add(out_ + row * p_.out_stride[0] + column, p_.out_stride[0],
            std::min(kMatrixSide, p_.rows - row), std::min(kMatrixSide, p_.columns - column), from,
            alpha_);
      }
    }
  }

  // Tasks in parallel: they share the packed right operand.
  void run_by_tasks() {
    // The rows of out are runs, unless out is a view of something else.
    const bool direct = single_ && p_.out_stride[1] == 1;
    const int64_t sum_count = direct ? 0 : sum_elements();
    const int64_t partial_count = segments_ > 1 ? sum_elements() : 0;
    const int64_t right_bytes = block_ * right_sample_;
    char* const right = static_cast<char*>(Workspace::get<Scope::kCall>(
        right_bytes + (sum_count + partial_count) * int64_t(sizeof(float))));
    float* const sums = direct ? nullptr : reinterpret_cast<float*>(right + right_bytes);
    float* const partial = reinterpret_cast<float*>(right + right_bytes) + sum_count;
    if (!direct) std::fill(sums, sums + sum_count, 0.0f);
    for (int64_t begin = 0; begin < p_.samples; begin += block_) {
      const int64_t count = std::min(block_, p_.samples - begin);
      for (int64_t segment = 0; segment < segments_; ++segment) {
        const int64_t pieces = ceil_div(right_blocks(), kBlocksAtOnce);
        torch::stable::parallel_for(0, count * pieces, 1, [&](int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) {
            const int64_t n = i / pieces, first = i % pieces * kBlocksAtOnce;
            pack_right(right + n * right_sample_, begin + n, first,
                       std::min(right_blocks(), first + kBlocksAtOnce), segment);
          }
        });
        torch::stable::parallel_for(0, int64_t(tasks_.size()), 1, [&](int64_t from, int64_t to) {
          char* const left = static_cast<char*>(Workspace::get<Scope::kThread>(most_left_bytes()));
          for (int64_t t = from; t < to; ++t) {
            run_task(tasks_[t], left, right, begin, count, segment, sums, partial);
          }
        });
      }
    }
    if (!direct) scatter(sums, 1);
  }

  // Samples in parallel, in parts with sums of their own.
  void run_by_samples() {
    const int64_t parts = std::min(kParts, p_.samples);
    block_ = std::min(block_, ceil_div(p_.samples, parts));
    const int64_t count = sum_elements();
    float* const sums =
        static_cast<float*>(Workspace::get<Scope::kCall>(parts * count * int64_t(sizeof(float))));
    torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
      const int64_t left_bytes = round_up(most_left_bytes(), kLine);
      const int64_t right_bytes = block_ * right_sample_;
      const int64_t partial_bytes = segments_ > 1 ? count * int64_t(sizeof(float)) : 0;
      char* const left = static_cast<char*>(
          Workspace::get<Scope::kThread>(left_bytes + right_bytes + partial_bytes));
      char* const right = left + left_bytes;
      float* const partial = reinterpret_cast<float*>(right + right_bytes);
      for (int64_t part = from; part < to; ++part) {
        float* const own = sums + part * count;
        std::fill(own, own + count, 0.0f);
        const int64_t end = p_.samples * (part + 1) / parts;
        for (int64_t begin = p_.samples * part / parts; begin < end; begin += block_) {
          const int64_t block = std::min(block_, end - begin);
          for (int64_t segment = 0; segment < segments_; ++segment) {
            for (int64_t n = 0; n < block; ++n) {
              pack_right(right + n * right_sample_, begin + n, 0, right_blocks(), segment);
            }
            for (const Task& task : tasks_) {
              run_task(task, left, right, begin, block, segment, own, partial);
            }
          }
        }
      }
    });
    scatter(sums, parts);
  }

  void run_task(const Task& task, char* left, const char* right, int64_t begin, int64_t count,
                int64_t segment, float* sums, float* partial) const {
    const int64_t sample = left_sample(task);
    for (int64_t n = 0; n < count; ++n) {
      pack_left(left + n * sample, left + count * sample, task, begin + n, segment);
    }
    k_.begin();
    compute(task, left, right, count, segment, sums, partial);
    k_.end();
  }

  // out += alpha * the parts' sums, from [right block][source][row][column] to the strides of out.
  void scatter(const float* sums, int64_t parts) const {
    const int64_t part = sum_elements();
    const int64_t tasks = int64_t(tasks_.size());
    torch::stable::parallel_for(0, tasks * right_blocks(), 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const Task& task = tasks_[i % tasks];
        const int64_t b = i / tasks;
        const float* source = sums + (b * source_count_ + task.first_source) * kMatrixTile;
        for (size_t s = 0; s < task.sources.size(); ++s, source += kMatrixTile) {
          scatter_tile(source, part, parts, task, int64_t(s), b);
        }
      }
    });
  }

  void scatter_tile(const float* sums, int64_t part, int64_t parts, const Task& task, int64_t s,
                    int64_t block) const {
    const int64_t right = right_channels();
    const int64_t columns = std::min(kMatrixSide, right - block * kMatrixSide);
    const int64_t column_stride = p_.out_stride[gradient_left_ ? 1 : 0];
    for (int64_t r = 0; r < task.sources[s].rows; ++r) {
      float* const to = out_ + row_offset(task, s, r) + block * kMatrixSide * column_stride;
      float value[kMatrixSide] = {};
      for (int64_t q = 0; q < parts; ++q) {
        const float* from = sums + q * part + r * kMatrixSide;
        for (int64_t c = 0; c < kMatrixSide; ++c) value[c] += from[c];
      }
      for (int64_t c = 0; c < columns; ++c) to[c * column_stride] += alpha_ * value[c];
    }
  }

  int64_t row_offset(const Task& task, int64_t s, int64_t r) const {
    if (single_) {
      return (task.first_channel + s * kMatrixSide + r) * p_.out_stride[gradient_left_ ? 0 : 1];
    }
    const int64_t row = s * kMatrixSide + r;
    const int64_t tap = task.unrolled ? row / task.channels : s;
    const int64_t channel = task.first_channel + (task.unrolled ? row % task.channels : r);
    return channel * p_.out_stride[1] + taps_[tap].line * p_.out_stride[2] +
           taps_[tap].position * p_.out_stride[3];
  }

  const MatrixKernels& k_;
  const Problem& p_;
  const char* g_;
  const char* x_;
  const bool is_bfloat16_;
  float* out_;
  const float alpha_;
  const int64_t terms_;
  // A single tap that reads no padding; the wider operand is then on the left.
  bool single_, gradient_left_;
  std::vector<Phase> phases_;
  std::vector<Tap> taps_;
  std::vector<Task> tasks_;
  std::vector<Positions> left_positions_;
  Positions right_positions_;
  // The flat layout: positions from one line to the next, and what its first is of a phase.
  int64_t pitch_ = 0, first_line_ = 0, first_position_ = 0, most_shift_ = 0;
  int64_t steps_ = 0, segments_ = 1, segment_steps_ = 0, packed_positions_ = 0;
  // Positions after the last whole step, and the steps that they take.
  int64_t tail_ = 0, tail_steps_ = 0;
  int64_t left_row_ = 0, right_block_ = 0, right_sample_ = 0;  // bytes
  int64_t unrolled_rows_ = 0, source_count_ = 0, block_ = 1;
};

}  // namespace

bool run_matrix(const MatrixKernels& kernels, const Problem& problem, const void* g, const void* x,
                bool is_bfloat16, float* out, float alpha) {
  if (problem.groups != 1 || problem.absolute || problem.samples == 0) return false;
  if (problem.rows == 0 || problem.columns == 0) return false;
  if (problem.out_height * problem.out_width == 0) return false;
  // What a vector gathers lies within 32 bits.
  const int64_t reach = std::numeric_limits<int32_t>::max() / kMatrixSide;
  if (problem.g_stride[3] > reach || problem.x_stride[3] * problem.stride_w > reach) return false;
  MatrixOuter outer(kernels, problem, g, x, is_bfloat16, out, alpha);
  if (!always_matrix_unit() && !outer.is_faster()) return false;
  outer.run();
  return true;
}

}  // namespace fastfisher::cpu
