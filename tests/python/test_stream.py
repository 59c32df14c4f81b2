"""Streams that end early: closed, interrupted, replaced by another request."""

from __future__ import annotations

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

import frspec
from reference import tiny

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def generator(new_tiny_generator):
    model = tiny.FAMILIES["llama3"]
    return new_tiny_generator(model, drafter=tiny.TinyDrafter(), tree=(2, 2, 4))


def exhaust(stream) -> list[int]:
    for _ in stream:
        pass
    return stream.result.token_ids


def test_a_closed_stream_stays_closed(generator):
    stream = generator.stream(PROMPT, max_new_tokens=40, ignore_eos=True)
    stream._step()
    stream._step()
    with pytest.raises(frspec.RequestError, match="has not ended"):
        _ = stream.result
    stream.close()
    result = stream.result
    written = list(result.token_ids)
    assert result.finish_reason == "cancelled"
    assert stream._step() == ""  # as a thread that waited for the lock would
    assert list(stream) == []
    assert stream.result is result
    assert result.token_ids == written


def test_a_new_request_ends_the_open_stream(generator):
    expected = exhaust(generator.stream(PROMPT, max_new_tokens=20, ignore_eos=True))
    open_stream = generator.stream([7, 7], max_new_tokens=20, ignore_eos=True)
    open_stream._step()
    open_stream._step()
    assert exhaust(generator.stream(PROMPT, max_new_tokens=20, ignore_eos=True)) == expected
    assert list(open_stream) == []
    assert open_stream.result.finish_reason == "cancelled"
    timings = open_stream.result.timings
    assert timings.prefill_s > 0 and timings.decode_s > 0


def test_threads_wait_for_each_other(generator):
    expected = generator.generate(PROMPT, max_new_tokens=40, ignore_eos=True).token_ids
    with ThreadPoolExecutor(4) as pool:
        texts = pool.map(
            lambda _: generator.generate(PROMPT, max_new_tokens=40, ignore_eos=True), range(8)
        )
        assert all(text.token_ids == expected for text in texts)


def test_a_refused_request_leaves_the_open_stream_alone(generator):
    expected = exhaust(generator.stream(PROMPT, max_new_tokens=20, ignore_eos=True))
    stream = generator.stream(PROMPT, max_new_tokens=20, ignore_eos=True)
    stream._step()
    for nonsense in ({"top_k": 3_000_000_000}, {"temperature": 10**400}, {"top_p": 2.0}):
        with pytest.raises(frspec.RequestError):
            generator.stream([7, 7], **nonsense)
    assert exhaust(stream) == expected


def test_an_interrupt_ends_the_stream(generator):
    stream = generator.stream(PROMPT, max_new_tokens=20, ignore_eos=True)
    stream._step()

    class Interrupted:
        finish_reason = None
        timings, reused_tokens = {}, 0

        def step(self):
            raise KeyboardInterrupt

    generator._engine = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert stream.result.finish_reason == "cancelled"
    assert list(stream) == []


def test_a_closed_generator_gives_its_memory_back(generator):
    finished = generator.stream(PROMPT, max_new_tokens=4, ignore_eos=True)
    expected = exhaust(finished)
    replaced = generator.stream(PROMPT, max_new_tokens=4, ignore_eos=True)
    replaced._step()
    open_stream = generator.stream(PROMPT, max_new_tokens=4, ignore_eos=True)
    open_stream._step()
    engine = generator._engine
    with generator:
        pass
    assert sys.getrefcount(engine) == 2  # `engine`, and the argument
    assert list(replaced) == [] and replaced.result.finish_reason == "cancelled"
    assert open_stream.result.finish_reason == "cancelled"
    assert finished.result.token_ids == expected  # what was written stays
    assert list(open_stream) == []
    generator.close()
    for use in (
        lambda: generator.generate(PROMPT),
        lambda: generator.stream(PROMPT),
        lambda: generator.memory_plan,
    ):
        with pytest.raises(frspec.RequestError, match="the generator is closed"):
            use()


def test_a_finished_stream_keeps_no_generator(new_tiny_generator):
    generator = new_tiny_generator(tiny.FAMILIES["llama3"])
    stream = generator.stream(PROMPT, max_new_tokens=4, ignore_eos=True)
    assert len(exhaust(stream)) == 4
    alive = weakref.ref(generator)
    gc.disable()
    try:
        del generator
        assert alive() is None
    finally:
        gc.enable()
    assert len(stream.result.token_ids) == 4


def test_a_device_that_fails_ends_the_stream_with_its_own_error(generator):
    stream = generator.stream(PROMPT, max_new_tokens=20, ignore_eos=True)
    stream._step()

    class Broken:  # as a GPU after a kernel's failure: whatever is asked of it fails again
        finish_reason = None
        timings, reused_tokens = {}, 0

        def step(self):
            raise frspec.DeviceError("waiting for the device: cudaErrorIllegalAddress")

        @property
        def device(self):
            raise frspec.DeviceError("asking for free memory: cudaErrorIllegalAddress")

    generator._engine = Broken()
    with pytest.raises(frspec.DeviceError, match="waiting for the device"):
        next(stream)
    assert (stream.result.finish_reason, stream.result.device) == ("cancelled", "cpu")
    stream.close()
    assert list(stream) == []
