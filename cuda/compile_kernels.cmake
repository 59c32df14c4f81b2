# Runs nvcc and keeps what ptxas says of every kernel (registers, spills, shared memory):
#
#   cmake -DRESOURCES=FILE -P compile_kernels.cmake -- NVCC ARGUMENT...
#
# tools/kernel_resources.py reads the file. Whatever else nvcc says is passed on.
set(command "")
set(in_command FALSE)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(index RANGE ${last})
  if(in_command)
    list(APPEND command "${CMAKE_ARGV${index}}")
  elseif("${CMAKE_ARGV${index}}" STREQUAL "--")
    set(in_command TRUE)
  endif()
endforeach()

execute_process(COMMAND ${command} -Xptxas=-v ERROR_VARIABLE said RESULT_VARIABLE status)
string(REGEX REPLACE "(ptxas info|    [0-9]+ bytes stack frame)[^\n]*\n" "" rest "${said}")
if(NOT rest STREQUAL "")
  message("${rest}")
endif()
if(NOT status EQUAL 0)
  message(FATAL_ERROR "nvcc failed: ${status}")
endif()
file(WRITE "${RESOURCES}" "${said}")
