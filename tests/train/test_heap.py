"""Freed memory goes back to the system, where glibc would keep it."""

import ctypes
import threading

import psutil
import pytest

from supple.train.generation.heap import give_back

_BLOCK = 64 * 1024
"""Below the size from which glibc maps each block for itself."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's alone")
def test_what_a_thread_freed_under_a_block_in_use_goes_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    kept: list[int] = []

    def fill_and_free() -> None:
        blocks = [libc.malloc(_BLOCK) for _ in range(512)]
        for block in blocks:
            ctypes.memset(block, 1, _BLOCK)
        kept.append(blocks.pop())  # the top of the arena stays in use
        for block in blocks:
            libc.free(block)

    thread = threading.Thread(target=fill_and_free)
    thread.start()
    thread.join()
    process = psutil.Process()
    before = process.memory_full_info().uss
    give_back()
    after = process.memory_full_info().uss
    libc.free(kept[0])
    assert before - after > 256 * _BLOCK
