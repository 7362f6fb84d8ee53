// The kernels of flow_program on tensor cores: float32, in one product of TF32 or three. A checker, which takes long to
// compile, has the three alone.
#include "program_call.h"

extern "C" const char *program_run_tensor(int64_t tf32, ProgramCall *call) {
  return report([&] {
    emulator::products_are_cut = true;
    if (tf32 == 3)
      return run<float, 3>(*call);
    if constexpr (std::string_view(ONLY_TYPE).empty())
      run<float, 1>(*call);
  });
}
