# `cmake --install`: libraries, headers, and the package that find_package(nanoflow) finds, which offers the
# target nanoflow::nanoflow. A wheel holds none of it.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/nanoflow)
set_target_properties(nanoflow_core PROPERTIES EXPORT_NAME nanoflow)
target_include_directories(nanoflow_core INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
install(TARGETS nanoflow_core EXPORT nanoflow DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(NANOFLOW_CUDA)  # beside the core, which opens it at run time
  install(TARGETS nanoflow_cuda DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
install(EXPORT nanoflow NAMESPACE nanoflow:: DESTINATION ${package_dir})
install(CODE "set(SOURCE \"${CMAKE_CURRENT_LIST_DIR}\")
set(TARGET \"\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_INCLUDEDIR}/nanoflow\")")
install(SCRIPT ${CMAKE_CURRENT_LIST_DIR}/install_headers.cmake)

set(config ${CMAKE_CURRENT_BINARY_DIR}/nanoflowConfig.cmake)
file(CONFIGURE OUTPUT ${config} @ONLY CONTENT [[
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/nanoflow.cmake)
]])
write_basic_package_version_file(${config}Version VERSION ${PROJECT_VERSION} COMPATIBILITY SameMinorVersion)
install(FILES ${config} DESTINATION ${package_dir})
install(FILES ${config}Version DESTINATION ${package_dir} RENAME nanoflowConfigVersion.cmake)
