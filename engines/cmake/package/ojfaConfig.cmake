# Gives the target ojfa::ojfa, built from the sources that came with the Python package: what
# `python -m ojfa_export --cmake-dir` names. An installed library has a file of its own (cmake/ojfaConfig.cmake.in).
if(NOT TARGET ojfa::ojfa)
  get_filename_component(OJFA_SOURCE ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
  add_subdirectory(${OJFA_SOURCE} ${CMAKE_BINARY_DIR}/ojfa EXCLUDE_FROM_ALL)
  if(TARGET ojfa_tensorrt)
    add_dependencies(ojfa ojfa_tensorrt)
  endif()
endif()
