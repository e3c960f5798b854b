#include "kernels.hpp"

#include <filesystem>

#include "failure.hpp"

namespace ojfa::tensorrt {
namespace {

// Dynamic shared memory that needs no permission: 48 KiB less what kernels declare themselves.
constexpr unsigned PLAIN_SHARED_BYTES = 32 << 10;
// Of a multiprocessor's memory, shared memory rather than first-level cache: all, and for every kernel. It
// must be empty to divide it otherwise, and a kernel that wants that can't start while the one before it
// ends.
constexpr int SHARED_PERCENT = 100;
const char* const REBUILD =
    "rebuild the engines with 'ojfa-export build BUNDLE --backend tensorrt' of this version";

}  // namespace

Kernels::Kernels(Device& device, const core::HeldFiles& files, const std::string& cubin)
    : device_(device), file_(std::filesystem::path(cubin).filename()) {
    const std::vector<char> image = files.read(cubin);
    if (image.empty())
        throw core::bundle_failure((files.directory() / cubin).string() + " is empty", REBUILD);
    device.make_current();
    check(driver().cuModuleLoadData(&module_, image.data()), ("loading " + file_).c_str());
}

Kernels::~Kernels() {
    device_.try_make_current();
    driver().cuModuleUnload(module_);
}

void Kernels::launch_with(CUstream stream, const Launch& launch, void** arguments,
                          const std::vector<std::size_t>& sizes) {
    CUlaunchAttribute attribute{};
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config{};
    config.gridDimX = launch.grid[0], config.gridDimY = launch.grid[1], config.gridDimZ = launch.grid[2];
    config.blockDimX = launch.threads[0], config.blockDimY = launch.threads[1], config.blockDimZ = 1;
    config.sharedMemBytes = launch.shared_bytes;
    config.hStream = stream;
    if (launch.overlapping && device_.major >= 9) {
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    check(driver().cuLaunchKernelEx(&config, function(launch, sizes), arguments, nullptr),
          ("launching " + launch.kernel).c_str());
}

CUfunction Kernels::function(const Launch& launch, const std::vector<std::size_t>& sizes) {
    const std::lock_guard lock(mutex_);
    const auto [found, is_new] = functions_.try_emplace(launch.kernel, Function{nullptr, PLAIN_SHARED_BYTES});
    Function& function = found->second;
    if (is_new) {
        try {
            function.handle = open(launch.kernel, sizes);
        } catch (...) {
            functions_.erase(found);
            throw;
        }
    }
    if (launch.shared_bytes > function.shared_bytes) {
        check(driver().cuFuncSetAttribute(function.handle, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                          static_cast<int>(launch.shared_bytes)),
              ("giving shared memory to " + launch.kernel).c_str());
        function.shared_bytes = launch.shared_bytes;
    }
    return function.handle;
}

CUfunction Kernels::open(const std::string& name, const std::vector<std::size_t>& sizes) const {
    CUfunction function = nullptr;
    const CUresult found = driver().cuModuleGetFunction(&function, module_, name.c_str());
    if (found == CUDA_ERROR_NOT_FOUND)
        throw core::backend_failure(file_ + " has no kernel '" + name + "'", REBUILD);
    check(found, ("opening " + name).c_str());
    check_parameters(function, name, sizes);
    check(driver().cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                                      SHARED_PERCENT),
          ("dividing memory for " + name).c_str());
    return function;
}

// A bundle's kernels may come from another version, with other parameters.
void Kernels::check_parameters(CUfunction function, const std::string& name,
                               const std::vector<std::size_t>& sizes) const {
    if (!driver().cuFuncGetParamInfo) return;
    std::size_t count = 0, offset = 0, size = 0;
    bool same = true;
    CUresult told = CUDA_SUCCESS;
    for (; (told = driver().cuFuncGetParamInfo(function, count, &offset, &size)) == CUDA_SUCCESS; ++count)
        same = same && count < sizes.size() && sizes[count] == size;
    if (told != CUDA_ERROR_INVALID_VALUE) check(told, ("looking at " + name).c_str());  // it ends so
    if (!same || count != sizes.size())
        throw core::backend_failure(file_ + " holds another version of kernel '" + name + "': it has " +
                                        std::to_string(count) + " parameters, " +
                                        std::to_string(sizes.size()) + " are passed",
                                    REBUILD);
}

}  // namespace ojfa::tensorrt
