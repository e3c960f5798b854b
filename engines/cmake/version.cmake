# OJFA_VERSION, the Python package's. In a checkout that lies beside engines/, in a wheel around it.
set(OJFA_VERSION_FILE ${CMAKE_CURRENT_LIST_DIR}/../../ojfa_export/_version.py)
if(NOT EXISTS ${OJFA_VERSION_FILE})
  set(OJFA_VERSION_FILE ${CMAKE_CURRENT_LIST_DIR}/../../_version.py)
endif()
file(STRINGS ${OJFA_VERSION_FILE} OJFA_VERSION_LINE REGEX "__version__ = ")
string(REGEX REPLACE ".*\"([0-9]+\\.[0-9]+\\.[0-9]+)[^\"]*\".*" "\\1" OJFA_VERSION "${OJFA_VERSION_LINE}")
