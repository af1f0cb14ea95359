"""A guard behind HTTP: the policy of a request, and verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from starlette.requests import Request

from pgjax.data.rows import conversation
from pgjax.serving.desk import Desk, Serving
from pgjax.serving.engine import Ask
from pgjax.serving.guard import Case, Guard, How, Policy
from pgjax.serving.requests import Options, Said


class Judged(NamedTuple):
    ask: Ask
    case: Case
    verdict: dict


@dataclass
class Service(Desk):
    """ValueError where the server's own policy or number of samples does not fit the model. A call of /v1/moderations takes no more texts
    than the engine's queue holds, whatever the limits say."""

    model: Guard
    serving: Serving

    def __post_init__(self) -> None:
        engine, how, limits = self.model.engine, self.serving.how, self.serving.limits
        if how.samples > (most := engine.rows // engine.shards):
            raise ValueError(f"{how.samples} samples do not fit in {most} rows; give fewer --samples, or more --rows")
        self.serving = replace(self.serving, limits=replace(limits, inputs=min(limits.inputs, engine.queue)))
        super().__post_init__()

    def hello(self) -> Ask:
        return self.model.ask(conversation("Hello.", None, None), self.policy(None, ()), self.serving.how)[0]

    def policy(self, own: str | None, categories: Sequence[str]) -> Policy:
        """The request's policy, or the server's. ValueError for what cannot be one."""
        if own is None:
            own, categories = self.serving.own, categories or self.serving.categories
        return self.model.policy(tuple(categories), own)

    async def verdicts(self, request: Request, said: Sequence[Said], options: Options, how: How, deadline: float) -> list[Judged]:
        """A verdict for each conversation; they wait side by side."""
        own, how = options.own(self.serving.limits), replace(how, deadline=deadline)
        async with self.until(deadline):
            policy = await self.thread(partial(self.policy, own, options.categories))
            asked = []
            for one in said:
                images = await self.images(one.urls)
                example = await self.thread(partial(one.example, images))
                asked.append((example, *await self.thread(partial(self.model.ask, example, policy, how), images)))
            futures = self.submit([ask for _, ask, _ in asked])
            await self.answers(request, futures)
            judged = []
            for (example, ask, nodes), future in zip(asked, futures, strict=True):
                case = Case(example, policy, how, nodes, future)
                judged.append(Judged(ask, case, await self.texts.run(self.model.verdict, case)))
        for _, _, verdict in judged:
            self.metrics.judged(request.url.path, verdict)
        return judged
