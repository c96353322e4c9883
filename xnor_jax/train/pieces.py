"""Long loops in pieces of bounded time, between which Python hears a signal.

The first and last step of a piece are arguments of one compiled program, so how a loop
is cut changes no number and compiles nothing anew.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xnor_jax.train import processes
from xnor_jax.train.devices import constrain_replicated

T = TypeVar("T")

SECONDS = 1.0
"""How long a piece may take, where a single step does not take longer."""


def heard_while_compiling(program: Callable[..., T]) -> Callable[..., T]:
    """The jitted `program`, whose first compilation does not keep signals waiting.

    XLA compiles in another thread, while this one is in Python. Who is interrupted then
    has to leave by `os._exit`: the compilation cannot be stopped.
    """
    compiled = False

    def call(*args):
        nonlocal compiled
        if not compiled:
            _in_a_thread(program.lower(*args).compile)  # type: ignore[attr-defined]
            compiled = True
        return program(*args)

    return call


def _in_a_thread(function: Callable[[], Any]) -> None:
    done: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    # A signal that comes just before a wait does not end it: none is long.
    while not wait([done], 0.2).done:
        pass
    done.result()


class Pieces:
    """Runs a loop piece by piece; their length follows from how long they take.

    Args:
      program: `program(carry, start, stop, *data) -> carry`, jitted: the steps from
        `start` up to `stop`, as `jax.lax.fori_loop` counts them. The carry is donated.
    """

    def __init__(self, program: Callable[..., Any]):
        self._program = heard_while_compiling(program)
        self._steps = 1

    def __call__(
        self,
        carry: T,
        count: int,
        *data: Any,
        on_piece: Callable[[int, T], None] | None = None,
    ) -> T:
        """Take the steps from 0 to `count`.

        Args:
          carry: What a step changes; donated.
          count: How many steps.
          *data: What it only reads.
          on_piece: Called after each piece with the steps so far and the carry.
        """
        done = 0
        while done < count:
            steps = processes.agree(self._steps)
            stop = min(done + steps, count)
            begin = time.perf_counter()
            carry = jax.block_until_ready(self._program(carry, done, stop, *data))
            seconds = time.perf_counter() - begin
            if seconds > SECONDS:
                self._steps = max(steps // 2, 1)
            elif seconds < SECONDS / 2 and stop - done == steps:
                self._steps = 2 * steps
            done = stop
            if on_piece is not None:
                on_piece(done, carry)
        return carry


def make_map(
    function: Callable[..., Any], *, mesh: Mesh | None = None
) -> Callable[..., Any]:
    """`jax.lax.map` over the integers from 0, in pieces.

    Args:
      function: `function(at, *data)`, a tree of arrays.
      mesh: The devices that hold the results; None for one.

    Returns:
      `run(count, *data)`: the results, stacked along a new first axis.
    """

    @partial(jax.jit, static_argnums=0)
    def empty(count, *data):
        shapes = jax.eval_shape(function, 0, *data)
        results = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
        return constrain_replicated(results, mesh)

    @partial(jax.jit, donate_argnums=0)
    def program(results, start, stop, *data):
        def body(at, results):
            put = partial(jax.lax.dynamic_update_index_in_dim, index=at, axis=0)
            return jax.tree.map(put, results, function(at, *data))

        results = jax.lax.fori_loop(start, stop, body, results)
        return constrain_replicated(results, mesh)

    pieces = Pieces(program)
    return lambda count, *data: pieces(empty(count, *data), count, *data)
