"""The engine: one thread that owns a running batch (generate/continuous.py). Requests wait in a bounded queue, take a free row each,
and leave when their answer ends, whatever the others do; none waits for a batch to fill."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.data.schema import PromptBatch
from pgjax.generate.continuous import advance, closings, join, shardings, vacant
from pgjax.generate.law import Law
from pgjax.parallel.mesh import place_rows
from pgjax.serving.forks import Fork, Pack, portions
from pgjax.train.setup import Setup


class Full(Exception):
    """The queue is full: come again later."""


class Stopped(Exception):
    """The engine takes no more requests."""


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
    forks: Callable[[list[int]], Sequence[Fork]] | None = None  # of an answer's tokens: what to score behind it
    heard: Callable[[list[int]], None] | None = None  # is called with an answer's tokens so far, as they come


class Told(NamedTuple):
    """An answer: its tokens (the stop token among them, if it was drawn), the automaton's state at its end, and the logprobs of the tails
    that were to be scored, by the names of fork and tail."""

    tokens: list[int]
    state: int
    scores: dict[str, dict[str, float]]


@dataclass
class _Request:
    ask: Ask
    future: Future
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
        self._asked = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(make, law).asked)
        self._changed = threading.Condition()
        self._open = True
        self.failing = False  # the last round did
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- what other threads call ---------------------------------------------------------------------------------------------------

    def submit(self, ask: Ask, wait: bool = False) -> "Future[list[Told]]":
        """The answers, when they come; cancelling the future frees their rows. Raises Full (with `wait`, waits instead) and Stopped."""
        if not 1 <= ask.samples <= self.rows // self.shards:
            raise ValueError(f"{ask.samples} samples: this server takes 1 to {self.rows // self.shards} (--rows)")
        if not (1 <= ask.limit <= self.law.limit and 0 <= ask.seed < 2**32):
            raise ValueError(f"limit {ask.limit} must be 1 to {self.law.limit}, seed {ask.seed} 0 to 2**32 - 1")
        request = _Request(ask, Future())
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

    def stop(self) -> None:
        """Takes nothing more and gives up what it has. Returns when the thread has ended."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    # --- the thread ------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with jax.set_mesh(self.mesh):
            batch = None
            while self._wait_for_work():
                try:
                    batch = self._round(self._vacant(self.law) if batch is None else batch)
                    self.failing = False
                except Exception as error:  # a program failed, and what it held is lost: those who wait are told, and the next begin anew
                    self.counts.failures += 1
                    batch, self.failing = None, True
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
            return self._open

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
        told = {n: Told(tokens_NR[n, : length[n, 0]].tolist(), int(state[n, 0]), {}) for n in ended}
        for n, fork, tail, logp in self._score(batch, told):
            told[n].scores.setdefault(fork, {})[tail] = logp
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
            self._waiting = deque(request for request in self._waiting if not request.gone())
            while self._waiting and len(joining) < self.shards:
                samples = self._waiting[0].ask.samples
                open_shards = [w for w in range(self.shards) if w not in joining and len(by_shard[w]) >= samples]
                if not open_shards:
                    break
                shard = max(open_shards, key=lambda w: len(by_shard[w]))
                joining[shard] = self._waiting.popleft(), by_shard[shard][:samples]
            self.counts.waiting = len(self._waiting)
            self._changed.notify_all()
        return joining

    def _let_in(self, batch, joining: dict[int, tuple[_Request, list[int]]]):
        some = next(iter(joining.values()))[0].ask.prompt
        prompts = [joining[w][0].ask.prompt if w in joining else some for w in range(self.shards)]
        joins_N = np.zeros(self.rows, bool)
        for request, rows in joining.values():
            for sample, n in enumerate(rows):
                self._held[n], joins_N[n] = (request, sample), True
        for n in np.flatnonzero(joins_N):
            ask, sample = self._held[n][0].ask, self._held[n][1]
            values = (ask.start, ask.outcome_J, ask.bound, self.law.limit - ask.limit, ask.temperature, ask.seed, sample)
            for array, value in zip(jax.tree.leaves(self._asked), values, strict=True):
                array[n] = value
        self.counts.prefills += len(joining)
        placed = place_rows((jax.tree.map(lambda *x: np.concatenate(x), *prompts), self._asked, joins_N), self.mesh)
        return self._join(self.weights, self.law, batch, *placed)

    def _score(self, batch, told: dict[int, Told]) -> Iterator[tuple[int, str, str, float]]:
        """(row, fork, tail, logprob) of all that is to be scored behind these answers; of each shard SLOTS tokens at a time."""
        requests, per_shard = {n: self._held[n][0] for n in told}, self.rows // self.shards
        jobs: list[deque[tuple[int, list[Fork]]]] = [deque() for _ in range(self.shards)]
        for n, request in requests.items():
            if make := request.ask.forks:
                parts = _called(request, lambda tokens, make=make: list(portions(make(tokens))), told[n].tokens)
                jobs[n // per_shard].extend((n, part) for part in parts or ())
        while any(jobs):
            now = {w: queue.popleft() for w, queue in enumerate(jobs) if queue}
            packs = [Pack() for _ in range(self.shards)]
            for w, (n, forks) in now.items():
                prompt = requests[n].ask.prompt
                packs[w].put(forks, told[n].tokens, int(prompt.tokens_PT[0, prompt.length_P[0] - 1]))
            row_W = np.array([now[w][0] % per_shard if w in now else 0 for w in range(self.shards)], np.int32)
            tails = jax.tree.map(lambda *x: np.stack(x), *(pack.tails for pack in packs))
            logp_WQ = np.asarray(self._closings(self.weights, self.law, batch, *place_rows((row_W, tails), self.mesh)))
            for w, (n, _) in now.items():
                for (fork, tail), slots in packs[w].slots.items():
                    yield n, fork, tail, float(logp_WQ[w, slots].astype(np.float64).sum())


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
