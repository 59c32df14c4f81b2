#include "cublas.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"

namespace frspec::cuda {
namespace {

#define FRSPEC_STRING(text) #text
#define FRSPEC_STRING_OF(macro) FRSPEC_STRING(macro)
// The major version of the toolkit: 12 or 13. Both have these functions.
#if CUDART_VERSION >= 13000
#define FRSPEC_CUBLAS_MAJOR 13
#else
#define FRSPEC_CUBLAS_MAJOR 12
#endif
constexpr const char* kLibrary = "libcublas.so." FRSPEC_STRING_OF(FRSPEC_CUBLAS_MAJOR);

// Where the library may be: what FRSPEC_CUBLAS names, where the system looks, beside this module in
// the tree of installed Python packages (<site-packages>/frspec/_core.so,
// <site-packages>/nvidia/cu13/lib), and in toolkits.
std::vector<std::string> candidates() {
  std::vector<std::string> paths;
  const char* named = std::getenv("FRSPEC_CUBLAS");
  if (named != nullptr && *named != '\0') return {named};
  paths.push_back(kLibrary);
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&cublas_api), &info) != 0 && info.dli_fname != nullptr) {
    const std::string module = info.dli_fname;
    const size_t slash = module.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : module.substr(0, slash);
    paths.push_back(folder + "/../nvidia/cu" FRSPEC_STRING_OF(FRSPEC_CUBLAS_MAJOR) "/lib/" +
                    kLibrary);
    paths.push_back(folder + "/../nvidia/cublas/lib/" + kLibrary);
  }
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* toolkit = std::getenv(variable)) {
      paths.push_back(concat(toolkit, "/lib64/", kLibrary));
    }
  }
  paths.push_back(concat("/usr/local/cuda/lib64/", kLibrary));
  paths.push_back(concat(FRSPEC_CUDA_LIBRARY_FOLDER "/", kLibrary));  // of the build
  return paths;
}

CublasApi open_library() {
  void* library = nullptr;
  std::string found;
  std::string reasons;
  for (const std::string& path : candidates()) {
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    found = path;
    if (library != nullptr) break;
    reasons += concat(reasons.empty() ? "" : "; ", dlerror());
  }
  FRSPEC_CHECK(library != nullptr, DeviceError, "cuBLAS was not found; install it with ",
               FRSPEC_CUBLAS_MAJOR == 13
                   ? "'pip install nvidia-cublas' or the extra 'frspec[cuda13]'"
                   : "'pip install nvidia-cublas-cu12'",
               ", or name its file with FRSPEC_CUBLAS (", reasons, ")");
  const auto find = [&](const char* name, auto*& function) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    FRSPEC_CHECK(function != nullptr, DeviceError, found, " has no function ", name);
  };
  CublasApi api{};
  find("cublasCreate_v2", api.create);
  find("cublasDestroy_v2", api.destroy);
  find("cublasSetStream_v2", api.set_stream);
  find("cublasSetWorkspace_v2", api.set_workspace);
  find("cublasSetMathMode", api.set_math_mode);
  find("cublasGemmEx", api.gemm_ex);
  find("cublasGetStatusName", api.status_name);
  return api;
}

}  // namespace

const CublasApi& cublas_api() {
  static const CublasApi api = open_library();
  return api;
}

}  // namespace frspec::cuda
