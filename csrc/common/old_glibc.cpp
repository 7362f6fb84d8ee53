// Lets the libraries load beside glibc 2.28, which is what torch itself asks for: what newer versions added is bound
// to the older version of the same function, or defined here. CMakeLists.txt has the linker send calls to the wrappers.
// tests/packaging/test_symbols.py reads what the built library needs.
#include <features.h>

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))

#ifdef __x86_64__
#define IIN_FAST_FIRST_GLIBC "GLIBC_2.2.5"
#else
#define IIN_FAST_FIRST_GLIBC "GLIBC_2.17"
#endif

extern "C" {

// std::shared_ptr reads it to leave out atomic operations in a process of one thread (glibc 2.32). 0: never.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

double iin_fast_log(double x);
void *iin_fast_dlopen(const char *name, int mode);
void *iin_fast_dlsym(void *library, const char *name);
__asm__(".symver iin_fast_log, log@" IIN_FAST_FIRST_GLIBC);
__asm__(".symver iin_fast_dlopen, dlopen@" IIN_FAST_FIRST_GLIBC);
__asm__(".symver iin_fast_dlsym, dlsym@" IIN_FAST_FIRST_GLIBC);

double __wrap_log(double x) { return iin_fast_log(x); }
void *__wrap_dlopen(const char *name, int mode) { return iin_fast_dlopen(name, mode); }
void *__wrap_dlsym(void *library, const char *name) { return iin_fast_dlsym(library, name); }
}

#endif
