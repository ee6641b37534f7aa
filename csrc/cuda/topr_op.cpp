// The top-R operators: checks, memory, and the table that tells kernels of the tensors.
#include "topr.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "entry.h"

namespace fastfisher::cuda {
namespace {

using topr::Entry;
using topr::Layout;
using topr::Operand;
using topr::Table;

#define FF_CHECK_TOPR(argument, condition, ...) \
  STD_TORCH_CHECK(condition, "fastfisher::", op, ": " argument ": ", __VA_ARGS__)

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, topr::kAlignment) * topr::kAlignment; }

bool together(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto own = a.sizes(), other = b.sizes();
  return own.size() == other.size() &&
         std::equal(own.data(), own.data() + own.size(), other.data());
}

bool is_score(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
         type == ScalarType::Double;
}

topr::Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return topr::Dtype::kHalf;
    case ScalarType::BFloat16:
      return topr::Dtype::kBFloat16;
    case ScalarType::Float:
      return topr::Dtype::kFloat;
    default:
      return topr::Dtype::kDouble;
  }
}

// The tensors of a call as kernels see them. What is here is written to device memory by `table`.
class Tensors {
 public:
  Tensors(const char* op, const std::vector<Tensor>& scores, const std::vector<Tensor>& remain,
          double weight)
      : scores_(scores) {
    FF_CHECK_TOPR("scores", !scores.empty(), "expected at least one");
    FF_CHECK_TOPR("remain", remain.empty() || remain.size() == scores.size(),
                  "expected none or one for each of the ", scores.size(), " scores");
    table_.weight = weight;
    table_.tensors = static_cast<int64_t>(scores.size());
    entries_.resize(scores.size());
    for (size_t t = 0; t < scores.size(); ++t) {
      const Tensor& own = scores[t];
      FF_CHECK_TOPR("scores", is_score(own.scalar_type()),
                    "expected float32, float64, bfloat16 or float16");
      FF_CHECK_TOPR("scores", together(own, scores[0]), "expected all on one device");
      table_.wide |= own.scalar_type() == ScalarType::Double;
      Entry& entry = entries_[t];
      entry.count = own.numel();
      entry.dtype = dtype_of(own.scalar_type());
      entry.first_word = table_.words;
      entry.first_chunk = table_.chunks;
      table_.words += ceil_div(entry.count, topr::kWord);
      table_.chunks += ceil_div(entry.count, topr::kChunk);
      total_ += entry.count;
      entry.score = operand(own, const_cast<void*>(own.const_data_ptr()));
      entry.remain = {nullptr, -1};
      entry.target = {nullptr, -1};
      if (remain.empty()) continue;
      const Tensor& other = remain[t];
      FF_CHECK_TOPR("remain", other.scalar_type() == own.scalar_type() && same_shape(other, own),
                    "expected the dtypes and shapes of the scores");
      FF_CHECK_TOPR("remain", together(other, own), "expected the device of the scores");
      entry.remain = operand(other, const_cast<void*>(other.const_data_ptr()));
    }
  }

  void add_targets(const char* op, const std::vector<Tensor>& parameters) {
    FF_CHECK_TOPR("parameters", parameters.size() == scores_.size(), "expected one for each score");
    for (size_t t = 0; t < parameters.size(); ++t) {
      const Tensor& target = parameters[t];
      const auto width = static_cast<int64_t>(target.element_size());
      FF_CHECK_TOPR("parameters", same_shape(target, scores_[t]),
                    "expected the shapes of the scores");
      FF_CHECK_TOPR("parameters", together(target, scores_[0]),
                    "expected the device of the scores");
      FF_CHECK_TOPR("parameters", width <= 16 && (width & (width - 1)) == 0,
                    "expected elements of 1, 2, 4, 8 or 16 bytes");
      entries_[t].target_width = static_cast<int32_t>(width);
      entries_[t].target = operand(target, target.mutable_data_ptr());
    }
  }

  // Bytes that a record of `count` selected elements takes at most. `layout` says what of it is
  // used: how many are selected of each tensor is known to the device alone.
  int64_t record_bytes(int64_t count) const {
    int64_t bytes = 0, codes = 0, widest = 0;
    for (const Entry& entry : entries_) {
      const int64_t own = std::min(count, entry.count);
      const int64_t index_width = entry.count <= int64_t{1} << 31 ? 4 : 8;
      codes += std::min(own * index_width, ceil_div(entry.count, 8));
      widest = std::max<int64_t>(widest, entry.target_width);
      bytes += 2 * topr::kAlignment;
    }
    return aligned(bytes + std::min(codes, count * 8) + count * widest);
  }

  // The table in device memory, which is `memory`.
  Table table(const char* op, Tensor& memory, void* stream) {
    static_assert(std::is_trivially_copyable_v<Entry> && sizeof(Entry) % sizeof(int64_t) == 0);
    const size_t own = entries_.size() * sizeof(Entry) / sizeof(int64_t);
    std::vector<int64_t> all(own + numbers_.size());
    std::memcpy(all.data(), entries_.data(), own * sizeof(int64_t));
    std::copy(numbers_.begin(), numbers_.end(), all.begin() + static_cast<ptrdiff_t>(own));
    const auto count = static_cast<int64_t>(all.size());
    memory = torch::stable::new_empty(scores_[0], {count}, ScalarType::Long);
    auto* const to = static_cast<int64_t*>(memory.mutable_data_ptr());
    launched(op, ff_topr_write(to, all.data(), count, stream));
    Table table = table_;
    table.entries = reinterpret_cast<const Entry*>(to);
    table.numbers = to + own;
    return table;
  }

  static void launched(const char* op, int error) {
    STD_TORCH_CHECK(error == 0, "fastfisher::", op, ": the launch failed with CUDA error ", error,
                    ": ", FF_LAUNCH_ERROR(error));
  }

  int64_t words() const { return table_.words; }
  int64_t chunks() const { return table_.chunks; }
  int64_t tensors() const { return table_.tensors; }
  int64_t total() const { return total_; }

 private:
  Operand operand(const Tensor& tensor, void* data) {
    // Dimensions that one step spans are one; those of size 1 are none.
    std::vector<int64_t> sizes, strides;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      const int64_t size = tensor.sizes()[d], stride = tensor.stride(d);
      if (size == 1) continue;
      if (!sizes.empty() && strides.back() == size * stride) {
        sizes.back() *= size;
        strides.back() = stride;
      } else {
        sizes.push_back(size);
        strides.push_back(stride);
      }
    }
    Operand result{static_cast<char*>(data), -1};
    if (sizes.empty() || (sizes.size() == 1 && strides[0] == 1)) return result;
    result.shape = static_cast<int64_t>(numbers_.size());
    numbers_.push_back(static_cast<int64_t>(sizes.size()));
    numbers_.insert(numbers_.end(), sizes.begin(), sizes.end());
    numbers_.insert(numbers_.end(), strides.begin(), strides.end());
    return result;
  }

  const std::vector<Tensor>& scores_;
  Table table_{};
  std::vector<Entry> entries_;
  std::vector<int64_t> numbers_;
  int64_t total_ = 0;
};

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_top(std::vector<Tensor> scores,
                                                      std::vector<Tensor> remain, double weight,
                                                      std::vector<int64_t> counts) {
  const char* const op = "select_top";
  Tensors tensors(op, scores, remain, weight);
  for (const int64_t count : counts) {
    FF_CHECK_TOPR("counts", count >= 0 && count <= tensors.total(), "expected 0..", tensors.total(),
                  ", the number of scores, got ", count);
  }
  const Tensor& like = scores[0];
  const OnDevice device(like);
  void* const stream = device.stream();
  const auto rows = static_cast<int64_t>(counts.size());
  Tensor keys = torch::stable::new_empty(like, {rows}, ScalarType::Long);
  Tensor selected = zeros(like, {rows, tensors.chunks()}, ScalarType::Long);
  Tensor finite = torch::stable::new_empty(like, {tensors.tensors()}, ScalarType::Bool);
  Tensor candidates = zeros(like, {rows, tensors.words()}, ScalarType::Long);
  Tensor workspace =
      zeros(like, {topr::select_workspace(tensors.tensors(), tensors.chunks())}, ScalarType::Long);
  Tensor memory;
  const Table table = tensors.table(op, memory, stream);
  auto* const work = static_cast<int64_t*>(workspace.mutable_data_ptr());
  Tensors::launched(
      op, ff_topr_begin(&table, static_cast<bool*>(finite.mutable_data_ptr()), work, stream));
  for (int64_t row = 0; row < rows; ++row) {
    auto* const key = static_cast<int64_t*>(keys.mutable_data_ptr()) + row;
    if (counts[row] == 0) {
      // Above that of infinity.
      const int64_t none = table.wide ? 0x7ff0000000000001 : 0x7f800001;
      Tensors::launched(op, ff_topr_write(key, &none, 1, stream));
      continue;
    }
    Tensors::launched(
        op, ff_topr_select(
                &table, counts[row], key,
                static_cast<int64_t*>(selected.mutable_data_ptr()) + row * table.chunks,
                reinterpret_cast<uint64_t*>(candidates.mutable_data_ptr()) + row * table.words,
                work, stream));
  }
  return {keys, selected, finite, candidates};
}

bool is_row(const Tensor& tensor, int64_t size) {
  return tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 && tensor.numel() == size &&
         tensor.is_contiguous();
}

// Fails if the number on the device is 0, without the host waiting for it: torch's own assertion.
void assert_later(const Tensor& number, const char* message) {
  StableIValue stack[] = {torch::stable::detail::from(number),
                          torch::stable::detail::from(std::string(message))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_assert_async", "msg", stack, TORCH_ABI_VERSION));
}

std::tuple<Tensor, Tensor> zero_selected_(std::vector<Tensor> parameters,
                                          std::vector<Tensor> scores, std::vector<Tensor> remain,
                                          double weight, Tensor key, Tensor selected,
                                          Tensor candidates, int64_t count, bool record) {
  const char* const op = "zero_selected_";
  Tensors tensors(op, scores, remain, weight);
  tensors.add_targets(op, parameters);
  const Tensor& like = scores[0];
  FF_CHECK_TOPR("key", key.scalar_type() == ScalarType::Long && key.dim() == 0,
                "expected int64, of no dimension");
  FF_CHECK_TOPR("selected", is_row(selected, tensors.chunks()),
                "expected int64, one for each chunk of ", topr::kChunk, " scores");
  FF_CHECK_TOPR("candidates", is_row(candidates, tensors.words()),
                "expected int64, a bit for each ", topr::kGroup, " scores");
  FF_CHECK_TOPR("key, selected, candidates",
                together(key, like) && together(selected, like) && together(candidates, like),
                "expected the device of the scores");
  FF_CHECK_TOPR("count", count >= 0 && count <= tensors.total(), "expected 0..", tensors.total(),
                ", the number of scores, got ", count);
  const OnDevice device(like);
  void* const stream = device.stream();
  Tensor data = zeros(like, {record ? tensors.record_bytes(count) : 0}, ScalarType::Byte);
  Tensor layout =
      zeros(like, {tensors.tensors(), sizeof(Layout) / sizeof(int64_t)}, ScalarType::Long);
  Tensor workspace =
      zeros(like, {topr::zero_workspace(tensors.words(), tensors.chunks())}, ScalarType::Long);
  Tensor memory;
  const Table table = tensors.table(op, memory, stream);
  Tensors::launched(
      op, ff_topr_zero(&table, static_cast<const int64_t*>(key.const_data_ptr()),
                       static_cast<const int64_t*>(selected.const_data_ptr()),
                       reinterpret_cast<const uint64_t*>(candidates.const_data_ptr()), count,
                       record ? static_cast<char*>(data.mutable_data_ptr()) : nullptr,
                       reinterpret_cast<Layout*>(layout.mutable_data_ptr()),
                       static_cast<int64_t*>(workspace.mutable_data_ptr()), stream));
  assert_later(torch::stable::narrow(workspace, 0, 0, 1),
               "fastfisher::zero_selected_: selected: expected what select_top gave for these "
               "scores");
  return {data, layout};
}

}  // namespace

FF_REGISTER(m) {
  m.impl("select_top", TORCH_BOX(&select_top));
  m.impl("zero_selected_", TORCH_BOX(&zero_selected_));
}

}  // namespace fastfisher::cuda
