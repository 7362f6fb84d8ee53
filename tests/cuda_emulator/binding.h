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

template <class Storage> constexpr std::string_view torch_name = "";
template <> constexpr std::string_view torch_name<float> = "float32";
template <> constexpr std::string_view torch_name<double> = "float64";
template <> constexpr std::string_view torch_name<__nv_bfloat16> = "bfloat16";
template <> constexpr std::string_view torch_name<__half> = "float16";

template <class Storage, class F> bool ran(const char *name, F &f) {
  if constexpr (std::string_view(ONLY_TYPE).empty() || torch_name<Storage> == ONLY_TYPE)
    if (torch_name<Storage> == name) {
      f(Storage());
      return true;
    }
  return false;
}

// f(Storage()) for a torch dtype's name. Of the others nothing is compiled where there is only one.
template <class F> void with_type(const char *name, F &&f) {
  if (!(ran<float>(name, f) || ran<double>(name, f) || ran<__nv_bfloat16>(name, f) || ran<__half>(name, f)))
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
