"""A fresh process for each measurement: what an allocator keeps from the one before would change its figures."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Value = TypeVar("Value")


def apart(function: Callable[..., Value], *arguments: object) -> Value:
    """`function(*arguments)` in a process of its own, forked from one that has imported the bench and done no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepvit.bench.benches"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
