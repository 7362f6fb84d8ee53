// What the C functions share that tests call through ctypes: they return null, or the text of a fault.
#pragma once

#include <cstring>
#include <string>
#include <string_view>

#include "common/rows.cuh"

template <class F> const char *report(F &&f) {
  static thread_local std::string fault;
  try {
    f();
    return nullptr;
  } catch (const std::exception &error) {
    fault = error.what();
    return fault.c_str();
  }
}

#if !defined(ONLY_TYPE)
#define ONLY_TYPE ""
#endif

// f(Storage()) for a torch dtype's name. Of the others nothing is compiled where there is only one.
template <class F> void with_type(const char *name, F &&f) {
  constexpr std::string_view only = ONLY_TYPE;
  if constexpr (only.empty() || only == "float32")
    if (!std::strcmp(name, "float32"))
      return f(float());
  if constexpr (only.empty() || only == "float64")
    if (!std::strcmp(name, "float64"))
      return f(double());
  if constexpr (only.empty() || only == "bfloat16")
    if (!std::strcmp(name, "bfloat16"))
      return f(__nv_bfloat16());
  if constexpr (only.empty() || only == "float16")
    if (!std::strcmp(name, "float16"))
      return f(__half());
  throw emulator::Fault(std::string("no type ") + name);
}

struct Matrix {
  const void *data;
  int64_t stride;
  template <class Storage> iin_fast::DeviceRows<const Storage> rows() const {
    return {static_cast<const Storage *>(data), stride};
  }
};

// What a test asks of a launch, and learns of it.
struct LaunchPlan {
  int64_t max_blocks, multiprocessors; // asked
  int64_t vector, lanes, blocks, parts, launches;

  iin_fast::RowPlan make(int64_t rows, int64_t features, int vector_, bool may_split) {
    const iin_fast::RowPlan plan =
        iin_fast::plan_rows(rows, features, vector_, static_cast<int>(multiprocessors), may_split, max_blocks);
    vector = plan.vector, lanes = 1 << plan.log_lanes, blocks = plan.blocks, parts = plan.parts;
    return plan;
  }
};
