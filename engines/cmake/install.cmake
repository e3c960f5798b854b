# Headers, libraries, programs, and what find_package(ojfa CONFIG) reads.
include(CMakePackageConfigHelpers)
set(OJFA_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/ojfa)
install(TARGETS ojfa EXPORT ojfaTargets)
install(DIRECTORY include/ojfa DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(OJFA_PROGRAMS)
  install(TARGETS ojfa-run ojfa-bench)
endif()
install(EXPORT ojfaTargets NAMESPACE ojfa:: DESTINATION ${OJFA_CMAKE_DIR})
configure_package_config_file(cmake/ojfaConfig.cmake.in ojfaConfig.cmake INSTALL_DESTINATION ${OJFA_CMAKE_DIR})
write_basic_package_version_file(ojfaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/ojfaConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/ojfaConfigVersion.cmake
        DESTINATION ${OJFA_CMAKE_DIR})
