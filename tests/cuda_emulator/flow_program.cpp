// The kernels of flow_program in plain float32 and float64.
#include "program_call.h"

extern "C" const char *program_run(const char *type, ProgramCall *call) {
  return report([&] { with_type(type, [&](auto storage) { run<compute_t<decltype(storage)>, 0>(*call); }); });
}
