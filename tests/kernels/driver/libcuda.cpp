// A CUDA driver for tests on machines without one: one device, one library, one kernel `scale(x, y, factor, n)` that runs
// on the host. What it is asked is checked here and told on stdout, one line a call.
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

constexpr int kNotFound = 500, kInvalidValue = 1, kInvalidImage = 200;
std::uintptr_t current_context = 0;
constexpr std::uintptr_t kContext = 0xc0, kLibrary = 0x11b, kKernel = 0xf00;

int initialise(unsigned) { return 0; }
int driver_version(int* version) { return *version = 13000, 0; }
int device_get(int* device, int index) { return index == 0 ? (*device = 0, 0) : 101; }

int device_attribute(int* value, int which, int) {
  if (which == 97) return *value = 101376, 0;  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
  if (which == 81) return *value = 102400, 0;  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
  return kInvalidValue;
}

int get_context(std::uintptr_t* context) { return *context = current_context, 0; }
int set_context(std::uintptr_t context) {
  std::printf("context %#lx\n", static_cast<unsigned long>(context));
  return current_context = context, 0;
}
int retain_context(std::uintptr_t* context, int) { return *context = kContext, 0; }

int load_library(std::uintptr_t* library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  if (std::memcmp(code, "\x7f" "ELF", 4) != 0) return kInvalidImage;
  std::puts("load");
  return *library = kLibrary, 0;
}
int get_kernel(std::uintptr_t* kernel, std::uintptr_t library, const char* name) {
  if (library != kLibrary || std::strcmp(name, "scale") != 0) return kNotFound;
  return *kernel = kKernel, 0;
}
int set_attribute(int attribute, int value, std::uintptr_t kernel, int) {
  std::printf("attribute %d %d\n", attribute, value);
  return kernel == kKernel && attribute == 8 ? 0 : kInvalidValue;  // MAX_DYNAMIC_SHARED_SIZE_BYTES
}

int launch(std::uintptr_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
           unsigned shared, std::uintptr_t stream, void** arguments, void** extra) {
  if (function != kKernel || current_context != kContext || extra != nullptr) return kInvalidValue;
  if (bx * by * bz > 1024) return kInvalidValue;
  std::printf("launch %u %u %u, %u %u %u, %u, stream %#lx\n", gx, gy, gz, bx, by, bz, shared, static_cast<unsigned long>(stream));
  const float* x = *static_cast<const float**>(arguments[0]);
  float *y = *static_cast<float**>(arguments[1]), factor = *static_cast<float*>(arguments[2]);
  for (std::int64_t i = 0, n = *static_cast<std::int64_t*>(arguments[3]); i < n; ++i) y[i] = factor * x[i];
  return 0;
}

int error_string(int status, const char** text) {
  *text = status == kInvalidValue ? "invalid argument" : status == kNotFound ? "named symbol not found" : "some error";
  return 0;
}

int get_address(const char* symbol, void** function, int, std::uint64_t, int* found);

const struct {
  const char* name;
  void* function;
} kFunctions[] = {
    {"cuInit", reinterpret_cast<void*>(initialise)},
    {"cuDriverGetVersion", reinterpret_cast<void*>(driver_version)},
    {"cuDeviceGet", reinterpret_cast<void*>(device_get)},
    {"cuDeviceGetAttribute", reinterpret_cast<void*>(device_attribute)},
    {"cuCtxGetCurrent", reinterpret_cast<void*>(get_context)},
    {"cuCtxSetCurrent", reinterpret_cast<void*>(set_context)},
    {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(retain_context)},
    {"cuLibraryLoadData", reinterpret_cast<void*>(load_library)},
    {"cuLibraryGetKernel", reinterpret_cast<void*>(get_kernel)},
    {"cuKernelSetAttribute", reinterpret_cast<void*>(set_attribute)},
    {"cuLaunchKernel", reinterpret_cast<void*>(launch)},
    {"cuGetErrorString", reinterpret_cast<void*>(error_string)},
    {"cuGetProcAddress", reinterpret_cast<void*>(get_address)},
};

int get_address(const char* symbol, void** function, int, std::uint64_t, int* found) {
  *function = nullptr;
  for (const auto& known : kFunctions)
    if (std::strcmp(symbol, known.name) == 0) *function = known.function;
  if (found != nullptr) *found = *function ? 0 : 1;
  return *function ? 0 : kNotFound;
}

}  // namespace

extern "C" int cuGetProcAddress_v2(const char* symbol, void** function, int version, std::uint64_t flags, int* found) {
  return get_address(symbol, function, version, flags, found);
}
extern "C" int cuGetProcAddress(const char* symbol, void** function, int version, std::uint64_t flags) {
  return get_address(symbol, function, version, flags, nullptr);
}
