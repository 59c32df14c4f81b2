#include "cublas.h"

#include <dlfcn.h>

#include <string>
#include <vector>

#include "check.h"

namespace frspec::cuda {
namespace {

constexpr const char* kLibrary = "libcublas.so.13";

// Where the library may be: where the system looks, and beside this module in the tree of installed
// Python packages (<site-packages>/frspec/_core.so, <site-packages>/nvidia/cu13/lib).
std::vector<std::string> candidates() {
  std::vector<std::string> paths{kLibrary};
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&cublas_api), &info) != 0 && info.dli_fname != nullptr) {
    const std::string module = info.dli_fname;
    const size_t slash = module.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : module.substr(0, slash);
    paths.push_back(folder + "/../nvidia/cu13/lib/" + kLibrary);
    paths.push_back(folder + "/../nvidia/cublas/lib/" + kLibrary);
  }
  return paths;
}

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  FRSPEC_CHECK(function != nullptr, DeviceError, kLibrary, " has no function ", name);
}

CublasApi open_library() {
  void* library = nullptr;
  std::string reasons;
  for (const std::string& path : candidates()) {
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    reasons += concat(reasons.empty() ? "" : "; ", dlerror());
  }
  FRSPEC_CHECK(library != nullptr, DeviceError,
               "cuBLAS was not found; install it with"
               " 'pip install nvidia-cublas' or the extra 'frspec[cuda13]' (",
               reasons, ")");
  CublasApi api{};
  find(library, "cublasCreate_v2", api.create);
  find(library, "cublasDestroy_v2", api.destroy);
  find(library, "cublasSetStream_v2", api.set_stream);
  find(library, "cublasSetWorkspace_v2", api.set_workspace);
  find(library, "cublasGemmEx", api.gemm_ex);
  return api;
}

}  // namespace

const CublasApi& cublas_api() {
  static const CublasApi api = open_library();
  return api;
}

}  // namespace frspec::cuda
