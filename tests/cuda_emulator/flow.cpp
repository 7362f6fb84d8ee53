// The kernels of the flow, for tests/ops/test_flow_cuda.py.
#include "binding.h"

#include "flow/flow_backward_kernels.cuh"
#include "flow/flow_ways.cuh"

using namespace iin_fast;

// A call as the test gives it; what is not needed is null.
struct FlowCall {
  FlowSizes sizes;
  const void *x, *context, *loc, *scale, *weight_in, *bias_in, *weight_hidden, *bias_hidden, *weight_out, *bias_out;
  const int64_t *permutation;
  int64_t x_row;
  double leaky_slope, activation_slope;
  bool exact_logdet, inverse, tf32;
  void *y, *logdet;
  void *saved; // forward: null, or where to keep the steps; backward: what was kept there, or null
  const void *grad_y, *grad_logdet;
  int64_t grad_y_row;
  void *grad_x, *grad_context, *grad_loc, *grad_scale, *grad_weight_in, *grad_bias_in, *grad_weight_hidden,
      *grad_bias_hidden, *grad_weight_out, *grad_bias_out;
  int64_t pending;  // bytes of gradients that wait for those of weights
  int64_t resident; // blocks that run at once, or 0: no cooperative launch
  FlowWay way;
  int64_t launches, saved_bytes; // learned

  template <class Storage> FlowWalk<Storage> walk() const {
    const auto in = [](const void *data) { return static_cast<const Storage *>(data); };
    FlowWalk<Storage> walk{};
    walk.sizes = sizes;
    walk.weights = {in(loc),           in(scale),       in(weight_in),  in(bias_in),
                    in(weight_hidden), in(bias_hidden), in(weight_out), in(bias_out)};
    walk.permutation = permutation;
    walk.context = in(context);
    walk.leaky_slope = leaky_slope, walk.activation_slope = activation_slope;
    walk.log_slope = exact_logdet ? std::log(activation_slope) : 0.0;
    walk.inverse = inverse, walk.way = way;
    walk.x = in(x), walk.x_row = x_row;
    walk.y = static_cast<Storage *>(y), walk.logdet = static_cast<compute_t<Storage> *>(logdet);
    return walk;
  }
};

// Memory of exactly this size, on a boundary of 256 bytes, that holds NaN.
struct Buffer {
  std::unique_ptr<unsigned char[]> memory;
  unsigned char *data;
  explicit Buffer(int64_t bytes) : memory(new unsigned char[bytes + 256]) {
    data = memory.get() + (256 - reinterpret_cast<uintptr_t>(memory.get()) % 256) % 256;
    std::memset(data, 0xff, bytes);
  }
};

// arrange(arena) is called twice: to count, and with memory.
template <class F> Buffer arranged(F &&arrange) {
  Arena arena{nullptr};
  arrange(arena);
  Buffer buffer(arena.used);
  arena = {buffer.data};
  arrange(arena);
  return buffer;
}

// f(Precision()) as the library has it; where there is only one type, without TF32, which has the tiles of float32.
template <class Storage, class F> void with_tested_precision(bool tf32, F &&f) {
  if constexpr (std::is_same_v<Storage, float> && !std::string_view(ONLY_TYPE).empty())
    f(Tf32x3());
  else
    with_precision<Storage>(tf32, f);
}

extern "C" const char *flow_forward(const char *type, FlowCall *call) {
  return report([&] {
    with_type(type, [&](auto storage) {
      using Storage = decltype(storage);
      FlowWalk<Storage> walk = call->walk<Storage>();
      walk.every = walk.keep = call->saved != nullptr;
      walk.keep_v = walk.keep && call->inverse;
      const Buffer steps = arranged([&](Arena &arena) {
        arrange_steps(walk, arena);
        call->saved_bytes = arena.used;
      });
      if (call->saved != nullptr) {
        Arena arena{static_cast<unsigned char *>(call->saved)};
        arrange_steps(walk, arena);
      }
      int launches = 0;
      const emulator::Launch launch{0, false, &launches, static_cast<int>(call->resident),
                                    walk.way == FlowWay::clusters ? 2 : 0};
      with_tested_precision<Storage>(call->tf32, [&](auto precision) {
        choose_way<decltype(precision)>(walk, launch);
        const Buffer scratch = arranged([&](Arena &arena) { arrange_forward(walk, arena); });
        launch_flow<decltype(precision)>(walk, launch);
      });
      call->launches = launches;
    });
  });
}

extern "C" const char *flow_backward(const char *type, FlowCall *call) {
  return report([&] {
    with_type(type, [&](auto storage) {
      using Storage = decltype(storage);
      using T = compute_t<Storage>;
      const auto out = [](void *data) { return static_cast<Storage *>(data); };
      FlowBackwardWalk<Storage> back{};
      FlowWalk<Storage> &walk = back.walk;
      walk = call->walk<Storage>();
      walk.logdet = nullptr, walk.y = nullptr;
      walk.keep = true, walk.every = call->saved != nullptr;
      walk.keep_v = !walk.every || call->inverse;
      back.grad_y = static_cast<const Storage *>(call->grad_y), back.grad_y_row = call->grad_y_row;
      back.grad_logdet = static_cast<const T *>(call->grad_logdet);
      back.grad_x = out(call->grad_x);
      back.grad_context = static_cast<T *>(call->grad_context);
      back.grads = {out(call->grad_loc),        out(call->grad_scale),         out(call->grad_weight_in),
                    out(call->grad_bias_in),    out(call->grad_weight_hidden), out(call->grad_bias_hidden),
                    out(call->grad_weight_out), out(call->grad_bias_out)};
      const Buffer steps = arranged([&](Arena &arena) { arrange_steps(walk, arena); });
      if (call->saved != nullptr) {
        Arena arena{static_cast<unsigned char *>(call->saved)};
        arrange_steps(walk, arena);
      }
      const Buffer scratch = arranged(
          [&](Arena &arena) { arrange_backward(back, call->grad_weight_in != nullptr, arena, call->pending); });
      int launches = 0;
      with_tested_precision<Storage>(call->tf32, [&](auto precision) {
        launch_flow_backward<decltype(precision)>(
            back, emulator::Launch{0, false, &launches, static_cast<int>(call->resident)});
      });
      call->launches = launches;
    });
  });
}
