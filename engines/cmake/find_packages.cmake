# What the library needs; where something is missing, what to install.
find_package(Threads REQUIRED)
find_package(nlohmann_json 3.10 QUIET)
if(NOT nlohmann_json_FOUND)
  message(FATAL_ERROR "nlohmann-json is missing (JSON for manifests)\n"
                      "hint: apt-get install nlohmann-json3-dev, or -Dnlohmann_json_DIR=…")
endif()
find_package(OpenSSL QUIET COMPONENTS Crypto)
if(NOT OPENSSL_FOUND)
  message(FATAL_ERROR "OpenSSL is missing (SHA-256 of a bundle's files)\nhint: apt-get install libssl-dev")
endif()
if(OJFA_TESTS)
  find_package(GTest QUIET)
  if(NOT GTest_FOUND)
    message(FATAL_ERROR "GoogleTest is missing\nhint: apt-get install libgtest-dev, or leave out the tests: "
                        "-DOJFA_TESTS=OFF")
  endif()
endif()

set(OJFA_WITH_TENSORRT OFF)
if(OJFA_TENSORRT STREQUAL "STAND_IN")
  set(OJFA_WITH_TENSORRT ON)
  set(TENSORRT_INCLUDE_DIR ${PROJECT_SOURCE_DIR}/tests/stand_in/include)
  set(CUDAToolkit_INCLUDE_DIRS ${TENSORRT_INCLUDE_DIR})
elseif(NOT OJFA_TENSORRT STREQUAL "OFF")
  find_path(TENSORRT_INCLUDE_DIR NvInfer.h HINTS ${TENSORRT_ROOT} PATH_SUFFIXES include
            include/${CMAKE_LIBRARY_ARCHITECTURE})
  find_library(TENSORRT_LIBRARY NAMES nvinfer libnvinfer.so.11 libnvinfer.so.10 libnvinfer.so.8
               HINTS ${TENSORRT_ROOT} PATH_SUFFIXES lib lib64 targets/x86_64-linux-gnu/lib)
  find_package(CUDAToolkit QUIET)
  if(TENSORRT_INCLUDE_DIR AND TENSORRT_LIBRARY AND CUDAToolkit_FOUND)
    set(OJFA_WITH_TENSORRT ON)
  elseif(OJFA_TENSORRT STREQUAL "ON")
    message(FATAL_ERROR "TensorRT is missing: headers ${TENSORRT_INCLUDE_DIR}, library ${TENSORRT_LIBRARY}, CUDA "
                        "toolkit found: ${CUDAToolkit_FOUND}\n"
                        "hint: -DTENSORRT_ROOT=DIRECTORY with include/NvInfer.h and lib/libnvinfer.so, 8.6 or later, "
                        "and a CUDA toolkit")
  else()
    message(STATUS "Left out: the TensorRT backend. To get it: -DTENSORRT_ROOT=DIRECTORY with include/NvInfer.h and "
                   "lib/libnvinfer.so, 8.6 or later, and a CUDA toolkit")
  endif()
endif()
