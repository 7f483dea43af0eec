"""The command that talks: each turn adapts to the whole conversation so far."""

from __future__ import annotations

import queue
import sys
from typing import Annotated, Any

import typer

from ephemera.cli.options import (
    Device,
    Dtype,
    InitOption,
    Model,
    Quantization,
    RateOption,
    ReachOption,
    Seed,
    Steps,
    app,
    quiet,
    say_quantised,
    standard_input,
    unshipped,
)
from ephemera.downloads import DEFAULT_MODEL
from ephemera.files import MARK
from ephemera.messages import check_unicode

HELP = "/base: the last question again, unadapted  /steps N  /why: losses and rates of the last answer  /quit"


@app.command(
    epilog="""Examples:

    ephemera chat

    ephemera chat --steps 1 --rate 0.05

    echo "Who wrote Hamlet?" | ephemera chat --max-tokens 40"""
)
def chat(
    model: Model = DEFAULT_MODEL,
    steps: Steps = None,
    rate: RateOption = None,
    init: InitOption = "zero",
    reach: ReachOption = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Seed = 0,
    dtype: Dtype = None,
    quantization: Quantization = "none",
    device: Device = None,
) -> None:
    """Talk to the model; before each answer it adapts to the conversation. Answers on stdout, the rest on stderr."""
    if system is not None:
        check_unicode(system, "--system")
    from ephemera.llm.tokenize import encode_prompt
    from ephemera.model import AdaptiveLM
    from ephemera.serving.engine.methods import BASE, Method
    from ephemera.serving.engine.scheduler import Engine
    from ephemera.serving.engine.threads import in_passing_thread

    quiet()
    options: dict[str, Any] = {"init": init, "rate": rate, "reach": reach, "dtype": dtype, "device": device}
    options["quantization"] = quantization
    lm = in_passing_thread(lambda: AdaptiveLM.from_pretrained(model, chat=True, **options))
    say_quantised(lm.backbone)
    if system and lm.backbone.tokenizer.chat_template:
        encode_prompt(lm.backbone.tokenizer, "a", chat=True, system=system)  # a refusal is known before anybody types
    most = 0 if lm.rate is None else lm.rate.max_steps or 1000
    adapted = Method(model, "adapted", lm.init, lm.rate, most, lm.reach)
    unasked = None if lm.unasked is None else Method(model, "adapted", lm.unasked, None, 0, lm.reach)
    base = Method(model, BASE, None, None, 0)
    if lm.rate is None and rate is None and init == "zero" and steps != 0:
        _say(unshipped(model, "chat", "answers are the model's own"))
    engine = Engine(lm.backbone).start()
    talk = _Talk(
        engine, adapted, unasked, base, max_tokens=max_tokens, temperature=temperature, seed=seed, system=system
    )
    if steps is not None or unasked is None:
        talk.set_steps(str(adapted.steps(None) if steps is None else steps))
    _say(HELP)
    try:
        for line in _lines():
            if line == "/quit":
                break
            try:
                talk.turn(line)
            except ValueError as error:
                _say(f"{error}")
    finally:
        engine.close(10)


class _Talk:
    """The conversation, and what the last answer left."""

    def __init__(
        self,
        engine: Any,
        adapted: Any,
        unasked: Any,
        base: Any,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        system: str | None,
    ):
        self.engine, self.adapted, self.base = engine, adapted, base
        self.method = unasked or adapted  # until steps are asked for
        self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
        self.messages = [{"role": "system", "content": system}] if system else []
        self.steps = 0
        self.facts: dict[str, Any] | None = None

    def turn(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "/steps":
            self.set_steps(rest.strip())
        elif word == "/why":
            self.why()
        elif word == "/base":
            self.again()
        elif word == "/help":
            _say(HELP)
        elif word.startswith("/"):
            raise ValueError(f"no command {word}. {HELP}")
        else:
            asked = [*self.messages, {"role": "user", "content": line}]
            text, self.facts = self.answer(asked, self.method, self.steps)
            if self.facts.get("note"):
                _say(f"note: {self.facts['note']}")
            self.messages = [*asked, {"role": "assistant", "content": text}]

    def set_steps(self, given: str) -> None:
        if not given.isdigit():
            raise ValueError(f"/steps takes a number from 0 to {self.adapted.max_steps}; got {given!r}.")
        if int(given) > self.adapted.max_steps:
            if self.adapted.rate is None:
                raise ValueError(f"{given} steps need a rate; start with --rate, a number or a network.")
            raise ValueError(f"{given} steps are more than this rate was trained for ({self.adapted.max_steps}).")
        self.steps, self.method = int(given), self.adapted

    def again(self) -> None:
        """The last question by the unadapted model; the conversation stays as it was."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("nothing was asked yet.")
        self.answer(self.messages[:-1], self.base, 0)

    def why(self) -> None:
        if self.facts is None:
            raise ValueError("nothing was answered yet.")
        nll, rates = self.facts["prompt_nll"], self.facts["trace"]["rates"]
        kinds = [p["kind"] for p in self.facts["trace"]["projections"]]
        for k, loss in enumerate(nll, 1):
            shown = f"{loss:.4f}" if loss is not None else "not finite"
            if k > len(rates):
                _say(f"after {len(rates)} step{'s' * (len(rates) != 1)}: prompt NLL {shown}")
                continue
            means = []
            for kind in dict.fromkeys(kinds):
                of_kind = [r for r, other in zip(rates[k - 1], kinds, strict=True) if other == kind]
                known = [r for r in of_kind if r is not None]
                means.append(f"{kind} {min(known):.3g} to {max(known):.3g}" if known else f"{kind} not finite")
            _say(f"step {k}: prompt NLL {shown}, rates {', '.join(means)}")
        _say(
            f"adapted in {self.facts['adapt_seconds']:.2f} s, first token after {self.facts['first_token_seconds']:.2f} s"
        )

    def answer(self, messages: list[dict[str, str]], method: Any, steps: int) -> tuple[str, dict[str, Any]]:
        """Stream an answer to stdout; its text, and how the adaptation went."""
        from ephemera.llm.tokenize import encode_chat
        from ephemera.serving.engine.messages import Adapting, Event, Failed, Finished, Job, Report, Text
        from ephemera.serving.engine.sampling import Sampling

        backbone = self.engine.backbone
        if not backbone.tokenizer.chat_template:
            raise ValueError(f"{backbone.name} has no chat template; use `ephemera answer`.")
        ids = backbone.check_ids(encode_chat(backbone.tokenizer, messages))
        room = backbone.max_length - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, and {backbone.name} takes {backbone.max_length}."
            )
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        sampling = Sampling(temperature=self.temperature, max_tokens=min(self.max_tokens, room), seed=self.seed)
        job = Job(ids, method, steps, events.put, "chat", sampling=sampling, seed=self.seed, trace=True)
        self.engine.submit([job])
        said, facts = "", {}
        try:
            while True:
                event = events.get()
                if isinstance(event, Adapting) and sys.stderr.isatty():
                    print(f"\radapting {event.step}/{event.steps} ", end="", file=sys.stderr, flush=True)
                elif isinstance(event, Text):
                    if not said and steps and sys.stderr.isatty():
                        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
                    said += event.text
                    print(event.text, end="", flush=True)
                elif isinstance(event, Report):
                    facts = event.facts
                elif isinstance(event, Failed):
                    raise ValueError(event.message)
                elif isinstance(event, Finished):
                    print(flush=True)
                    return said, facts
        except KeyboardInterrupt:
            job.cancelled = True
            print(flush=True)
            return said, facts or {}


def _lines():
    """What is typed, or piped: one turn a line, without a prompt sign where nobody types."""
    while True:
        if sys.stdin.isatty():
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                return
        else:
            line = standard_input().readline().removeprefix(MARK)
            if not line:
                return
        if line.strip():
            yield line.strip()


def _say(line: str) -> None:
    print(line, file=sys.stderr)
