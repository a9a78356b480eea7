"""The cluster file: direct where the file system allows it, complete or an error, and nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import platform
import threading
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from kvsched import DynaKVCache
from kvsched.dynakv import aio, flash
from kvsched.dynakv.aio import KernelEngine
from kvsched.dynakv.engine import ThreadEngine
from kvsched.dynakv.flash import PAGE, SECTOR, FlashFile
from kvsched.errors import FlashError

HERE = Path(__file__).parent


@pytest.fixture
def threads_alone(monkeypatch):
    """As where the kernel offers no asynchronous I/O."""

    def refuse():
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(flash, "KernelEngine", refuse)


def pages(count: int) -> memoryview:
    return memoryview(mmap.mmap(-1, count * PAGE))


def page(memory: memoryview, number: int) -> memoryview:
    return memory[number * PAGE : (number + 1) * PAGE]


def write_and_read_back(file: FlashFile, count: int = 50) -> None:
    source, target = pages(count), pages(count)
    source[:] = os.urandom(len(source))
    file.reserve(count * PAGE)
    file.wait(file.write([(i * PAGE, page(source, i)) for i in range(count)]))
    file.wait(file.read([(i * PAGE, page(target, i)) for i in range(count)]))
    assert target == source
    assert file.counters == flash.FlashCounters(count, count * PAGE, count, count * PAGE)


def test_direct_io_on_this_file_system(tmp_path):
    file = FlashFile(HERE, 4)
    assert file.direct
    assert isinstance(file._engine, KernelEngine)
    assert fcntl.fcntl(file._fd, fcntl.F_GETFL) & os.O_DIRECT
    write_and_read_back(file)
    file.close()


def test_the_alignment_is_the_smallest_that_works(tmp_path, monkeypatch):
    # Of this file system, and of one on a device with sectors of 2 KiB.
    original = os.pwritev

    def refuse(fd, buffers, offset):
        if offset % 2048 or any(len(buffer) % 2048 for buffer in buffers):
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(fd, buffers, offset)

    file = FlashFile(tmp_path, 1)
    assert SECTOR <= file.alignment <= PAGE
    source, target = pages(1), pages(1)
    source[:] = os.urandom(PAGE)
    size = file.alignment
    file.wait(file.write([(3 * size, source[:size])]))
    file.wait(file.read([(3 * size, target[:size])]))
    assert target[:size] == source[:size]
    file.close()
    monkeypatch.setattr(os, "pwritev", refuse)
    file = FlashFile(tmp_path, 1)
    assert (file.direct, file.alignment) == (True, 2048)
    file.close()


@pytest.mark.parametrize("refuse_at", ["open", "first transfer"])
def test_falls_back_where_direct_io_is_refused(tmp_path, monkeypatch, refuse_at):
    original_open, original_write = os.open, os.pwritev

    def refuse_open(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original_open(path, flags, *args, **kwargs)

    def refuse_write(fd, *args):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original_write(fd, *args)

    if refuse_at == "open":
        monkeypatch.setattr(os, "open", refuse_open)
    else:
        monkeypatch.setattr(os, "pwritev", refuse_write)
    file = FlashFile(tmp_path, 2)
    assert not file.direct
    write_and_read_back(file)
    file.close()


def test_without_nameless_files_the_name_is_gone_at_once(tmp_path, monkeypatch):
    original = os.open

    def no_tmpfile(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return original(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", no_tmpfile)
    file = FlashFile(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []
    write_and_read_back(file)
    file.close()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error.*Check the device"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left.*another device"),
        (0, "stopped after 0"),
    ],
)
@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.usefixtures("threads_alone")
def test_a_transfer_that_fails_or_ends_early(tmp_path, monkeypatch, verb, failure, message):
    file = FlashFile(tmp_path, 3)
    file.reserve(8 * PAGE)
    name = "preadv" if verb == "read" else "pwritev"
    original, moved = getattr(os, name), []

    def fail(fd, buffers, offset):
        if offset != 5 * PAGE:
            moved.append(offset)
            return original(fd, buffers, offset)
        if isinstance(failure, OSError):
            raise failure
        return failure

    monkeypatch.setattr(os, name, fail)
    memory = pages(8)
    transfer = getattr(file, verb)([(i * PAGE, page(memory, i)) for i in range(8)])
    with pytest.raises(FlashError, match=message) as caught:
        file.wait(transfer)
    assert str(tmp_path) in str(caught.value)
    assert len(moved) == 7  # nobody uses the memory any more: all other parts have ended
    file.close()


@pytest.mark.usefixtures("threads_alone")
@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_transfer_that_stops_half_way_goes_on(tmp_path, monkeypatch, verb):
    name = "preadv" if verb == "read" else "pwritev"
    original, calls = getattr(os, name), []

    def halve(fd, buffers, offset):
        calls.append(offset)
        (buffer,) = buffers
        return original(fd, [buffer[: max(SECTOR, len(buffer) // 2 // SECTOR * SECTOR)]], offset)

    file = FlashFile(tmp_path, 2)
    monkeypatch.setattr(os, name, halve)
    write_and_read_back(file)
    assert len(calls) > 150
    file.close()


def test_reading_past_the_end_is_an_error(tmp_path):
    file = FlashFile(tmp_path, 1)
    file.reserve(PAGE)
    with pytest.raises(FlashError, match="stopped after 0"):
        file.wait(file.read([(4 * PAGE, pages(1))]))
    file.close()


def test_growing_beyond_the_device(tmp_path):
    file = FlashFile(tmp_path, 1)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(FlashError, match=rf"cannot grow the cluster file in {tmp_path}: No space left") as caught:
        file.reserve(2 * free // PAGE * PAGE)
    assert "another device" in str(caught.value)
    file.close()


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("missing", "No such file or directory. Create it"),
        ("file", "Not a directory. Choose a directory, not a file"),
    ],
)
def test_a_directory_that_is_none(tmp_path, directory, message):
    (tmp_path / "file").touch()
    with pytest.raises(FlashError, match=message) as caught:
        FlashFile(tmp_path / directory, 1)
    assert str(tmp_path / directory) in str(caught.value)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FlashError, match="Choose a directory that you may write to"):
        FlashFile(tmp_path, 1)


def open_files_and_threads() -> tuple[int, int]:
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("kvsched-flash")]
    return len(list(Path("/proc/self/fd").iterdir())), len(threads)


@pytest.mark.parametrize("how", ["close", "garbage collection"])
def test_nothing_is_left(tmp_path, how):
    gc.collect()
    before = open_files_and_threads()
    cache = DynaKVCache(Qwen2Config(num_hidden_layers=2), directory=tmp_path, max_cluster_size=16)
    for layer in cache.layers:
        states = torch.randn(1, 2, 300, 16)
        key, value = layer.update(states, states)
        layer.attention(lambda module, query, *args, **kwargs: (query, None), None, states, key, value, None)
    assert cache.report().clusters > 0
    assert cache.report().flash_bytes > 0
    assert open_files_and_threads() != before
    assert list(tmp_path.iterdir()) == []
    if how == "close":
        cache.close()
        cache.close()
    else:
        del cache, layer, key
        gc.collect()
    assert open_files_and_threads() == before
    assert list(tmp_path.iterdir()) == []


def test_a_closed_cache_says_so(tmp_path):
    file = FlashFile(tmp_path, 1)
    file.close()
    with pytest.raises(FlashError, match="closed"):
        file.read([(0, pages(1))])


def test_batches_longer_than_the_queue(tmp_path):
    file = FlashFile(tmp_path, 1)
    write_and_read_back(file, 2 * aio.DEPTH + 5)
    file.close()


def test_batches_under_way_at_once(tmp_path):
    file = FlashFile(tmp_path, 1)
    file.reserve(40 * PAGE)
    for _ in range(1000):  # more than there may be queues
        file.wait(file.read([]))
    source, target = pages(40), pages(40)
    source[:] = os.urandom(len(source))
    writes = [file.write([(i * PAGE, page(source, i))]) for i in range(40)]
    for transfer in reversed(writes):
        file.wait(transfer)
    reads = [file.read([(i * PAGE, page(target, i)), (0, page(target, i + 1))]) for i in range(0, 40, 2)]
    for transfer in reads:
        file.wait(transfer)
    assert all(page(target, i) == page(source, i if i % 2 == 0 else 0) for i in range(40))
    file.close()


def test_a_request_that_stops_half_way_goes_on(tmp_path, monkeypatch):
    file, submitted, call = FlashFile(tmp_path, 1), [], aio.call

    def halve(name, *arguments):
        if name == "io_submit":
            _, count, pointers = arguments
            for pointer in (ctypes.c_uint64 * count).from_address(pointers):
                length = ctypes.c_uint64.from_address(pointer + aio._REQUEST.fields["nbytes"][1])
                length.value = max(512, length.value // 2 // 512 * 512)
                submitted.append(length.value)
        return call(name, *arguments)

    monkeypatch.setattr(aio, "call", halve)
    write_and_read_back(file, 20)
    assert len(submitted) > 60
    file.close()


@pytest.mark.parametrize(("result", "message"), [(-errno.EIO, "Input/output error.*Check the device"), (0, "after 0")])
def test_a_request_that_fails_ends_the_batch_when_all_have_ended(tmp_path, monkeypatch, result, message):
    file, call, ended = FlashFile(tmp_path, 1), aio.call, []

    def fail(name, *arguments):
        count = call(name, *arguments)
        if name == "io_getevents":
            for i in range(count):
                event = arguments[3] + i * aio._EVENT.itemsize
                ended.append(number := ctypes.c_uint64.from_address(event).value)
                if number == 5:
                    ctypes.c_int64.from_address(event + aio._EVENT.fields["result"][1]).value = result
        return count

    file.reserve(8 * PAGE)
    memory = pages(8)
    monkeypatch.setattr(aio, "call", fail)
    transfer = file.read([(i * PAGE, page(memory, i)) for i in range(8)])
    with pytest.raises(FlashError, match=message):
        file.wait(transfer)
    assert sorted(ended) == list(range(8))
    monkeypatch.setattr(aio, "call", call)
    write_and_read_back_again(file)
    file.close()


def write_and_read_back_again(file: FlashFile) -> None:
    """The queue is as good as new."""
    source, target = pages(1), pages(1)
    source[:] = os.urandom(PAGE)
    file.wait(file.write([(0, source)]))
    file.wait(file.read([(0, target)]))
    assert source == target


def test_a_request_that_the_kernel_refuses(tmp_path):
    file = FlashFile(tmp_path, 1)
    file.reserve(4 * PAGE)
    memory = pages(4)
    transfer = file.read([(0, page(memory, 0)), (-PAGE, page(memory, 1)), (2 * PAGE, page(memory, 2))])
    with pytest.raises(FlashError, match="Invalid argument"):
        file.wait(transfer)
    write_and_read_back_again(file)
    file.close()


def test_threads_stand_in_where_the_platform_has_no_such_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    file = FlashFile(tmp_path, 2)
    assert isinstance(file._engine, ThreadEngine)
    write_and_read_back(file)
    file.close()


def test_closing_waits_for_what_nobody_waited_for(tmp_path):
    gc.collect()
    before = open_files_and_threads()
    file = FlashFile(tmp_path, 1)
    file.reserve(64 * PAGE)
    file.write([(i * PAGE, page(memory, i)) for memory in [pages(64)] for i in range(64)])
    file.close()
    file.close()
    assert open_files_and_threads() == before
