// The CUDA driver, loaded at run time: a machine without it gets a sentence instead of a linker's error.
#pragma once

#include <cuda.h>

#include <string>

namespace ojfa::tensorrt {

// Every function of the driver that is used, by the version of its interface.
#define OJFA_DRIVER_FUNCTIONS(X)          \
    X(cuInit, 2000)                       \
    X(cuDeviceGet, 2000)                  \
    X(cuDeviceGetCount, 2000)             \
    X(cuDeviceGetName, 2000)              \
    X(cuDeviceGetAttribute, 2000)         \
    X(cuDriverGetVersion, 2020)           \
    X(cuDevicePrimaryCtxRetain, 7000)     \
    X(cuDevicePrimaryCtxRelease, 11000)   \
    X(cuCtxSetCurrent, 4000)              \
    X(cuGetErrorString, 6000)             \
    X(cuGetErrorName, 6000)               \
    X(cuMemGetInfo, 3020)                 \
    X(cuMemAlloc, 3020)                   \
    X(cuMemFree, 3020)                    \
    X(cuMemHostAlloc, 2020)               \
    X(cuMemFreeHost, 2000)                \
    X(cuMemcpyHtoDAsync, 3020)            \
    X(cuMemcpyDtoHAsync, 3020)            \
    X(cuMemcpyDtoDAsync, 3020)            \
    X(cuMemsetD8Async, 3020)              \
    X(cuEventCreate, 2000)                \
    X(cuEventDestroy, 4000)               \
    X(cuEventRecord, 2000)                \
    X(cuEventSynchronize, 2000)           \
    X(cuCtxGetStreamPriorityRange, 5050)  \
    X(cuStreamCreate, 2000)               \
    X(cuStreamCreateWithPriority, 5050)   \
    X(cuStreamDestroy, 4000)              \
    X(cuStreamQuery, 2000)                \
    X(cuStreamSynchronize, 2000)          \
    X(cuStreamWaitEvent, 3020)            \
    X(cuStreamBeginCapture, 10010)        \
    X(cuStreamEndCapture, 10000)          \
    X(cuGraphInstantiateWithFlags, 11040) \
    X(cuGraphDestroy, 10000)              \
    X(cuGraphExecDestroy, 10000)          \
    X(cuGraphUpload, 11010)               \
    X(cuGraphLaunch, 10000)               \
    X(cuModuleLoadData, 2000)             \
    X(cuModuleUnload, 2000)               \
    X(cuModuleGetFunction, 2000)          \
    X(cuFuncSetAttribute, 9000)           \
    X(cuLaunchKernelEx, 11060)

// Types of cuda.h's functions, after its macros have chosen their versions.
struct Driver {
// NOLINTNEXTLINE(bugprone-macro-parentheses): a declaration's name
#define OJFA_DECLARE(name, version) decltype(&::name) name = nullptr;
    OJFA_DRIVER_FUNCTIONS(OJFA_DECLARE)
#undef OJFA_DECLARE
    // From CUDA 12.4 on; null before.
    CUresult (*cuFuncGetParamInfo)(CUfunction, size_t, size_t*, size_t*) = nullptr;
};

// The driver. Throws Failure where there is none, or one that lacks a function.
const Driver& driver();

// Throws Failure where a call of the driver failed; memory that ran out has a status of its own.
void check(CUresult result, const char* what);

}  // namespace ojfa::tensorrt
