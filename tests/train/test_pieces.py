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
    return jax.lax.fori_loop(start, stop, lambda at, sum: sum + terms[at], carry)


class jitted:
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
    ("seconds_a_step", "expected"),
    [
        (0.001, [1, 2, 4, 8, 16, 6]),
        (0.24, [1, 2, *8 * [4], 2]),
        (0.6, 37 * [1]),
        (100, 37 * [1]),
    ],
)
def test_a_piece_is_as_long_as_it_may_take(monkeypatch, seconds_a_step, expected):
    clock, ends, sizes = [0.0], [], []

    @jitted
    def program(carry, start, stop, terms):
        clock[0] += seconds_a_step * (stop - start)
        sizes.append(stop - start)
        return total(carry, start, stop, terms)

    monkeypatch.setattr(pieces.time, "perf_counter", lambda: clock[0])
    run, terms = pieces.Pieces(program), jnp.arange(37)
    result = run(jnp.array(0), 37, terms, on_piece=lambda at, _: ends.append(at))
    assert int(result) == 36 * 37 // 2
    assert sizes == expected and ends == list(np.cumsum(sizes))


def test_pieces_become_shorter_on_a_machine_that_becomes_slower(monkeypatch):
    clock, sizes = [0.0], []

    @jitted
    def program(carry, start, stop):
        sizes.append(stop - start)
        clock[0] += sizes[-1] * (0.1 if start < 50 else 1.0)
        return carry

    monkeypatch.setattr(pieces.time, "perf_counter", lambda: clock[0])
    pieces.Pieces(program)(jnp.zeros(()), 100)
    assert sum(sizes) == 100 and max(sizes) == 8 and sizes[-1] == 1


def test_a_map_in_pieces_is_a_map():
    def function(at, terms):
        return {"sum": terms[:5].sum() * at, "flag": terms[at] > 0}

    terms = jax.random.normal(jax.random.key(0), (7,))
    run = pieces.make_map(function)
    expected = jax.lax.map(lambda at: function(at, terms), jnp.arange(7))
    for _ in range(2):
        chex.assert_trees_all_equal(run(7, terms), expected)
    assert run(0, terms)["sum"].shape == (0,)


def test_a_signal_is_heard_during_a_compilation():
    compiling = threading.Event()

    class Slow(jitted):
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


def test_an_error_of_a_compilation_is_raised():
    class Broken(jitted):
        def compile(self):
            raise ValueError("no such target")

    with pytest.raises(ValueError, match="no such target"):
        pieces.compile_in_thread(Broken(lambda: None))()


def test_what_was_compiled_aside_is_not_compiled_again(compilations):
    run = pieces.compile_in_thread(jax.jit(lambda x: x * 3 + 1))
    x = jnp.ones(3)
    before = compilations()
    np.testing.assert_array_equal(run(x), 4 * np.ones(3))
    np.testing.assert_array_equal(run(x), 4 * np.ones(3))
    assert compilations() == before + 1
