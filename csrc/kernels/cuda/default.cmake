# NANOFLOW_CUDA_DEFAULT: ON where both the compiler and a GPU are there, so that a plain build on a laptop
# takes a minute.
set(NANOFLOW_CUDA_DEFAULT OFF)
find_program(NANOFLOW_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
find_program(NANOFLOW_NVIDIA_SMI nvidia-smi)
mark_as_advanced(NANOFLOW_NVCC NANOFLOW_NVIDIA_SMI)
if(NANOFLOW_NVCC AND NANOFLOW_NVIDIA_SMI)
  execute_process(COMMAND ${NANOFLOW_NVIDIA_SMI} -L RESULT_VARIABLE status OUTPUT_QUIET ERROR_QUIET)
  if(status EQUAL 0)
    set(NANOFLOW_CUDA_DEFAULT ON)
  endif()
endif()
