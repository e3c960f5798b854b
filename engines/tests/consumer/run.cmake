# Installs the library into a prefix, builds a project that finds it there, and runs that.
function(step)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()
file(REMOVE_RECURSE ${WORK})
step(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
step(${CMAKE_COMMAND} -S ${SOURCE} -B ${WORK}/build -DCMAKE_PREFIX_PATH=${WORK}/prefix)
step(${CMAKE_COMMAND} --build ${WORK}/build)
step(${WORK}/build/consumer ${BUNDLE})
# And one that builds the sources that `python -m ojfa_export --cmake-dir` names.
step(${CMAKE_COMMAND} -S ${SOURCE} -B ${WORK}/from-sources -Dojfa_DIR=${SOURCE}/../../cmake/package)
step(${WORK}/prefix/bin/ojfa-run ${BUNDLE} --backend reference --ids 1,2,3 --max-new-tokens 2)
