"""The GPU: one context, one stream, memory, CUDA graphs. A thin layer over cuda-python."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from ojfa_export.backends.cuda.failures import failure
from ojfa_export.backends.cuda.recorder import Recorder, Work
from ojfa_export.backends.cuda.sizes import GIB, readable
from ojfa_export.backends.cuda.staging import SEGMENT_BYTES, SEGMENTS, Staging
from ojfa_export.errors import BackendError

SUCCESS = driver.CUresult.CUDA_SUCCESS


def check(result: tuple[Any, ...], what: str | None = None) -> Any:
    """Takes the results of a driver call: none, one, or a tuple of them.

    Args:
        result: What the call gave.
        what: Was being done, for the message.

    Raises:
        BackendError: The call failed.
    """
    status = result[0]
    if status != SUCCESS:
        _, text = driver.cuGetErrorString(status)
        detail = text.decode() if isinstance(text, bytes) else str(status)
        raise failure(status.name, detail, what)
    values = result[1:]
    return values[0] if len(values) == 1 else values or None


class Memory:
    """Device memory that is freed with its last user.

    Args:
        device: Whose memory.
        size: Bytes.
        pooled: Whether it comes from the stream-ordered pool: quick, for what lives for a step.
    """

    def __init__(self, device: Device, size: int, *, pooled: bool) -> None:
        self._device, self.pooled = device, pooled
        if not size:
            self.pointer = 0
            return
        result = self._allocate(size)
        if result[0] == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            device.trim()  # what the pool kept for the next step may be enough
            result = self._allocate(size)
        if result[0] == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = device.memory()
            raise BackendError(
                f"{device.name} has {readable(free)} of {readable(total)} free, and "
                f"{readable(size)} more are needed",
                hint="use fewer sequences, a shorter cache (max_length), or an earlier fixed exit: "
                "blocks past it take no memory",
            )
        self.pointer = int(check(result))

    def _allocate(self, size: int) -> tuple[Any, ...]:
        if self.pooled:
            return tuple(driver.cuMemAllocAsync(size, self._device.stream))
        return tuple(driver.cuMemAlloc(size))

    def __del__(self) -> None:
        # At the interpreter's end the driver may be gone already.
        with suppress(Exception):
            if getattr(self, "pointer", 0):
                if self.pooled:
                    driver.cuMemFreeAsync(self.pointer, self._device.stream)
                else:
                    driver.cuMemFree(self.pointer)


class Device:
    """The first visible GPU, its primary context and the one stream that all work goes to.

    Attributes:
        stream: That stream.
        name: As the driver calls it.
        compute_capability: For example (9, 0).
        driver_version: CUDA version of the driver, for example "13.0".
        multiprocessors: How many.
        shared_bytes: Of shared memory that a thread block may have.
        recorder: Puts the work of steps together; everything else on the stream comes after it.

    Raises:
        BackendError: There is no GPU, or the driver doesn't work.
    """

    def __init__(self) -> None:
        try:
            check(driver.cuInit(0))
        except RuntimeError as error:  # cuda-python's, where the driver's library isn't there
            raise BackendError(
                f"no NVIDIA driver was found: {error}", hint="see 'ojfa-export doctor'"
            ) from error
        handle = check(driver.cuDeviceGet(0))
        self._context = check(driver.cuDevicePrimaryCtxRetain(handle))
        check(driver.cuCtxSetCurrent(self._context))
        self.name = check(driver.cuDeviceGetName(128, handle)).split(b"\0")[0].decode()
        version = int(check(driver.cuDriverGetVersion()))
        self.driver_version = f"{version // 1000}.{version % 1000 // 10}"
        attributes = driver.CUdevice_attribute

        def attribute(which: Any) -> int:
            return int(check(driver.cuDeviceGetAttribute(which, handle)))

        self.compute_capability = (
            attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        self.multiprocessors = attribute(attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.shared_bytes = attribute(
            attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        )
        self.stream = check(
            driver.cuStreamCreate(int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        )
        # What runs beside the stream goes first where both could: it is small.
        self._side = check(
            driver.cuStreamCreateWithPriority(
                int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING),
                check(driver.cuCtxGetStreamPriorityRange())[1],
            )
        )
        self._forked, self._joined = (
            check(driver.cuEventCreate(int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)))
            for _ in range(2)
        )
        self.recorder = Recorder(self)
        ring = PinnedArray((SEGMENTS * SEGMENT_BYTES,), np.uint8)
        self._staging = Staging(ring, lambda: Mark(self))
        # Memory of one step is kept for the next.
        self._pool = pool = check(driver.cuDeviceGetDefaultMemPool(handle))
        threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        check(driver.cuMemPoolSetAttribute(pool, threshold, driver.cuuint64_t(4 * GIB)))

    def make_current(self) -> None:
        """Makes the context that of this thread."""
        check(driver.cuCtxSetCurrent(self._context))

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = check(driver.cuMemGetInfo())
        return int(free), int(total)

    def available(self) -> int:
        """Bytes that can be taken: what is free, and what the pool keeps without using it."""
        attributes = driver.CUmemPool_attribute
        reserved, used = (
            int(check(driver.cuMemPoolGetAttribute(self._pool, which)))
            for which in (
                attributes.CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
                attributes.CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
            )
        )
        return self.memory()[0] + reserved - used

    def trim(self) -> None:
        """Gives back what the pool keeps without using it."""
        self.synchronize()
        check(driver.cuMemPoolTrimTo(self._pool, 0))

    def upload(self, array: NDArray[Any], pointer: int) -> None:
        """Copies host memory to the device; the host memory may be reused at once.

        What is small doesn't wait for what is on the stream.
        """
        self.recorder.flush()
        source = array.ctypes.data
        staged = self._staging.put(source, array.nbytes) or source
        check(driver.cuMemcpyHtoDAsync(pointer, staged, array.nbytes, self.stream))

    def download(self, pointer: int, host: int, size: int) -> None:
        """Copies to pinned host memory; there after `synchronize`."""
        self.recorder.flush()
        check(driver.cuMemcpyDtoHAsync(host, pointer, size, self.stream))

    def copy(self, source: int, target: int, size: int) -> None:
        """Copies on the device."""
        if not size:
            return
        self.recorder.flush()
        check(driver.cuMemcpyDtoDAsync(target, source, size, self.stream))

    def clear(self, pointer: int, size: int) -> None:
        """Fills with zeros."""
        self.recorder.flush()
        check(driver.cuMemsetD8Async(pointer, 0, size, self.stream))

    def synchronize(self) -> None:
        """Waits for all work."""
        self.recorder.flush()
        check(driver.cuStreamSynchronize(self.stream))
        self.recorder.done = self.recorder.launches

    def idle(self) -> bool:
        """Whether all work is done.

        Raises:
            BackendError: Some of it failed.
        """
        [status] = driver.cuStreamQuery(self.stream)
        if status == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        check((status,))
        return True

    def beside(self, small: Work, work: Work) -> None:
        """Puts two pieces of work on the device at once; what comes later waits for both.

        Args:
            small: Goes on a stream of its own.
            work: Goes on the stream.
        """
        stream = self.stream
        check(driver.cuEventRecord(self._forked, stream))
        check(driver.cuStreamWaitEvent(self._side, self._forked, 0))
        self.stream = self._side
        try:
            small()
        finally:
            self.stream = stream
        check(driver.cuEventRecord(self._joined, self._side))
        work()
        check(driver.cuStreamWaitEvent(stream, self._joined, 0))

    def capture(self, work: Work) -> Graph:
        """Records what `work` puts on the stream, without running it."""
        self.recorder.flush()
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        # Memory that nobody can reach any more must not be freed, nor be waited for, in between.
        collecting = gc.isenabled()
        gc.disable()
        try:
            check(driver.cuStreamBeginCapture(self.stream, mode))
            try:
                work()
            finally:
                ended = driver.cuStreamEndCapture(self.stream)
        finally:
            if collecting:
                gc.enable()
        return Graph(self, check(ended))


class Mark:
    """A place on a device's stream; see `cuda.staging.Mark`.

    Args:
        device: Whose stream.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        flags = int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self._event = check(driver.cuEventCreate(flags))

    def set(self) -> None:
        """Moves it behind all that is on the stream."""
        check(driver.cuEventRecord(self._event, self._device.stream))

    def wait(self) -> None:
        """Waits until the device has passed it; at once if it was never set."""
        check(driver.cuEventSynchronize(self._event))


class Graph:
    """A recorded sequence of kernels.

    Args:
        device: Where it runs.
        recorded: A CUgraph; owned by this object.
    """

    def __init__(self, device: Device, recorded: Any) -> None:
        self._device = device
        self._executable = check(driver.cuGraphInstantiate(recorded, 0))
        check(driver.cuGraphDestroy(recorded))
        check(driver.cuGraphUpload(self._executable, device.stream))

    def launch(self) -> None:
        """Puts the whole sequence on the stream."""
        check(driver.cuGraphLaunch(self._executable, self._device.stream))

    def __del__(self) -> None:
        with suppress(Exception):
            driver.cuGraphExecDestroy(self._executable)


class PinnedArray:
    """A host array that the device copies to without a detour.

    Args:
        shape: Of the array.
        dtype: Of the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.pointer = int(check(driver.cuMemAllocHost(max(size, 1))))
        buffer = (ctypes.c_char * size).from_address(self.pointer)
        self.array: NDArray[Any] = np.frombuffer(buffer, dtype).reshape(shape)

    def __del__(self) -> None:
        with suppress(Exception):
            driver.cuMemFreeHost(self.pointer)


@cache
def the_device() -> Device:
    """The process's one GPU."""
    return Device()
