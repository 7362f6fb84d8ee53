// What the C functions share that tests call through ctypes: they return null, or the text of a fault.
#pragma once

#include <cstring>
#include <string>

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

// f(Storage()) for a torch dtype's name.
template <class F> void with_type(const char *name, F &&f) {
  if (!std::strcmp(name, "float32"))
    f(float());
  else if (!std::strcmp(name, "float64"))
    f(double());
  else if (!std::strcmp(name, "bfloat16"))
    f(__nv_bfloat16());
#if !defined(FEW_TYPES)
  else if (!std::strcmp(name, "float16"))
    f(__half());
#endif
  else
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
