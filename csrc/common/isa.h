// Which instruction set the CPU loops use.
//
// Every *_loops.cpp is compiled once per instruction set with IIN_FAST_ISA set to the name of a namespace below; the
// glue picks one of them at run time. IIN_FAST_ONE_ISA names the only one of a build for one machine, which compiles
// sooner; on machines other than x86-64 that is `baseline`, compiled for that machine.
#pragma once

namespace iin_fast {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this CPU, or the one that the environment variable IIN_FAST_CPU (avx512, avx2, baseline)
// asks for where the CPU has it. Read once.
Isa isa();

const char *isa_name();

} // namespace iin_fast

// IIN_FAST_DECLARE_LOOPS(R f(args);) declares f in the namespace of every instruction set.
// IIN_FAST_LOOP(f) is the f of this machine.
#if !defined(__x86_64__)
#define IIN_FAST_ONE_ISA baseline
#endif
#if defined(IIN_FAST_ONE_ISA)
#define IIN_FAST_DECLARE_LOOPS(...)                                                                                    \
  namespace IIN_FAST_ONE_ISA {                                                                                         \
  __VA_ARGS__                                                                                                          \
  }
#define IIN_FAST_LOOP(f) ::iin_fast::IIN_FAST_ONE_ISA::f
#else
#define IIN_FAST_DECLARE_LOOPS(...)                                                                                    \
  namespace baseline {                                                                                                 \
  __VA_ARGS__                                                                                                          \
  }                                                                                                                    \
  namespace avx2 {                                                                                                     \
  __VA_ARGS__                                                                                                          \
  }                                                                                                                    \
  namespace avx512 {                                                                                                   \
  __VA_ARGS__                                                                                                          \
  }
#define IIN_FAST_LOOP(f)                                                                                               \
  (::iin_fast::isa() == ::iin_fast::Isa::avx512 ? ::iin_fast::avx512::f                                                \
   : ::iin_fast::isa() == ::iin_fast::Isa::avx2 ? ::iin_fast::avx2::f                                                  \
                                                : ::iin_fast::baseline::f)
#endif
