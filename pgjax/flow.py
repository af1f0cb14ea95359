"""Many jobs, a few at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator


async def some_at_a_time(jobs: Iterator[Callable[[], Awaitable[None]]], width: int) -> None:
    """The iterator is not asked for more before there is room, since a job may hold a picture, and advances in a thread, since it may read
    files while calls wait for their answers. The first error ends all."""
    room = asyncio.Semaphore(width)

    async def held(job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        finally:
            room.release()

    try:
        async with asyncio.TaskGroup() as group:
            while await room.acquire() and (job := await asyncio.to_thread(next, jobs, None)):
                group.create_task(held(job))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
