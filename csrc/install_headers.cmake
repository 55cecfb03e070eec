# Runs at `cmake --install`: copies nanoflow.h and every header it includes to include/nanoflow, where
# they include each other as "nanoflow/core/...": names like core/error.h must not be on a consumer's path.
# Set before: SOURCE, the folder csrc, and TARGET, the folder include/nanoflow.
cmake_minimum_required(VERSION 3.24) # for IN_LIST: a script gets no policies from the project
set(pending nanoflow.h)
set(done "")
while(pending)
  list(POP_FRONT pending header)
  if(header IN_LIST done)
    continue()
  endif()
  list(APPEND done ${header})
  file(READ ${SOURCE}/${header} text)
  string(REGEX MATCHALL "#include \"[^\"]+\"" lines "${text}")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE "#include \"(.+)\"" "\\1" included "${line}")
    list(APPEND pending ${included})
  endforeach()
  string(REPLACE "#include \"" "#include \"nanoflow/" text "${text}")
  file(WRITE "$ENV{DESTDIR}${TARGET}/${header}" "${text}")
endwhile()
