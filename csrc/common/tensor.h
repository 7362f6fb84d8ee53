// What the glue of every CPU op needs of torch's stable ABI.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/half.h"
#include "common/kept_memory.h"

// Of torch 2.11; a null pointer where torch is older.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void *data, int64_t dim, const int64_t *sizes, const int64_t *strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle *made, int32_t layout, const uint8_t *opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void *data, void *context), void *deleter_context);

namespace iin_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The text of an argument of type str, which this takes over. (torch's own conversion to std::string never frees its
// copy, in 2.10 to 2.13 at least.)
inline std::string text_of(StringHandle argument) {
  size_t length = 0;
  const char *data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(argument, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(argument, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(argument));
  return text;
}

// [batch, ...]: rows and the features of a row.
inline int64_t row_count(const Tensor &t) { return t.size(0); }
inline int64_t feature_count(const Tensor &t) {
  int64_t features = 1;
  for (int64_t d = 1; d < t.dim(); ++d)
    features *= t.size(d);
  return features;
}

// True if the features of a row lie side by side, whatever the distance between rows.
inline bool has_contiguous_rows(const Tensor &t) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 1; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected)
      return false;
    expected *= t.size(d);
  }
  return true;
}

inline Tensor with_contiguous_rows(const Tensor &t) {
  return has_contiguous_rows(t) ? t : torch::stable::contiguous(t);
}

// The type in which log-dets and losses of a tensor are kept: at least float32.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(Storage()) with the storage type of a floating tensor.
template <class F> void with_storage(const char *op, ScalarType type, F &&f) {
  switch (type) {
  case ScalarType::Float:
    return f(float());
  case ScalarType::Double:
    return f(double());
  case ScalarType::BFloat16:
    return f(BFloat16());
  case ScalarType::Half:
    return f(Half());
  default:
    STD_TORCH_CHECK(false, op, ": expected float32, float64, bfloat16 or float16, got type code ",
                    static_cast<int>(type));
  }
}

// A tensor on the CPU, without values, in the dtype of `like` or in another. torch's new_empty goes through the
// dispatcher, several times as long. Large ones lie in memory that stays (kept_memory.h), where torch can take it: from
// 2.11 on.
inline Tensor cpu_empty(const Tensor &like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                        std::optional<ScalarType> type = std::nullopt) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1)
    strides[d] = stride;
  const int64_t dim = static_cast<int64_t>(sizes.size());
  const ScalarType scalar = type.value_or(like.scalar_type());
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar));
  int64_t bytes = scalar == ScalarType::Double ? 8 : scalar == ScalarType::Float ? 4 : 2;
  for (const int64_t size : sizes)
    bytes *= size;
  AtenTensorHandle made = nullptr;
  if (bytes >= kept_from && torch_from_blob != nullptr && keeps_memory()) {
    KeptBlock *const block = take_kept(bytes);
    const AOTITorchError error = torch_from_blob(
        kept_data(block), dim, sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1, &made,
        aoti_torch_layout_strided(), nullptr, 0, [](void *, void *kept) { give_back(static_cast<KeptBlock *>(kept)); },
        block);
    if (error != AOTI_TORCH_SUCCESS && is_held_twice(block)) // it failed before anything would free the block
      give_back(block);
    give_back(block);
    TORCH_ERROR_CODE_CHECK(error);
  } else {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dim, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  }
  return Tensor(made);
}

// Rows that make one piece of parallel work worth its start.
inline int64_t row_grain(int64_t features) {
  constexpr int64_t elements = 8192;
  return features >= elements ? 1 : elements / (features > 0 ? features : 1);
}

} // namespace iin_fast
