"""Import this before torch: with IIN_FAST_CPU=avx2 every side of a benchmark keeps to AVX2, as on a machine that has no more."""

import os

if os.environ.get("IIN_FAST_CPU") == "avx2":
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    os.environ["XLA_FLAGS"] = "--xla_cpu_max_isa=AVX2"
