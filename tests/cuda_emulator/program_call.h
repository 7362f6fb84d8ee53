// A call of the kernels of flow_program, for tests/ops/test_flow_program_cuda.py.
#pragma once

#include "binding.h"

#include "flow_program/flow_program_kernels.cuh"
#include "flow_program/flow_program_plan.cpp"
#include "flow_program/flow_program_table.cpp"

using namespace iin_fast;

// A call as the test has it. Tensors are contiguous; null: absent, or not wanted.
struct ProgramCall {
  const char *text;
  int64_t batch, room, tile; // room: bytes of shared memory of a block; tile: rows, 0 for the choice of the library
  bool inverse, base;
  const void *x, *context;
  const void *const *parameters;
  const uint8_t *bool_mask;
  void *y, *logdet;
  const void *grad_y, *grad_logdet;
  void *grad_x, *grad_context;
  void *const *grads;
  bool fits; // found out
  int64_t log_rows, log_rows_back, launches, launches_back, bytes, tape_bytes;
};

template <class T, int tf32> void run(ProgramCall &call) {
  const auto plan = plan_of(call.text);
  const Table table = table_of(plan->view, sizeof(T), false, tf32 != 0),
              tape = table_of(plan->view, sizeof(T), true, tf32 != 0);
  call.log_rows = choose_tile(table.view, call.batch, sizeof(T), call.room, false);
  call.log_rows_back = choose_tile(tape.view, call.batch, sizeof(T), call.room, true);
  for (int64_t rows = 8, log_rows = 3; rows <= call.tile; rows *= 2, ++log_rows)
    call.log_rows = call.log_rows_back = log_rows;
  call.bytes = table.bytes.size(), call.tape_bytes = tape.bytes.size();
  const bool backward = call.grad_x != nullptr, sequential = table.sequential[call.inverse];
  const auto room_for = [&](const Table &t, int64_t log_rows, bool back) {
    return log_rows >= 0 && shared_bytes(t.view, 1 << log_rows, sizeof(T), back) <= call.room;
  };
  call.fits = table.fits && room_for(table, call.log_rows, false) &&
              (!backward || (room_for(tape, call.log_rows_back, true) && !sequential));
  if (!call.fits || call.batch == 0)
    return;
  int launches = 0;
  const emulator::Launch launch{0, false, &launches};
  // own allocations, so that accesses out of bounds are seen; NaN before anything is written
  const auto memory = [](int64_t count) {
    return std::vector<T>(count > 0 ? count : 1, std::numeric_limits<T>::quiet_NaN());
  };
  std::vector<T> packed = memory(table.packed), inputs = memory(plan->view.layer_count * call.batch * plan->view.dim);
  std::vector<unsigned char> bytes(table.bytes.size() + 16), tape_bytes(tape.bytes.size() + 16);
  std::vector<int> orders(table.view.orders + 1, -7);
  DeviceWalk<T, tf32> walk{};
  walk.table = bytes.data(), walk.view = table.view, walk.packed = packed.data(), walk.orders = orders.data();
  walk.x = static_cast<const T *>(call.x), walk.context = static_cast<const T *>(call.context);
  walk.y = static_cast<T *>(call.y), walk.logdet = static_cast<T *>(call.logdet);
  walk.inputs = backward ? inputs.data() : nullptr;
  walk.batch = call.batch, walk.inverse = call.inverse, walk.base = call.base;
  const auto tile = [&](int64_t log_rows) {
    walk.log_rows = static_cast<int>(log_rows);
    walk.tiles = static_cast<int>((call.batch + (1 << log_rows) - 1) >> log_rows);
  };
  const auto data = [&](const ParameterRef &r) -> const void * {
    if (!r.present())
      return nullptr;
    const auto *first = static_cast<const unsigned char *>(call.parameters[r.tensor]);
    return first + r.offset * (call.bool_mask[r.tensor] == 1 ? 1 : call.bool_mask[r.tensor] == 2 ? 8 : sizeof(T));
  };
  const auto is_bool = [&](const ParameterRef &r) { return call.bool_mask[r.tensor] == 1; };
  launch_program_table(table, bytes.data(), launch);
  launch_program_pack<T>(table, data, is_bool, packed.data(), launch);
  tile(call.log_rows);
  launch_program_forward(walk, sequential ? orders.data() : nullptr, 3u < unsigned(walk.tiles) ? 3 : walk.tiles,
                         launch);
  call.launches = launches, launches = 0;
  if (!backward)
    return;
  DeviceWalkBack<T, tf32> back{};
  launch_program_table(tape, tape_bytes.data(), launch);
  walk.table = tape_bytes.data(), walk.view = tape.view;
  tile(call.log_rows_back);
  back.walk = walk;
  std::vector<T> accumulators = memory(program_accumulators(walk) * tape.view.accumulator);
  back.grad_y = static_cast<const T *>(call.grad_y), back.grad_logdet = static_cast<const T *>(call.grad_logdet);
  back.grad_x = static_cast<T *>(call.grad_x), back.grad_context = static_cast<T *>(call.grad_context);
  back.accumulators = accumulators.data();
  launch_program_backward(back, launch);
  const auto gradient = [&](const ParameterRef &r) -> T * {
    return r.present() && call.grads[r.tensor] != nullptr ? static_cast<T *>(call.grads[r.tensor]) + r.offset : nullptr;
  };
  launch_program_sum(table, back, data, gradient, is_bool, launch);
  call.launches_back = launches;
}
