"""Loops split into timed pieces, with a fake clock."""

import signal
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xnor_jax.train import pieces


@jax.jit
def total(carry, start, stop, terms):
    return jax.lax.fori_loop(start, stop, lambda i, sum: sum + terms[i], carry)


class Uncompiled:
    """A Python function with the interface of a jitted one, without compilation."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def lower(self, *_):
        return self

    def compile(self):
        pass


@pytest.mark.parametrize(
    ("seconds_per_step", "expected"),
    [
        (0.001, [1, 2, 4, 8, 16, 6]),
        (0.24, [1, 2, *8 * [4], 2]),
        (0.6, 37 * [1]),
        (100, 37 * [1]),
    ],
)
def test_pieces_grow_up_to_the_time_limit(monkeypatch, seconds_per_step, expected):
    clock, ends, sizes = [0.0], [], []

    @Uncompiled
    def program(carry, start, stop, terms):
        clock[0] += seconds_per_step * (stop - start)
        sizes.append(stop - start)
        return total(carry, start, stop, terms)

    monkeypatch.setattr(pieces, "SECONDS", 1)
    monkeypatch.setattr(pieces.time, "perf_counter", lambda: clock[0])
    run, terms = pieces.Pieces(program), jnp.arange(37)
    result = run(jnp.array(0), 37, terms, on_piece=lambda end, _: ends.append(end))
    assert int(result) == 36 * 37 // 2
    assert sizes == expected and ends == list(np.cumsum(sizes))


def test_pieces_shrink_when_steps_become_slower(monkeypatch):
    clock, sizes = [0.0], []

    @Uncompiled
    def program(carry, start, stop):
        sizes.append(stop - start)
        clock[0] += sizes[-1] * (0.1 if start < 50 else 1.0)
        return carry

    monkeypatch.setattr(pieces, "SECONDS", 1)
    monkeypatch.setattr(pieces.time, "perf_counter", lambda: clock[0])
    pieces.Pieces(program)(jnp.zeros(()), 100)
    assert sum(sizes) == 100 and max(sizes) == 8 and sizes[-1] == 1


def test_make_map_matches_lax_map():
    def function(i, terms):
        return {"sum": terms[:5].sum() * i, "flag": terms[i] > 0}

    terms = jax.random.normal(jax.random.key(0), (7,))
    run = pieces.make_map(function)
    expected = jax.lax.map(lambda i: function(i, terms), jnp.arange(7))
    for _ in range(2):
        chex.assert_trees_all_equal(run(7, terms), expected)
    assert run(0, terms)["sum"].shape == (0,)


def test_signal_interrupts_a_compilation():
    compiling = threading.Event()

    class Slow(Uncompiled):
        def compile(self):
            compiling.set()
            time.sleep(20)

    def interrupt():
        compiling.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    run = pieces.compile_in_thread(Slow(lambda: None))
    # Shell scripts start background processes with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 10


def test_compilation_error_is_raised():
    class Broken(Uncompiled):
        def compile(self):
            raise ValueError("no such target")

    with pytest.raises(ValueError, match="no such target"):
        pieces.compile_in_thread(Broken(lambda: None))()


def test_compile_in_thread_compiles_once(compilations):
    run = pieces.compile_in_thread(jax.jit(lambda x: x * 3 + 1))
    x = jnp.ones(3)
    before = compilations()
    np.testing.assert_array_equal(run(x), 4 * np.ones(3))
    np.testing.assert_array_equal(run(x), 4 * np.ones(3))
    assert compilations() == before + 1
