// The outer family: out[o, i] += alpha * sum_n (sum_t g[n, t, o] * x[n, t, i])^2 for linear layers
// with positions and for two-dimensional convolutions as implicit GEMM.
//
// A call goes over blocks of samples. A block is packed once (panels of g and x with the channels
// innermost, but for what can be read where it is), then tiles of the output are computed; each
// tile loops over the samples of the block.
//
// Where the output is small, threads share the samples: each packs and contracts its own, into
// sums of its own. Where it is large they share its tiles. Which of the two, and into how many
// parts, the shape alone decides, so the result has the same bits for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../outer_problem.h"
#include "dispatch.h"
#include "matrix.h"
#include "workspace.h"

namespace fastfisher::cpu {
namespace {

// A block of packed samples should stay in the second-level cache: of the cores that share it, or
// of one core.
constexpr int64_t kBlockBytes = int64_t{1} << 20;
constexpr int64_t kThreadBlockBytes = int64_t{1} << 19;
// The sums of a part of the samples should stay there too.
constexpr int64_t kPartialBytes = int64_t{1} << 16;
// Parts that samples are shared in, at most, at least, and by how many positions a part should
// have: constants, never the number of threads.
constexpr int64_t kParts = 16;
constexpr int64_t kFewestParts = 4;
constexpr int64_t kPartWork = 1024;
// Positions farther apart compete for the same sets of the first-level cache: not worth reading in
// place. Measured with 64 channels of float32: half the speed.
constexpr int64_t kInPlaceBytes = 128;
// But for so many, unless they are a multiple of what a way of that cache holds apart.
constexpr int64_t kFewPositions = 16;
constexpr int64_t kSetBytes = 4096;
// Where there are so many panels of rows, threads share them; a task has a few, a constant number
// that does not depend on the threads.
constexpr int64_t kManyPanels = 32;
constexpr int64_t kRowTasks = 8;
constexpr int64_t kMostPanels = 4;
// Panels packed at once: few, so that threads share the work, and more than one for those that
// share cache lines.
constexpr int64_t kPanelsAtOnce = 8;
// Elements that a short copy moves at once.
constexpr int64_t kCopyElements = 4;
// Lanes of the widest vector of the widest instruction set.
constexpr int64_t kMaxLanes = 16;

// Positions [begin, end) of the output whose input index o * stride + offset lies in [0, size).
struct Range {
  int64_t begin, end;
};

Range valid_range(int64_t size, int64_t out_size, int64_t stride, int64_t offset) {
  const int64_t begin = offset >= 0 ? 0 : std::min(out_size, ceil_div(-offset, stride));
  const int64_t last = size - 1 - offset;
  const int64_t end = last < 0 ? 0 : std::min(out_size, last / stride + 1);
  return {begin, std::max(begin, end)};
}

// How the columns of one panel of input channels are laid out.
enum class Layout {
  kTap,      // [H][W][channels]; one product for each kernel position
  kWindow,   // [H][padded W][channels]; one product for each kernel line
  kUnrolled  // [OH][OW][kernel line, kernel position, channels]; one product
};

struct Panel {
  Layout layout;
  int64_t first_channel, channels;
  bool in_place;     // x is read where it is, not packed
  int64_t position;  // elements from one position to the next
  int64_t line;      // elements from one line to the next
  int64_t sample;    // elements of a packed sample
  int64_t offset;    // of the panel in the packed block of one group, times samples in the block
};

// One product of a panel: a rectangle of output positions and where its input begins.
struct Product {
  int64_t panel;
  Range lines, positions;
  int64_t x_offset;  // from the packed sample's start
  int64_t x_line, x_position;
  int64_t columns;
  int64_t out_offset;
  std::vector<int64_t> out_column;  // empty where the columns are contiguous in out
};

// Where a block of packed samples lies.
template <typename T>
struct Packed {
  T* x;
  T* g;
  int64_t first_row_panel;  // the panel of rows that g begins with
};

template <typename T>
class Outer {
 public:
  Outer(const Problem& problem, const T* g, const T* x, T* out, T alpha)
      : p_(problem), k_(kernels().of<T>()), g_(g), x_(x), out_(out), alpha_(alpha) {
    depthwise_ = p_.groups > 1 && p_.rows == 1 && p_.columns == 1;
    groups_ = depthwise_ ? 1 : p_.groups;
    plan_columns();
    plan_rows();
    out_elements_ = span_of_out();
  }

  void run() {
    if (p_.samples == 0 || total_rows_ == 0 || products_.empty()) return;
    if (p_.out_height * p_.out_width == 0) return;
    // A view of a much larger tensor is not worth private sums.
    const int64_t entries = p_.groups * p_.rows * p_.columns * p_.kernel_height * p_.kernel_width;
    // Nor are they where a part has so little work that to clear and to add them takes as long.
    const int64_t work = p_.samples * p_.out_height * p_.out_width / kPartWork;
    parts_ = std::min({kParts, p_.samples, work});
    if (parts_ >= kFewestParts && out_elements_ <= 2 * entries &&
        out_elements_ * int64_t(sizeof(T)) <= kPartialBytes) {
      run_by_samples();
    } else if (groups_ == 1 && row_panels_ >= kManyPanels) {
      run_by_rows();
    } else {
      run_by_tiles();
    }
  }

 private:
  int64_t tiles() const {
    // The panels of g and x of a depthwise product hold the same channels: it has one tile.
    return int64_t(products_.size()) * (depthwise_ ? 1 : groups_ * row_panels_);
  }

  void set_block(int64_t bytes, int64_t samples) {
    const int64_t per_sample = groups_ * (x_bytes_ + g_bytes_);
    block_ = std::clamp<int64_t>(bytes / std::max<int64_t>(per_sample, 1), 1, samples);
  }

  template <Scope scope>
  Packed<T> buffers() const {
    // Whole vectors are read and written past the last panel.
    const int64_t slack = 4 * k_.vector_lanes;
    const int64_t x_elements = block_ * groups_ * x_sample_ + slack;
    const int64_t g_elements = block_ * groups_ * g_sample_ + slack;
    T* const memory = static_cast<T*>(Workspace::get<scope>((x_elements + g_elements) * sizeof(T)));
    std::fill(memory + x_elements - slack, memory + x_elements, T(0));
    std::fill(memory + x_elements + g_elements - slack, memory + x_elements + g_elements, T(0));
    return {memory, memory + x_elements, 0};
  }

  void run_by_tiles() {
    set_block(kBlockBytes, p_.samples);
    const Packed<T> packed = buffers<Scope::kCall>();
    for (int64_t begin = 0; begin < p_.samples; begin += block_) {
      const int64_t count = std::min(block_, p_.samples - begin);
      torch::stable::parallel_for(0, count * groups_ * pieces(), 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) pack(packed, begin, i);
      });
      torch::stable::parallel_for(0, tiles(), 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) compute_tile(packed, begin, count, i, out_, alpha_);
      });
    }
  }

  // Rows in the outer loop: what a thread packs of g it alone reads, and at once. The block holds
  // columns only, so it has more samples, and each tile of out is read and written less often.
  void run_by_rows() {
    const int64_t positions = p_.out_height * p_.out_width;
    const int64_t panels = std::clamp<int64_t>(row_panels_ / kRowTasks, 1, kMostPanels);
    const int64_t g_sample = panels * row_panel_ * positions;
    block_ = std::min(kBlockBytes / std::max<int64_t>(x_bytes_, 1),
                      kThreadBlockBytes / (g_sample * int64_t(sizeof(T))));
    block_ = std::clamp<int64_t>(block_, 1, p_.samples);
    const int64_t slack = 4 * k_.vector_lanes;
    const int64_t x_elements = block_ * x_sample_ + slack;
    T* const x = static_cast<T*>(Workspace::get<Scope::kCall>(x_elements * sizeof(T)));
    std::fill(x + x_elements - slack, x + x_elements, T(0));
    const int64_t column_pieces = pieces() - row_pieces();
    for (int64_t begin = 0; begin < p_.samples; begin += block_) {
      const int64_t count = std::min(block_, p_.samples - begin);
      torch::stable::parallel_for(0, count * column_pieces, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const int64_t n = i / column_pieces;
          pack({x, nullptr, 0}, begin, n * pieces() + row_pieces() + i % column_pieces);
        }
      });
      const int64_t tasks = ceil_div(row_panels_, panels);
      torch::stable::parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
        T* const g = static_cast<T*>(
            Workspace::get<Scope::kThread>((block_ * g_sample + slack) * sizeof(T)));
        for (int64_t task = from; task < to; ++task) {
          const int64_t first = task * panels;
          const int64_t last = std::min(row_panels_, first + panels);
          const Packed<T> packed{x, g, first};
          for (int64_t n = 0; n < count; ++n) pack_rows(packed, begin, n, 0, first, last);
          for (const Product& product : products_) {
            for (int64_t panel = first; panel < last; ++panel) {
              compute(packed, begin, count, product, 0, panel, out_, alpha_);
            }
          }
        }
      });
    }
  }

  void run_by_samples() {
    const int64_t parts = parts_;
    set_block(kThreadBlockBytes, ceil_div(p_.samples, parts));
    T* const partial =
        static_cast<T*>(Workspace::get<Scope::kCall>(parts * out_elements_ * sizeof(T)));
    torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
      const Packed<T> packed = buffers<Scope::kThread>();
      for (int64_t part = from; part < to; ++part) {
        T* const out = partial + part * out_elements_;
        std::fill(out, out + out_elements_, T(0));
        const int64_t end = p_.samples * (part + 1) / parts;
        for (int64_t begin = p_.samples * part / parts; begin < end; begin += block_) {
          const int64_t count = std::min(block_, end - begin);
          for (int64_t i = 0; i < count * groups_ * pieces(); ++i) pack(packed, begin, i);
          for (int64_t i = 0; i < tiles(); ++i) {
            compute_tile(packed, begin, count, i, out, T(1));
          }
        }
      }
    });
    add_partial(partial, parts);
  }

  void plan_columns() {
    const int64_t lanes = k_.vector_lanes;
    const int64_t channels = depthwise_ ? p_.groups : p_.columns;
    const int64_t whole = 2 * lanes;
    for (int64_t c = 0; c < channels; c += whole) {
      Panel panel{};
      panel.first_channel = c;
      panel.channels = std::min(whole, channels - c);
      const bool window = p_.kernel_width > 1 && p_.dilation_w == 1;
      if (depthwise_ || panel.channels == whole || readable_in_place(panel.channels)) {
        panel.layout = Layout::kTap;
      } else if (p_.kernel_height * p_.kernel_width > 1 &&
                 (!window || 2 * p_.kernel_width * panel.channels <= lanes)) {
        panel.layout = Layout::kUnrolled;
      } else {
        panel.layout = window ? Layout::kWindow : Layout::kTap;
      }
      const int64_t taps = p_.kernel_height * p_.kernel_width;
      if (panel.layout == Layout::kUnrolled) {
        panel.position = taps * panel.channels;
        panel.line = p_.out_width * panel.position;
        panel.sample = p_.out_height * panel.line;
      } else if (panel.layout == Layout::kTap && readable_in_place(panel.channels)) {
        panel.in_place = true;
        panel.position = p_.x_stride[3];
        panel.line = p_.x_stride[2];
      } else {
        panel.position = panel.channels;
        panel.line = panel.channels * (panel.layout == Layout::kWindow
                                           ? (p_.out_width - 1) * p_.stride_w + p_.kernel_width
                                           : p_.width);
        panel.sample = p_.height * panel.line;
      }
      panel.offset = x_sample_;
      x_sample_ += panel.sample;
      x_bytes_ += sizeof(T) * std::max(panel.sample, p_.height * p_.width * panel.channels);
      panels_.push_back(panel);
    }
    for (int64_t i = 0; i < int64_t(panels_.size()); ++i) plan_products(i);
  }

  // Whether x lies in memory as its packed panel would.
  bool readable_in_place(int64_t channels) const {
    if (depthwise_ || p_.x_stride[1] != 1 || channels % k_.vector_lanes != 0) return false;
    // A few positions are near enough, unless they share a set of the first-level cache.
    const bool few = p_.kernel_height * p_.kernel_width == 1 &&
                     p_.out_height * p_.out_width <= kFewPositions &&
                     p_.x_stride[3] * int64_t(sizeof(T)) % kSetBytes != 0;
    return few || (p_.x_stride[3] == channels && channels * int64_t(sizeof(T)) <= kInPlaceBytes);
  }

  void plan_rows() {
    const int64_t positions = p_.out_height * p_.out_width;
    total_rows_ = depthwise_ ? p_.groups : p_.rows;
    g_bytes_ = total_rows_ * positions * int64_t(sizeof(T));
    g_in_place_ = !depthwise_ && p_.g_stride[1] == 1 && p_.g_stride[3] > 0 &&
                  p_.g_stride[3] * int64_t(sizeof(T)) <= kInPlaceBytes;
    if (g_in_place_) {
      row_panel_ = total_rows_;
    } else if (depthwise_) {
      // The channels take the place of the groups: panels of channels, one row each.
      row_panel_ = 2 * k_.vector_lanes;
    } else {
      bool narrow = true;
      for (const Product& product : products_) {
        narrow = narrow && product.columns <= k_.vector_lanes;
      }
      const int64_t most = narrow ? k_.max_rows_narrow : k_.max_rows;
      row_panel_ = ceil_div(p_.rows, ceil_div(p_.rows, most));
    }
    row_panels_ = ceil_div(total_rows_, row_panel_);
    g_sample_ = g_in_place_ ? 0 : row_panels_ * row_panel_ * positions;
  }

  void plan_products(int64_t index) {
    const Panel& panel = panels_[index];
    const Range all_lines{0, p_.out_height};
    const Range all_positions{0, p_.out_width};
    const int64_t first = depthwise_ ? 0 : panel.first_channel * p_.out_stride[1];
    if (panel.layout == Layout::kUnrolled) {
      Product product{index,          all_lines,      all_positions, 0, panel.line,
                      panel.position, panel.position, first,         {}};
      set_columns(product, p_.kernel_height, p_.kernel_width, panel.channels);
      products_.push_back(std::move(product));
      return;
    }
    for (int64_t kh = 0; kh < p_.kernel_height; ++kh) {
      const int64_t line_offset = kh * p_.dilation_h - p_.pad_h;
      const Range lines = valid_range(p_.height, p_.out_height, p_.stride_h, line_offset);
      if (lines.begin >= lines.end) continue;
      const int64_t x_line = panel.line * p_.stride_h;
      const int64_t line_start = (lines.begin * p_.stride_h + line_offset) * panel.line;
      const int64_t out_line = first + kh * p_.out_stride[2];
      if (panel.layout == Layout::kWindow) {
        Product product{index,
                        lines,
                        all_positions,
                        line_start,
                        x_line,
                        p_.stride_w * panel.position,
                        p_.kernel_width * panel.channels,
                        out_line,
                        {}};
        set_columns(product, 1, p_.kernel_width, panel.channels);
        products_.push_back(std::move(product));
        continue;
      }
      for (int64_t kw = 0; kw < p_.kernel_width; ++kw) {
        const int64_t offset = kw * p_.dilation_w - p_.pad_w;
        const Range positions = valid_range(p_.width, p_.out_width, p_.stride_w, offset);
        if (positions.begin >= positions.end) continue;
        Product product{index,
                        lines,
                        positions,
                        line_start + (positions.begin * p_.stride_w + offset) * panel.position,
                        x_line,
                        p_.stride_w * panel.position,
                        panel.channels,
                        out_line + kw * p_.out_stride[3],
                        {}};
        if (!depthwise_) set_columns(product, 1, 1, panel.channels);
        products_.push_back(std::move(product));
      }
    }
  }

  void set_columns(Product& product, int64_t kernel_height, int64_t kernel_width,
                   int64_t channels) const {
    bool contiguous = true;
    std::vector<int64_t> offsets;
    offsets.reserve(product.columns);
    for (int64_t kh = 0; kh < kernel_height; ++kh) {
      for (int64_t kw = 0; kw < kernel_width; ++kw) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t offset =
              kh * p_.out_stride[2] + kw * p_.out_stride[3] + c * p_.out_stride[1];
          contiguous = contiguous && offset == int64_t(offsets.size());
          offsets.push_back(offset);
        }
      }
    }
    if (!contiguous) product.out_column = std::move(offsets);
  }

  // Elements that out spans from its first to its last entry, all groups together.
  int64_t span_of_out() const {
    return 1 + (p_.groups * p_.rows - 1) * p_.out_stride[0] + (p_.columns - 1) * p_.out_stride[1] +
           (p_.kernel_height - 1) * p_.out_stride[2] + (p_.kernel_width - 1) * p_.out_stride[3];
  }

  // The panels of one group of one sample are packed a few at a time, the rows first.
  int64_t row_pieces() const { return g_in_place_ ? 0 : ceil_div(row_panels_, kPanelsAtOnce); }
  int64_t pieces() const { return row_pieces() + ceil_div(int64_t(panels_.size()), kPanelsAtOnce); }

  // Packs piece i % pieces() of the rest's group of the rest's sample.
  void pack(const Packed<T>& packed, int64_t begin, int64_t i) const {
    const int64_t n = i / pieces() / groups_;
    const int64_t group = i / pieces() % groups_;
    const int64_t piece = i % pieces();
    if (piece < row_pieces()) {
      pack_rows(packed, begin, n, group, piece * kPanelsAtOnce,
                std::min(row_panels_, (piece + 1) * kPanelsAtOnce));
    } else {
      const int64_t first = (piece - row_pieces()) * kPanelsAtOnce;
      pack_columns(packed, begin, n, group, first,
                   std::min(int64_t(panels_.size()), first + kPanelsAtOnce));
    }
  }

  void pack_rows(const Packed<T>& packed, int64_t begin, int64_t n, int64_t group, int64_t from,
                 int64_t to) const {
    const int64_t sample = row_panel_ * p_.out_height * p_.out_width;
    const int64_t row = from * row_panel_;
    const int64_t rows = std::min(to * row_panel_, total_rows_) - row;
    const T* g = g_ + (begin + n) * p_.g_stride[0] + (group * p_.rows + row) * p_.g_stride[1];
    T* target = packed.g + group * block_ * g_sample_ +
                ((from - packed.first_row_panel) * block_ + n) * sample;
    if (p_.g_stride[1] == 1) {
      pack_across(target, block_ * sample, row_panel_, g, p_.g_stride, rows, p_.out_height,
                  p_.out_width);
      return;
    }
    for (int64_t r = 0; r < rows; r += row_panel_, target += block_ * sample) {
      pack_plane(target, row_panel_, g + r * p_.g_stride[1], p_.g_stride,
                 std::min(row_panel_, rows - r), p_.out_height, p_.out_width,
                 p_.out_width * row_panel_);
    }
  }

  void pack_columns(const Packed<T>& packed, int64_t begin, int64_t n, int64_t group, int64_t from,
                    int64_t to) const {
    const T* x = x_ + (begin + n) * p_.x_stride[0] + group * p_.columns * p_.x_stride[1];
    T* const target = packed.x + group * block_ * x_sample_;
    const int64_t width = 2 * k_.vector_lanes;
    if (p_.x_stride[1] == 1 && panels_[from].channels == width && !panels_[from].in_place) {
      // Only the last panel of all may be narrower.
      const int64_t whole = panels_[to - 1].channels == width ? to : to - 1;
      const Panel& panel = panels_[from];
      pack_across(target + panel.offset * block_ + n * panel.sample, block_ * panel.sample, width,
                  x + panel.first_channel, p_.x_stride, (whole - from) * width, p_.height,
                  p_.width);
      from = whole;
    }
    for (int64_t i = from; i < to; ++i) {
      const Panel& panel = panels_[i];
      if (panel.in_place) continue;
      T* const plane = target + panel.offset * block_ + n * panel.sample;
      const T* const source = x + panel.first_channel * p_.x_stride[1];
      if (panel.layout == Layout::kTap) {
        pack_plane(plane, panel.channels, source, p_.x_stride, panel.channels, p_.height, p_.width,
                   panel.line);
      } else if (panel.layout == Layout::kWindow) {
        pack_window(plane, source, panel);
      } else {
        pack_unrolled(plane, source, panel);
      }
    }
  }

  // Several panels of an operand whose channels are contiguous, position by position: panels share
  // cache lines, and positions far apart would drive each other out of the cache.
  void pack_across(T* to, int64_t panel_stride, int64_t width, const T* from, const int64_t* stride,
                   int64_t channels, int64_t lines, int64_t positions) const {
    if (stride[2] == positions * stride[3]) {
      positions *= lines;
      lines = 1;
    }
    for (int64_t h = 0; h < lines; ++h) {
      k_.pack_across(to + h * positions * width, panel_stride, width, from + h * stride[2],
                     stride[3], channels, positions);
    }
  }

  void pack_plane(T* to, int64_t ld, const T* from, const int64_t* stride, int64_t rows,
                  int64_t lines, int64_t positions, int64_t line) const {
    if (stride[2] == positions * stride[3] && line == positions * ld) {
      positions *= lines;
      lines = 1;
    }
    for (int64_t h = 0; h < lines; ++h) {
      pack_line(to + h * line, ld, from + h * stride[2], stride[1], stride[3], rows, positions);
    }
  }

  // The pack kernel writes whole vectors, which may run over the end of the line into what another
  // thread packs. The last positions therefore go through a buffer.
  void pack_line(T* to, int64_t ld, const T* from, int64_t row_stride, int64_t position_stride,
                 int64_t rows, int64_t positions) const {
    const int64_t lanes = k_.vector_lanes;
    const int64_t overrun = (rows > lanes ? 2 * lanes : lanes) - ld;
    if (overrun <= 0 || position_stride != 1) {
      k_.pack(to, ld, from, row_stride, position_stride, rows, positions);
      return;
    }
    const int64_t head = std::max<int64_t>(0, positions - ceil_div(overrun, ld)) / lanes * lanes;
    if (head > 0) k_.pack(to, ld, from, row_stride, 1, rows, head);
    T buffer[kMaxLanes * (2 * kMaxLanes + 4)];
    for (int64_t t = head; t < positions; t += lanes) {
      const int64_t count = std::min(lanes, positions - t);
      k_.pack(buffer, ld, from + t, row_stride, 1, rows, count);
      std::copy(buffer, buffer + count * ld, to + t * ld);
    }
  }

  void pack_window(T* to, const T* from, const Panel& panel) const {
    const int64_t padded = panel.line / panel.channels;
    const int64_t left = std::min(p_.pad_w, padded);
    const int64_t inside = std::clamp<int64_t>(padded - left, 0, p_.width);
    for (int64_t h = 0; h < p_.height; ++h) {
      T* line = to + h * panel.line;
      std::fill(line, line + left * panel.channels, T(0));
      pack_line(line + left * panel.channels, panel.channels, from + h * p_.x_stride[2],
                p_.x_stride[1], p_.x_stride[3], panel.channels, inside);
      std::fill(line + (left + inside) * panel.channels, line + panel.line, T(0));
    }
  }

  // Every output position's window, as the concatenation of its kernel lines. The padded lines are
  // made first; a window is then one short run of each.
  void pack_unrolled(T* to, const T* from, const Panel& panel) const {
    const int64_t channels = panel.channels;
    const int64_t reach = (p_.kernel_width - 1) * p_.dilation_w + 1;
    const int64_t padded = (p_.out_width - 1) * p_.stride_w + reach;
    const int64_t left = std::min(p_.pad_w, padded);
    const int64_t inside = std::clamp<int64_t>(padded - left, 0, p_.width);
    const int64_t line = padded * channels;
    // One line of zeros stands for every line outside of the image.
    std::vector<T> lines((p_.height + 1) * line + kCopyElements, T(0));
    for (int64_t h = 0; h < p_.height; ++h) {
      pack_line(lines.data() + h * line + left * channels, channels, from + h * p_.x_stride[2],
                p_.x_stride[1], p_.x_stride[3], channels, inside);
    }
    const bool contiguous = p_.dilation_w == 1;
    const int64_t run = contiguous ? p_.kernel_width * channels : channels;
    const int64_t runs = contiguous ? 1 : p_.kernel_width;
    const T* const end = to + panel.sample;
    for (int64_t oh = 0; oh < p_.out_height; ++oh) {
      for (int64_t ow = 0; ow < p_.out_width; ++ow) {
        T* window = to + oh * panel.line + ow * p_.kernel_height * runs * run;
        for (int64_t kh = 0; kh < p_.kernel_height; ++kh) {
          const int64_t h = oh * p_.stride_h + kh * p_.dilation_h - p_.pad_h;
          const T* source = lines.data() + (h >= 0 && h < p_.height ? h : p_.height) * line +
                            ow * p_.stride_w * channels;
          for (int64_t k = 0; k < runs; ++k, window += run) {
            copy_run(window, source + k * p_.dilation_w * channels, run, end);
          }
        }
      }
    }
  }

  // Copies `count` elements in steps that the compiler knows. They may spill into what is written
  // next, but not past `end`: what follows is another sample's, and perhaps packed already.
  static void copy_run(T* to, const T* from, int64_t count, const T* end) {
    if (end - to < ceil_div(count, kCopyElements) * kCopyElements) {
      std::copy(from, from + count, to);
      return;
    }
    for (int64_t i = 0; i < count; i += kCopyElements) {
      __builtin_memcpy(to + i, from + i, kCopyElements * sizeof(T));
    }
  }

  // One tile of the sums over `count` packed samples, added to `out`.
  void compute_tile(const Packed<T>& packed, int64_t begin, int64_t count, int64_t index, T* out,
                    T alpha) const {
    const int64_t row_panels = depthwise_ ? 1 : row_panels_;
    const int64_t rest = index / row_panels;
    const Product& product = products_[rest % int64_t(products_.size())];
    const int64_t group = rest / int64_t(products_.size());
    const int64_t row_panel = depthwise_ ? product.panel : index % row_panels;
    compute(packed, begin, count, product, group, row_panel, out, alpha);
  }

  void compute(const Packed<T>& packed, int64_t begin, int64_t count, const Product& product,
               int64_t group, int64_t row_panel, T* out, T alpha) const {
    const Panel& panel = panels_[product.panel];
    const int64_t first_row = row_panel * row_panel_;

    const T* g;
    int64_t g_sample, g_line, g_position;
    if (g_in_place_) {
      g = g_ + begin * p_.g_stride[0] + group * p_.rows * p_.g_stride[1];
      g_sample = p_.g_stride[0];
      g_line = p_.g_stride[2];
      g_position = p_.g_stride[3];
    } else {
      g_position = row_panel_;
      g_line = p_.out_width * g_position;
      g_sample = p_.out_height * g_line;
      g = packed.g + group * block_ * g_sample_ +
          (row_panel - packed.first_row_panel) * block_ * g_sample;
    }
    g += product.lines.begin * g_line + product.positions.begin * g_position;
    const T* x;
    int64_t x_sample;
    if (panel.in_place) {
      x = x_ + begin * p_.x_stride[0] + (group * p_.columns + panel.first_channel) * p_.x_stride[1];
      x_sample = p_.x_stride[0];
    } else {
      x = packed.x + group * block_ * x_sample_ + panel.offset * block_;
      x_sample = panel.sample;
    }
    x += product.x_offset;
    out += product.out_offset + (group * p_.rows + first_row) * p_.out_stride[0];
    const int64_t lines = product.lines.end - product.lines.begin;
    const int64_t positions = product.positions.end - product.positions.begin;
    const int64_t rows = std::min(row_panel_, total_rows_ - first_row);
    if (depthwise_) {
      k_.depthwise_tile({g, g_sample, g_line, g_position, x, x_sample, product.x_line,
                         product.x_position, count, lines, positions, rows, out, p_.out_stride[0],
                         alpha, p_.absolute});
      return;
    }
    k_.outer_tile({g, g_sample, g_line, g_position, x, x_sample, product.x_line, product.x_position,
                   count, lines, positions, rows, product.columns, out, p_.out_stride[0],
                   product.out_column.empty() ? nullptr : product.out_column.data(), alpha,
                   p_.absolute});
  }

  // Entries of out that no product touches stay zero in the partial sums, and gaps between the
  // strides of out are never written.
  void add_partial(const T* partial, int64_t parts) const {
    const int64_t rows = p_.groups * p_.rows;
    torch::stable::parallel_for(0, rows, ceil_div(rows, 16), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        for (int64_t kh = 0; kh < p_.kernel_height; ++kh) {
          for (int64_t kw = 0; kw < p_.kernel_width; ++kw) {
            const int64_t base =
                row * p_.out_stride[0] + kh * p_.out_stride[2] + kw * p_.out_stride[3];
            for (int64_t c = 0; c < p_.columns; ++c) {
              const int64_t at = base + c * p_.out_stride[1];
              T sum = 0;
              for (int64_t q = 0; q < parts; ++q) sum += partial[q * out_elements_ + at];
              out_[at] += alpha_ * sum;
            }
          }
        }
      }
    });
  }

  const Problem p_;
  const Kernels<T>& k_;
  const T* g_;
  const T* x_;
  T* out_;
  T alpha_;
  bool depthwise_ = false;
  bool g_in_place_ = false;
  int64_t groups_ = 1, row_panel_ = 1, row_panels_ = 1, total_rows_ = 0;
  // Elements that one group of one sample takes when packed, and the bytes that it is read from.
  int64_t x_sample_ = 0, g_sample_ = 0, x_bytes_ = 0, g_bytes_ = 0;
  int64_t block_ = 1, parts_ = 1, out_elements_ = 0;
  std::vector<Panel> panels_;
  std::vector<Product> products_;
};

template <typename T>
void run(const Problem& problem, const Tensor& out, const Tensor& grad, const Tensor& input,
         double alpha) {
  Outer<T>(problem, static_cast<const T*>(grad.const_data_ptr()),
           static_cast<const T*>(input.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
           static_cast<T>(alpha))
      .run();
}

// False, and nothing done, for operands that are to be converted to the dtype of out first.
bool run(const Problem& problem, const Tensor& out, const Tensor& grad, const Tensor& input,
         double alpha) {
  if (out.scalar_type() == ScalarType::Double) {
    run<double>(problem, out, grad, input, alpha);
    return true;
  }
  const bool is_bfloat16 = grad.scalar_type() == ScalarType::BFloat16;
  const MatrixKernels* const matrix = kernels().matrix;
  if (matrix != nullptr &&
      run_matrix(*matrix, problem, grad.const_data_ptr(), input.const_data_ptr(), is_bfloat16,
                 static_cast<float*>(out.mutable_data_ptr()), float(alpha))) {
    return true;
  }
  if (is_bfloat16) return false;
  run<float>(problem, out, grad, input, alpha);
  return true;
}

}  // namespace

void linear_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, double alpha, int64_t power,
                              bool allow_tf32) {
  if (run(linear_problem(out, grad, input, power), out, grad, input, alpha)) return;
  linear_sum_grad_squared_(out, torch::stable::to(grad, ScalarType::Float),
                           torch::stable::to(input, ScalarType::Float), alpha, power, allow_tf32);
}

void conv2d_sum_grad_squared_(Tensor out, Tensor grad, Tensor input, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation,
                              int64_t groups, double alpha, int64_t power, bool allow_tf32) {
  const Problem p = conv2d_problem(out, grad, input, stride, padding, dilation, groups, power);
  if (run(p, out, grad, input, alpha)) return;
  conv2d_sum_grad_squared_(out, torch::stable::to(grad, ScalarType::Float),
                           torch::stable::to(input, ScalarType::Float), stride, padding, dilation,
                           groups, alpha, power, allow_tf32);
}

}  // namespace fastfisher::cpu
