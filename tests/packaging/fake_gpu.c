// A GPU that runs nothing: stands in for the driver (libcuda.so.1) and, preloaded, lets tensors of the CPU pass for
// tensors on a GPU. Writes down what is loaded and launched, and refuses what a driver would refuse.
//
//   load FILE                                   the image, written beside the log
//   launch NAME GRID BLOCK SHARED COOPERATIVE STREAM PARAMETERS...   each parameter's bytes in hexadecimal
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { no_context = 201, invalid = 1, not_found = 500, too_large = 720, no_code = 209 };
enum { multiprocessors = 4, blocks_on_each = 2 };

struct Kernel {
  char name[256];
  int shared;                // as much dynamic shared memory as was asked for
  int sizes[16], parameters; // bytes of each parameter
};

static struct Kernel kernels[1024];
static int kernel_count, image_count;
static __thread void *current;
static char a_context, a_library;

static const char *given(const char *name) {
  const char *value = getenv(name);
  return value ? value : "";
}

// Of a block: 99 KiB, as on 8.6 and 12.0, which have least, or FAKE_GPU_SHARED.
static int most_shared(void) { return *given("FAKE_GPU_SHARED") ? atoi(given("FAKE_GPU_SHARED")) : 99 * 1024; }

// Clusters of blocks that run at once: FAKE_GPU_CLUSTERS, or none.
static int clusters(void) { return atoi(given("FAKE_GPU_CLUSTERS")); }

static FILE *log_file(void) {
  static FILE *file;
  if (file == NULL)
    file = fopen(given("FAKE_GPU_LOG"), "w");
  return file;
}

// Lines "NAME BYTES BYTES ..." of FAKE_GPU_PARAMETERS, from the machine code.
static void read_kernels(void) {
  FILE *file = fopen(given("FAKE_GPU_PARAMETERS"), "r");
  static char line[4096];
  while (file && fgets(line, sizeof line, file)) {
    struct Kernel *kernel = &kernels[kernel_count++];
    char *word = strtok(line, " \n");
    strncpy(kernel->name, word, sizeof kernel->name - 1);
    while ((word = strtok(NULL, " \n")))
      kernel->sizes[kernel->parameters++] = atoi(word);
    kernel->shared = 48 * 1024;
  }
  if (file)
    fclose(file);
}

int cuInit(unsigned flags) { return read_kernels(), (int)flags; }
int cuDriverGetVersion(int *version) { return *version = atoi(given("FAKE_GPU_VERSION")), 0; }
int cuGetErrorString(int error, const char **text) {
  static char buffer[32];
  snprintf(buffer, sizeof buffer, "error %d", error);
  return *text = buffer, 0;
}
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  *value = which == 16 ? multiprocessors : which == 95 ? 1 : which == 97 ? most_shared() : which == 120 ? clusters() : -1;
  return *value < 0 || device != 0 ? invalid : 0;
}
int cuCtxGetCurrent(void **context) { return *context = current, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, current ? 0 : no_context; }
int cuCtxSetCurrent(void *context) { return current = context, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &a_context, device; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device; }
int cuThreadExchangeStreamCaptureMode(int *mode) {
  static __thread int now;
  const int before = now;
  return now = *mode, *mode = before, 0;
}

int cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  const struct {
    uint32_t magic;
    uint16_t version, header;
    uint64_t bytes;
  } *fat = code; // as fatbinary writes it
  if (*given("FAKE_GPU_NO_CODE"))
    return no_code;
  if (fat->magic != 0xba55ed50)
    return invalid;
  char name[4096];
  snprintf(name, sizeof name, "%s.%d.fatbin", given("FAKE_GPU_LOG"), image_count++);
  FILE *file = fopen(name, "wb");
  fwrite(code, 1, fat->header + fat->bytes, file);
  fclose(file);
  fprintf(log_file(), "load %s\n", name);
  return *library = &a_library, 0;
}

int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  for (int i = 0; i < kernel_count && library == &a_library; ++i)
    if (strcmp(kernels[i].name, name) == 0)
      return *kernel = &kernels[i], 0;
  return not_found;
}
int cuKernelGetFunction(void **function, void *kernel) { return *function = kernel, current ? 0 : no_context; }
int cuFuncSetAttribute(struct Kernel *kernel, int which, int value) {
  if (which == 14) // clusters of more than 8 blocks are asked for
    return clusters() ? 0 : invalid;
  if (which != 8 || value > most_shared())
    return invalid;
  return kernel->shared = value, 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, struct Kernel *kernel, int threads, size_t shared) {
  return *blocks = blocks_on_each, threads > 1024 || shared > (size_t)kernel->shared ? invalid : 0;
}

int cuStreamIsCapturing(void *stream, int *status) { return (void)stream, *status = 0; }
int cuStreamSynchronize(void *stream) { return (void)stream, 0; }

struct Config {
  unsigned grid[3], block[3], shared;
  void *stream;
  struct {
    int id, pad, cooperative; // or blocks of a cluster
  } *attributes;
  unsigned attribute_count;
};

int cuOccupancyMaxActiveClusters(int *count, struct Kernel *kernel, const struct Config *c) {
  return *count = clusters(), c->attributes->id != 4 || c->shared > (unsigned)kernel->shared ? invalid : 0;
}

int cuLaunchKernelEx(const struct Config *c, struct Kernel *kernel, void **parameters, void **extra) {
  const int cooperative = c->attribute_count == 1 && c->attributes->id == 2 && c->attributes->cooperative == 1;
  const unsigned blocks = c->grid[0] * c->grid[1] * c->grid[2], threads = c->block[0] * c->block[1] * c->block[2];
  if (!current)
    return no_context;
  if (extra || blocks == 0 || c->grid[1] > 65535 || c->grid[2] > 65535 || threads == 0 || threads > 1024 ||
      c->shared > (unsigned)kernel->shared)
    return invalid;
  if (c->attribute_count == 1 && c->attributes->id == 4 && (!clusters() || blocks % c->attributes->cooperative != 0))
    return invalid;
  if (cooperative && (blocks > multiprocessors * blocks_on_each || *given("FAKE_GPU_REFUSES")))
    return too_large;
  FILE *log = log_file();
  fprintf(log, "launch %s %u,%u,%u %u,%u,%u %u %d %p", kernel->name, c->grid[0], c->grid[1], c->grid[2], c->block[0],
          c->block[1], c->block[2], c->shared, cooperative, c->stream);
  for (int i = 0; i < kernel->parameters; ++i) {
    fputc(' ', log);
    for (int j = 0; j < kernel->sizes[i]; ++j)
      fprintf(log, "%02x", ((unsigned char *)parameters[i])[j]);
  }
  fputc('\n', log);
  fflush(log);
  return 0;
}

// Of torch: every tensor passes for one on cuda:0.
int32_t aoti_torch_device_type_cuda(void) { return 0; }
int32_t aoti_torch_get_device_index(void *tensor, int32_t *index) { return (void)tensor, *index = 0; }
int32_t aoti_torch_create_device_guard(int32_t index, void **guard) { return *guard = &a_context, index; }
int32_t aoti_torch_delete_device_guard(void *guard) { return (void)guard, 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void **stream) { return *stream = (void *)0x5150, device; }
