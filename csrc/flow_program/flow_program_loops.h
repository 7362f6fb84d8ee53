// Flow programs on the CPU: what the glue (flow_program_cpu.cpp) hands to the loops (flow_program_loops.cpp). No torch
// here.
#pragma once

#include "common/isa.h"
#include "common/keep.h"
#include "flow_program/flow_program.h"

namespace iin_fast {

// Runs body(begin, end, data) on pieces of [0, count), on several threads.
using ParallelPieces = void (*)(int64_t count, void (*body)(int64_t, int64_t, void *), void *data);

// The threads that share the steps of a wide walk: all of a call's (common/thread_team.h), or one.
struct Team {
  int64_t threads;
  ParallelPieces parallel;
};

template <class T> struct ProgramJob {
  ProgramView program;
  bool inverse, base;
  Keep keep;
  int64_t batch;
  const T *x;                    // [batch, dim], the input of the direction that runs
  const T *context;              // [batch, context]
  const void *const *parameters; // [tensors]
  const uint8_t *bool_mask;      // [tensors]: whether a mask is of bool
  T *y;                          // [batch, dim]
  T *logdet;                     // [batch]
  T *saved;                      // program_saved_size elements, or null
  T *workspace;                  // program_workspace elements, aligned to 64 bytes
  int64_t threads;
  ParallelPieces parallel;
};

template <class T> struct ProgramBackwardJob {
  ProgramJob<T> forward; // y and logdet: null, or where a walk ahead, which nothing came before, puts its results
  const T *grad_y;       // [batch, dim], or null for 0
  const T *grad_logdet;  // [batch]
  T *grad_x;             // [batch, dim]
  T *grad_context;       // [batch, context], or null
  T *const *grads;       // [tensors], null where not wanted; zero where no layer reads
};

// program_is_wide: whether nets are taken for many rows at once. program_sharing: how many threads share each of their
// steps, else 1. program_ahead_size: elements of `saved` for forward and backward in one, which then keep all; else 0,
// and they keep nothing.
IIN_FAST_DECLARE_LOOPS(template <class T> bool program_is_wide(const ProgramView &program, int64_t batch, bool inverse);
                       template <class T> int64_t program_sharing(const ProgramJob<T> &job, bool backward);
                       template <class T>
                       int64_t program_saved_size(const ProgramView &program, int64_t batch, bool inverse, Keep keep);
                       template <class T>
                       int64_t program_ahead_size(const ProgramView &program, int64_t batch, bool inverse);
                       template <class T> int64_t program_workspace(const ProgramJob<T> &job, bool backward);
                       // both: the first layer whose masks are not autoregressive, or -1
                       template <class T> int64_t program_forward(const ProgramJob<T> &job);
                       template <class T> int64_t program_backward(const ProgramBackwardJob<T> &job);)

} // namespace iin_fast
