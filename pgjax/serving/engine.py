"""The engine: one thread that owns a running batch (generate/continuous.py). Requests wait in a bounded queue, take a free row each,
and leave when their answer ends, whatever the others do; none waits for a batch to fill."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.data.schema import PromptBatch
from pgjax.generate.continuous import Asked, Tails, advance, closings, join, shardings, vacant
from pgjax.generate.law import Law
from pgjax.parallel.mesh import place_rows
from pgjax.train.setup import Setup

TAILS, TAIL_TOKENS = 8, 8  # numbers of tails and of their tokens are rounded up to these times a power of two: few shapes


class Full(Exception):
    """The queue is full: come again later."""


class Stopped(Exception):
    """The engine takes no more requests."""


class Tail(NamedTuple):
    """A continuation to score: it takes the answer's place from token `branch` on. `name` is the asker's own."""

    name: str
    branch: int
    tokens: list[int]


@dataclass(frozen=True)
class Ask:
    prompt: PromptBatch  # numpy, one row of the engine's T and I
    start: int  # automaton state
    outcome_J: np.ndarray  # bool
    limit: int  # tokens of an answer
    samples: int = 1  # answers, from one prefill
    temperature: float = 0.0  # 0: greedy
    seed: int = 0
    bound: bool = True  # the automaton decides what may follow, and when the answer ends
    deadline: float | None = None  # time.monotonic() after which nobody waits for the answer
    tails: Callable[[list[int]], Sequence[Tail]] | None = None  # of an answer's tokens: what to score behind it
    heard: Callable[[list[int]], None] | None = None  # is called with an answer's tokens so far, as they come


class Told(NamedTuple):
    """An answer: its tokens (the stop token among them, if it was drawn), the automaton's state at its end, and the tails that were to be
    scored, each with the logprobs of its tokens."""

    tokens: list[int]
    state: int
    tails: list[tuple[Tail, np.ndarray]]


@dataclass
class _Request:
    ask: Ask
    future: Future
    arrived: float
    told: list[Told | None] = field(default_factory=list)
    heard: int = 0

    def gone(self) -> bool:
        """Nobody waits for it any more; says so to those who did until now."""
        late = self.ask.deadline is not None and time.monotonic() > self.ask.deadline
        if late and not self.future.done():
            _resolve(self.future, TimeoutError("the deadline passed before the answer was complete"))
        return self.future.done()


@dataclass
class Counts:
    """What the engine has done; read by /metrics and by benchmarks."""

    answers: int = 0
    tokens: int = 0
    prefills: int = 0
    steps: int = 0  # calls of the decoding program
    failures: int = 0  # calls that raised
    busy: int = 0  # rows now
    waiting: int = 0  # requests now


class Engine:
    """`rows` answers at a time on each of the devices that share the batch; at most `queue` requests wait. `steps` tokens between two
    looks at what has changed. `law` has the automaton and R."""

    def __init__(
        self, setup: Setup, weights: dict, law: Law, prompt_tokens: int, patches: int, rows: int = 8, queue: int = 64, steps: int = 8
    ):
        self.mesh, self.model, self.weights, self.law = setup.mesh, setup.model, weights, law
        self.prompt_tokens, self.patches, self.queue = prompt_tokens, patches, queue
        self.shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.rows = rows * self.shards
        self.counts = Counts()
        text, dtype = self.model.config.text, jnp.dtype(self.model.config.compute_dtype)
        make = lambda law: vacant(text, law, self.rows, prompt_tokens, self.shards, dtype)  # noqa: E731
        with jax.set_mesh(self.mesh):
            place = shardings(jax.eval_shape(make, law), self.mesh)
            self._vacant = jax.jit(make, out_shardings=place)
            self._join = jax.jit(partial(join, self.model), out_shardings=place, donate_argnums=2)
            self._advance = jax.jit(partial(advance, self.model, steps=steps), out_shardings=place, donate_argnums=2)
            self._closings = jax.jit(partial(closings, self.model))
        self._held: list[tuple[_Request, int] | None] = [None] * self.rows  # by row: whose answer, and which of it
        self._waiting: deque[_Request] = deque()
        self._asked = self._no_asked()
        self._changed = threading.Condition()
        self._open, self._draining = True, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- what other threads call ---------------------------------------------------------------------------------------------------

    def submit(self, ask: Ask, wait: bool = False) -> "Future[list[Told]]":
        """The answers, when they come; cancelling the future frees their rows. Raises Full (with `wait`, waits instead) and Stopped."""
        if not 1 <= ask.samples <= self.rows // self.shards:
            raise ValueError(f"{ask.samples} samples: this server takes 1 to {self.rows // self.shards} (--rows)")
        request = _Request(ask, Future(), time.monotonic())
        request.told = [None] * ask.samples
        with self._changed:
            while wait and self._open and len(self._waiting) >= self.queue:
                self._changed.wait()
            if not self._open:
                raise Stopped("the server is shutting down")
            if len(self._waiting) >= self.queue:
                raise Full(f"{self.queue} requests are waiting already")
            self._waiting.append(request)
            self.counts.waiting = len(self._waiting)
            self._changed.notify_all()
        return request.future

    def stop(self, drain: bool = True) -> None:
        """Takes nothing more; with `drain` what was taken is finished first, else given up. Returns when the thread has ended."""
        with self._changed:
            self._open, self._draining = False, drain
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop(drain=False)

    # --- the thread ------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with jax.set_mesh(self.mesh):
            batch = None
            while self._wait_for_work():
                try:
                    batch = self._round(self._vacant(self.law) if batch is None else batch)
                except Exception as error:  # a program failed, and what it held is lost: those who wait are told, and the next begin anew
                    self.counts.failures += 1
                    batch = None
                    for request in self._everyone(waiting=False):
                        _resolve(request.future, error)
                    self._held = [None] * self.rows
            for request in self._everyone():
                _resolve(request.future, Stopped("the server is shutting down"))

    def _wait_for_work(self) -> bool:
        """Whether there is something to do; False at the end."""
        with self._changed:
            while self._open and not self._waiting and not any(self._held):
                self._changed.wait()
            return self._open or (self._draining and bool(self._waiting or any(self._held)))

    def _everyone(self, waiting: bool = True) -> list[_Request]:
        running = {id(held[0]): held[0] for held in self._held if held}
        return [*running.values(), *(self._waiting if waiting else ())]

    def _round(self, batch):
        drop_N = np.zeros(self.rows, bool)
        for n, held in enumerate(self._held):
            if held and held[0].gone():
                drop_N[n], self._held[n] = True, None
        while joining := self._next(drop_N):
            batch = self._let_in(batch, joining)
        batch = self._advance(self.weights, self.law, batch, drop_N)
        self.counts.steps += 1
        running = batch.running
        tokens, busy, length, state = (
            np.asarray(x) for x in (running.tokens_WB, running.schedule.busy_NS, running.schedule.offset_NS, running.state_NS)
        )
        tokens_NR = tokens.reshape(self.rows, -1)
        ended = [n for n, held in enumerate(self._held) if held and not busy[n, 0]]
        for n, held in enumerate(self._held):
            if held and held[0].ask.heard and held[1] == 0:
                _called(held[0], held[0].ask.heard, tokens_NR[n, : length[n, 0]].tolist())
        told = {n: Told(tokens_NR[n, : length[n, 0]].tolist(), int(state[n, 0]), []) for n in ended}
        for n, tails in self._score(batch, told):
            told[n] = told[n]._replace(tails=tails)
        for n, answer in told.items():
            request, sample = self._held[n]
            request.told[sample], self._held[n] = answer, None
            self.counts.answers, self.counts.tokens = self.counts.answers + 1, self.counts.tokens + len(answer.tokens)
            if all(request.told):
                _resolve(request.future, request.told)
        self.counts.busy = sum(held is not None for held in self._held)
        return batch

    def _next(self, drop_N: np.ndarray) -> dict[int, tuple[_Request, list[int]]]:
        """By shard, who comes in now and the rows that he gets: those who wait longest first, while they fit. Rows `drop_N` are free only
        when `advance` has freed them."""
        free = [n for n, held in enumerate(self._held) if held is None and not drop_N[n]]
        by_shard = [[n for n in free if n * self.shards // self.rows == w] for w in range(self.shards)]
        joining: dict[int, tuple[_Request, list[int]]] = {}
        with self._changed:
            while self._waiting and len(joining) < self.shards:
                request = self._waiting[0]
                open_shards = [w for w in range(self.shards) if w not in joining and len(by_shard[w]) >= request.ask.samples]
                if not request.gone() and not open_shards:
                    break
                self._waiting.popleft()
                if not request.future.done():
                    shard = max(open_shards, key=lambda w: len(by_shard[w]))
                    joining[shard] = request, by_shard[shard][: request.ask.samples]
            self.counts.waiting = len(self._waiting)
            self._changed.notify_all()
        return joining

    def _let_in(self, batch, joining: dict[int, tuple[_Request, list[int]]]):
        some = next(iter(joining.values()))[0].ask.prompt
        prompts = [joining[w][0].ask.prompt if w in joining else some for w in range(self.shards)]
        joins_N = np.zeros(self.rows, bool)
        for request, rows in joining.values():
            ask = request.ask
            for sample, n in enumerate(rows):
                self._held[n], joins_N[n] = (request, sample), True
                values = (ask.start, ask.outcome_J, ask.bound, self.law.limit - ask.limit, ask.temperature, ask.seed, sample)
                for array, value in zip(jax.tree.leaves(self._asked), values, strict=True):
                    array[n] = value
        self.counts.prefills += len(joining)
        placed = place_rows((jax.tree.map(lambda *x: np.concatenate(x), *prompts), self._asked, joins_N), self.mesh)
        return self._join(self.weights, self.law, batch, *placed)

    def _score(self, batch, told: dict[int, Told]):
        """(row, its answer's tails with their logprobs), for the answers that have any; one of each shard at a time."""
        requests = {n: self._held[n][0] for n in told}
        asked = {n: tails for n, r in requests.items() if r.ask.tails and (tails := _called(r, r.ask.tails, told[n].tokens))}
        per_shard = self.rows // self.shards
        while asked:
            now = {n // per_shard: n for n in reversed(asked)}  # one of each shard
            B, U = (
                _up(most, step)
                for most, step in (
                    (max(len(asked[n]) for n in now.values()), TAILS),
                    (max(len(tail.tokens) for n in now.values() for tail in asked[n]), TAIL_TOKENS),
                )
            )
            tokens_WBU, branch_WB = np.zeros((self.shards, B, U + 1), np.int32), np.ones((self.shards, B), np.int32)
            for w, n in now.items():
                prompt = self._held[n][0].ask.prompt
                last = int(prompt.tokens_PT[0, prompt.length_P[0] - 1])
                for b, tail in enumerate(asked[n]):
                    before = told[n].tokens[tail.branch - 1] if tail.branch else last
                    tokens_WBU[w, b, : len(tail.tokens) + 1], branch_WB[w, b] = [before, *tail.tokens], tail.branch
            row_W = np.array([now.get(w, w * per_shard) % per_shard for w in range(self.shards)], np.int32)
            placed = place_rows((row_W, Tails(tokens_WBU, branch_WB)), self.mesh)
            logp_WBU = np.asarray(self._closings(self.weights, self.law, batch, *placed))
            for w, n in now.items():
                yield n, [(tail, logp_U[: len(tail.tokens)]) for tail, logp_U in zip(asked.pop(n), logp_WBU[w], strict=False)]

    def _no_asked(self) -> Asked:
        J = self.law.automaton.distance_AJ.shape[1]
        types = (np.int32, (np.bool, J), np.bool, np.int32, np.float32, np.uint32, np.int32)
        return Asked(*(np.zeros((self.rows, *shape), t) for t, *shape in (t if isinstance(t, tuple) else (t,) for t in types)))


def _called(request: _Request, function: Callable, tokens: list[int]) -> Any:
    """What a function of the asker's says; where it raises, the asker hears of it, and nobody else."""
    try:
        return function(tokens)
    except Exception as error:
        _resolve(request.future, error)
        return None


def _resolve(future: Future, result: Any) -> None:
    """Its result or its error; nothing where it was cancelled."""
    try:
        future.set_exception(result) if isinstance(result, BaseException) else future.set_result(result)
    except InvalidStateError:
        pass


def _up(number: int, step: int) -> int:
    while step < number:
        step *= 2
    return step
