"""Long loops in pieces of bounded time, between which Python can handle signals.

The bounds of a piece are arguments of one compiled program, so the lengths of pieces
neither affect the result nor cause recompilation.
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

SECONDS = 5.0
"""The most seconds that a piece should take, unless a single step takes longer. Not
less: for each piece XLA allocates the program's memory anew, whose page faults took
a quarter of ResNet-20's time in single steps."""


def compile_in_thread(program: Callable[..., T]) -> Callable[..., T]:
    """Wrap the jitted `program` so that its first compilation does not delay signals.

    XLA compiles in another thread, while this one stays in Python. A caller that is
    interrupted then must exit by `os._exit`, since compilation cannot be stopped.
    """
    compiled = False

    def call(*args):
        nonlocal compiled
        if not compiled:
            _run_in_thread(program.lower(*args).compile)  # type: ignore[attr-defined]
            compiled = True
        return program(*args)

    return call


def _run_in_thread(function: Callable[[], Any]) -> None:
    done: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    # A signal just before a wait does not end the wait, so each wait is short.
    while not wait([done], 0.2).done:
        pass
    done.result()


class Pieces:
    """A loop run in pieces, whose length adapts to the time that they take.

    Args:
      program: `program(carry, start, stop, *data) -> carry`, jitted: the steps in
        `[start, stop)`, as in `jax.lax.fori_loop`. The carry is donated.
    """

    def __init__(self, program: Callable[..., Any]):
        self._program = compile_in_thread(program)
        self._steps = 1

    def __call__(
        self,
        carry: T,
        count: int,
        *data: Any,
        on_piece: Callable[[int, T], None] | None = None,
    ) -> T:
        """Run `count` steps, and return the final carry.

        Args:
          carry: The initial carry; donated.
          count: The number of steps.
          *data: The read-only arguments of the program.
          on_piece: Called after each piece with the number of steps so far and the
            carry.
        """
        done = 0
        while done < count:
            steps = processes.broadcast(self._steps)
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
    """Make a `jax.lax.map` over the integers from 0 that runs in pieces.

    Args:
      function: `function(at, *data)`, which returns a tree of arrays.
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
