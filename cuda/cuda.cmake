# The CUDA backend's part of the build, included by CMakeLists.txt. Kernels are compiled by nvcc, of a
# system toolkit or of the PyPI packages (nvidia-cuda-nvcc and those it needs). No CUDA library is
# linked but the static runtime, which opens the driver at run time, as cublas.cpp opens cuBLAS.
#
#   FRSPEC_CUDA        AUTO (default): where nvcc is found; ON: or fail; OFF
#   FRSPEC_NVCC        the compiler, where it is not found by itself
#   FRSPEC_CUDA_ARCHS  compute capabilities, e.g. "80;90a", or "native"; default: each major one from
#                      8.0 on that nvcc knows, or the environment variable of that name. 90a: products
#                      as only Hopper can make them (hopper.cuh)
#
# Sets FRSPEC_CUDA_FOUND and FRSPEC_CUDA_BUILD, its description; or FRSPEC_NO_CUDA_REASON. Where there
# is a toolkit, FRSPEC_CUDA_INCLUDE is set too: the emulation of tests/emulation needs its headers.

set(FRSPEC_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO, ON or OFF")
# What the environment says takes the place of what it said when this build folder was made, but not
# of a -D.
if(NOT DEFINED FRSPEC_CUDA_ARCHS OR FRSPEC_CUDA_ARCHS STREQUAL FRSPEC_CUDA_ARCHS_OF_ENVIRONMENT)
  set(FRSPEC_CUDA_ARCHS "$ENV{FRSPEC_CUDA_ARCHS}" CACHE STRING
      "Compute capabilities of the kernels; empty: all major ones" FORCE)
endif()
set(FRSPEC_CUDA_ARCHS_OF_ENVIRONMENT "$ENV{FRSPEC_CUDA_ARCHS}" CACHE INTERNAL "")

string(TOUPPER "${FRSPEC_CUDA}" wanted)
if("${wanted}" MATCHES "^(ON|YES|TRUE|Y|1)$")
  set(wanted ON)
elseif("${wanted}" MATCHES "^(OFF|NO|FALSE|N|0)$")
  set(wanted OFF)
elseif(NOT wanted STREQUAL "AUTO")
  message(FATAL_ERROR "FRSPEC_CUDA: expected AUTO, ON or OFF, found '${FRSPEC_CUDA}'")
endif()

set(FRSPEC_NO_CUDA_REASON "")
# Where pip has put a toolkit, also seen from an isolated build.
find_package(Python 3.10 QUIET COMPONENTS Interpreter)
set(python_toolkit "")
if(Python_FOUND)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import sysconfig; print(sysconfig.get_path('purelib') + '/nvidia/cu13')"
    OUTPUT_VARIABLE python_toolkit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_program(FRSPEC_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH ${python_toolkit}
             PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(FRSPEC_NVCC)
  execute_process(COMMAND ${FRSPEC_NVCC} --version OUTPUT_VARIABLE version ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" unused "${version}")
  set(toolkit_major "${CMAKE_MATCH_1}")
  set(toolkit_version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  execute_process(COMMAND ${FRSPEC_NVCC} -dryrun -c x.cu ERROR_VARIABLE dryrun OUTPUT_QUIET)
  string(REGEX MATCH "TOP=([^\n]*)" unused "${dryrun}")
  get_filename_component(toolkit "${CMAKE_MATCH_1}" REALPATH)
  file(GLOB target_folders ${toolkit}/targets/*-linux)
  find_path(FRSPEC_CUDA_INCLUDE cuda_runtime.h NO_DEFAULT_PATH PATHS ${toolkit} ${target_folders}
            PATH_SUFFIXES include)
  find_library(FRSPEC_CUDART libcudart_static.a NO_DEFAULT_PATH PATHS ${toolkit} ${target_folders}
               PATH_SUFFIXES lib64 lib)
  if(toolkit_major STREQUAL "")
    set(FRSPEC_NO_CUDA_REASON "expected CUDA's compiler, found ${FRSPEC_NVCC}")
  elseif(NOT FRSPEC_CUDA_INCLUDE OR NOT FRSPEC_CUDART)
    set(FRSPEC_NO_CUDA_REASON
        "${FRSPEC_NVCC} has no cuda_runtime.h or libcudart_static.a beside it (${toolkit})")
  elseif(toolkit_major LESS 12)
    set(FRSPEC_NO_CUDA_REASON "expected CUDA 12 or newer, found ${FRSPEC_NVCC} of ${toolkit_major}")
  endif()
else()
  set(FRSPEC_NO_CUDA_REASON "nvcc was not found when it was built")
endif()
if(wanted STREQUAL "OFF")
  set(FRSPEC_NO_CUDA_REASON "it was built with FRSPEC_CUDA=OFF")
endif()

if(FRSPEC_NO_CUDA_REASON)
  set(FRSPEC_CUDA_FOUND FALSE)
  if(wanted STREQUAL "ON")
    message(FATAL_ERROR "CUDA: ${FRSPEC_NO_CUDA_REASON}")
  endif()
  message(STATUS "CUDA: ${FRSPEC_NO_CUDA_REASON}; building for the CPU alone")
  return()
endif()
set(FRSPEC_CUDA_FOUND TRUE)

set(archs "${FRSPEC_CUDA_ARCHS}")
if(NOT archs)
  execute_process(COMMAND ${FRSPEC_NVCC} --list-gpu-code OUTPUT_VARIABLE codes)
  string(REGEX MATCHALL "sm_([0-9]+)0\n" codes "${codes}")
  foreach(code IN LISTS codes)
    string(REGEX REPLACE "sm_([0-9]+)\n" "\\1" code "${code}")
    if(code GREATER_EQUAL 80)
      list(APPEND archs ${code})
    endif()
  endforeach()
endif()
list(SORT archs COMPARE NATURAL)
set(gencode "")
if(archs STREQUAL "native")
  execute_process(COMMAND ${FRSPEC_NVCC} -arch=native -dryrun -c x.cu ERROR_VARIABLE dryrun
                  OUTPUT_QUIET)
  if(dryrun MATCHES "Cannot find valid GPU")
    message(FATAL_ERROR "FRSPEC_CUDA_ARCHS: native is the GPU of this machine, which has none")
  endif()
  set(gencode -arch=native)
else()
  foreach(arch IN LISTS archs)
    string(REGEX REPLACE "[af]$" "" number "${arch}")
    if(NOT number MATCHES "^[0-9]+$" OR number LESS 80)
      message(FATAL_ERROR "FRSPEC_CUDA_ARCHS: expected native, or compute capabilities from 80 on "
                          "such as \"80;90a\", found '${FRSPEC_CUDA_ARCHS}'")
    endif()
    list(APPEND gencode -gencode arch=compute_${arch},code=sm_${arch})
  endforeach()
  # GPUs newer than all of these compile the newest one's PTX, which must not be of it alone.
  list(GET archs -1 newest)
  string(REGEX REPLACE "[af]$" "" newest ${newest})
  list(APPEND gencode -gencode arch=compute_${newest},code=compute_${newest})
endif()
message(STATUS "CUDA: ${FRSPEC_NVCC}, compute capabilities ${archs}")
list(JOIN archs ", " arch_list)
set(FRSPEC_CUDA_BUILD "CUDA ${toolkit_version}, kernels for compute capabilities ${arch_list}")

# Contraction is spelled out in the kernels: two instantiations of one kernel must round alike.
set(nvcc_flags -std=c++20 -O3 -fmad=false -ccbin ${CMAKE_CXX_COMPILER} -Xcompiler=-fPIC
               -I${PROJECT_SOURCE_DIR}/runtime -I${PROJECT_SOURCE_DIR}/cuda)
if("90a" IN_LIST archs)
  list(APPEND nvcc_flags -DFRSPEC_HOPPER)
endif()
if(FRSPEC_WERROR)
  list(APPEND nvcc_flags --Werror all-warnings)
endif()

# Objects of the kernels, in `result`. Beside each object, <name>.ptxas says what its kernels use.
function(frspec_compile_kernels result)
  set(objects "")
  foreach(source IN LISTS ARGN)
    get_filename_component(name ${source} NAME_WE)
    set(object ${PROJECT_BINARY_DIR}/cuda/${name}.o)
    set(resources ${PROJECT_BINARY_DIR}/cuda/${name}.ptxas)
    set(script ${PROJECT_SOURCE_DIR}/cuda/compile_kernels.cmake)
    add_custom_command(
      OUTPUT ${object} ${resources}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${PROJECT_BINARY_DIR}/cuda
      COMMAND ${CMAKE_COMMAND} -DRESOURCES=${resources} -P ${script} -- ${FRSPEC_NVCC}
              ${nvcc_flags} ${gencode} -MD -MF ${object}.d -MT ${object} -c ${source} -o ${object}
      DEPENDS ${source} ${script} DEPFILE ${object}.d
      COMMENT "Compiling kernels of ${name}.cu"
      COMMAND_EXPAND_LISTS VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  set(${result} ${objects} PARENT_SCOPE)
endfunction()
