"""AdaptiveLM: adapt to each prompt, answer, forget."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ephemera.adapt import Trace, adapt
from ephemera.adaptation import FELL_BACK, UNCHANGED, Adaptation
from ephemera.backbone import Backbone
from ephemera.depth import Lower
from ephemera.encoding import encode_answer, encode_prompt
from ephemera.errors import unknown
from ephemera.generator import load_init, lora_of, place_init, targets_of
from ephemera.inits import Init, ZeroInit
from ephemera.load import load_backbone
from ephemera.lora import LoraBatch
from ephemera.made_for import Format, Reach, checked_reach
from ephemera.objective import batch_tokens, length_batches, pad
from ephemera.prefill import prefill, whole_reading
from ephemera.rates import Rate, adapted_by, default_rate, default_steps, load_rate, place_rate

BATCH_SIZE = 16  # rows that adapt together

RateLike = Rate | str | Path | float | None
InitLike = Init | str | Path | None


class AdaptiveLM:
    """A frozen language model that adapts to each prompt before it answers.

    Safe to call from several threads: calls wait for each other, and no adapter outlives its call.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        init: InitLike = None,
        rate: RateLike = None,
        chat: bool = False,
        truncate: Literal["left"] | None = None,
        stop_below: float | None = None,
        reach: Reach | None = None,
    ):
        """`reach`: where adapters act; default: as the rate was trained for, else on every token (`from_pretrained`)."""
        self.backbone = backbone
        self.reach: Reach | None = None if reach is None else checked_reach(reach)
        self.init = self._init(init)
        self.rate = self._rate(rate)
        self.chat = chat
        self.truncate = truncate
        self.stop_below = stop_below

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        init: InitLike = None,
        rate: RateLike = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        lora: dict[str, Any] | None = None,
        chat: bool = False,
        truncate: Literal["left"] | None = None,
        stop_below: float | None = None,
        reach: Reach | None = None,
        checkpoint: bool = False,
        **kwargs: Any,
    ) -> AdaptiveLM:
        """Load a model.

        `name`: a hub id, a local folder, a GGUF file, or `smollm2-135m-instruct` (from the package index). `init`:
        where adapters start: an init object, "zero" (the default), a generator's folder or shipped name, or the
        folder of a PEFT adapter. `rate`: a rate object, a folder, a shipped name (`scalenet-nq-open`), a preset
        ("full", "fast"), a number, or "none" for the plain model. By default the network that ships for the model and
        the prompts' format, if there is one and neither `init` nor `lora` is given. `reach`: "answer" lets adapters
        act from the last prompt token on, "all" on every token; by default as the rate was trained for. `dtype`: "float32" (default on CPU) or "bfloat16" (default on CUDA). `lora`: any
        of `r`, `lora_alpha`, `init_std`, `target_modules`, `layers`; what is adapted is by default what init or rate
        was trained for. `chat`: put prompts in the model's chat template. `truncate="left"`: cut prompts longer
        than the model's window instead of refusing them. `stop_below`: a prompt takes no further step once all of its rates
        are below this share of the rate's base rate. `checkpoint`: steps keep each layer's input alone and run the layer
        again in the backward pass: less memory, more time, the same adapters. Further keywords go to transformers.
        ValueError names what
        is wrong and what is allowed.
        """
        settings = dict(lora or {})
        allowed = ["r", "lora_alpha", "init_std", "target_modules", "layers"]
        for key in settings:
            if key not in allowed:
                raise unknown("lora setting", key, allowed)
        adapted = {key: settings.pop(key) for key in ("target_modules", "layers") if key in settings}
        if init is not None and init != "zero" and settings:
            raise ValueError(f"lora={settings} sets the zero init's values, but init={init!r} replaces it; give one.")
        if init is None or isinstance(init, str | Path):
            init = load_init(init or "zero", **settings)
        if rate is None and isinstance(init, ZeroInit) and not lora:
            rate = default_rate(name, "chat" if chat else "plain")
        elif isinstance(rate, str | Path | float | int):
            rate = None if rate == "none" else load_rate(rate)
        brought = targets_of(init)
        if brought is not None:
            adapted["target_modules"] = brought
        backbone = load_backbone(
            name, dtype=dtype, device=device, checkpoint=checkpoint, **(adapted or adapted_by(rate)), **kwargs
        )
        return cls(backbone, init=init, rate=rate, chat=chat, truncate=truncate, stop_below=stop_below, reach=reach)

    @property
    def format(self) -> Format:
        return "chat" if self.chat else "plain"

    @property
    def path(self) -> Path:
        """Local folder (or GGUF file) of the backbone."""
        return self.backbone.path

    def encode(self, prompt: str, *, reserve: int = 0) -> list[int]:
        """Token ids of a prompt; `reserve` places of the model's window stay free after it."""
        if not prompt.strip():
            raise ValueError("the prompt is empty; give some text to adapt to and answer.")
        ids = encode_prompt(self.backbone.tokenizer, prompt, chat=self.chat)
        room = self.backbone.max_length - reserve
        if room < 1:
            raise ValueError(
                f"an answer of {reserve} tokens leaves no room for a prompt: {self.backbone.name}'s window is "
                f"{self.backbone.max_length}. Ask for fewer new tokens (max_new_tokens), or a shorter answer."
            )
        if len(ids) > room:
            if self.truncate != "left":
                raise ValueError(
                    f"the prompt has {len(ids)} tokens; {self.backbone.name} takes {room}"
                    + (f" (its window of {self.backbone.max_length} less {reserve} for the answer)" if reserve else "")
                    + '. Shorten it, or cut its beginning with truncate="left" (--truncate left).'
                )
            ids = ids[-room:]
        return ids

    def adapt(
        self,
        prompts: Sequence[str] | str,
        *,
        steps: int | None = None,
        rate: RateLike = None,
        init: InitLike = None,
        seed: int = 0,
        stop_below: float | None = None,
    ) -> Adaptation:
        """Adapt to each prompt alone: `steps` gradient steps on its own NLL. Rows never touch each other.

        `steps`: by default those that the rate was validated at; none without a rate.
        `stop_below` (default: the model's own setting): a prompt takes no further step once all of its rates are below
        this share of the base rate; `Adaptation.steps_B` tells how many it took.
        """
        return self._adapt(_texts(prompts), steps=steps, rate=rate, init=init, seed=seed, stop_below=stop_below)[0]

    def _adapt(
        self,
        prompts: tuple[str, ...],
        *,
        steps: int | None,
        rate: RateLike,
        init: InitLike,
        seed: int,
        stop_below: float | None = None,
    ) -> tuple[Adaptation, dict[tuple[int, ...], Lower]]:
        """Besides the adaptation, by batch, the layers that no adapter touches: a prefill need not run them again."""
        start_from = self.init if init is None else self._init(init)
        rule = self._rate(rate) if rate is not None else self.rate
        steps = default_steps(rule) if steps is None else steps
        if steps < 0:
            raise ValueError(f"steps is {steps}; it must be 0 or more.")
        if steps and rule is None:
            raise ValueError(
                "steps without a rate: give rate= a number, a folder or a shipped name (`ephemera models`)."
            )
        if rule is not None and rule.max_steps is not None and steps > rule.max_steps:
            raise ValueError(f"steps is {steps}, but this rate was trained for at most {rule.max_steps} (Kmax).")
        stop_below = self.stop_below if stop_below is None else stop_below
        reach: Reach = self.reach or ("all" if rule is None else rule.reach)
        zero = isinstance(start_from, ZeroInit)
        start = time.perf_counter()
        ids = [self.encode(p) for p in prompts]
        traces: list[Trace] = []
        lowers: dict[tuple[int, ...], Lower] = {}
        readings: dict[tuple[int, ...], Lower] = {}
        batches = self._batches(ids)
        with self.backbone.lock:
            for rows in batches:
                batch = pad([ids[i] for i in rows], pad_id=self.backbone.pad_id).to(self.backbone.device)
                lora = start_from(self.backbone, batch, [seed] * len(rows))
                keeps = reach == "answer" and zero  # from another start the first pass is not the base model's
                trace = adapt(self.backbone, batch, lora, rule, steps, stop_below=stop_below, keep_reading=keeps)
                traces.append(trace)
                if reach == "answer":
                    readings[tuple(rows)] = whole_reading(self.backbone, batch, trace.reading or trace.lower)
                elif trace.lower is not None:
                    lowers[tuple(rows)] = trace.lower
        order = torch.tensor([i for rows in batches for i in rows])
        back = order.argsort()
        fallback_B = torch.cat([t.fallback_B for t in traces]).cpu()[back]

        def said(note: str) -> str:
            return note.replace("unadapted", "from its start") if lora_of(start_from) else note

        other = self.beyond(rule) if steps else None

        adaptation = Adaptation(
            prompts=prompts,
            lora=LoraBatch.cat([t.lora for t in traces]).rows(back),
            initial_lora=LoraBatch.cat([t.initial_lora for t in traces]).rows(back),
            prompt_nll_BK=torch.cat([t.prompt_nll_BK for t in traces]).cpu()[back],
            rates_BKM=torch.cat([t.rates_BKM.detach() for t in traces]).cpu()[back],
            notes=tuple(
                said(FELL_BACK) if fell else said(UNCHANGED) if len(i) < 2 and steps else other
                for fell, i in zip(fallback_B.tolist(), ids, strict=True)
            ),
            seconds=time.perf_counter() - start,
            steps_B=torch.cat([t.steps_B for t in traces]).cpu()[back],
            base_model=str(self.backbone.path),
            reach=reach,
            readings=readings,
        )
        return adaptation, lowers

    def beyond(self, rule: Rate | None) -> str | None:
        """A sentence if a network is used outside what it was made for: another format, or another reach."""
        made = None if rule is None else rule.made_for
        if made is None or (made.format == self.format and self.reach in (None, made.reach)):
            return None
        return made.words

    def answer_nll(
        self, prompts: Sequence[str] | str, answers: Sequence[str] | str, adaptation: Adaptation | None = None
    ) -> Tensor:
        """Mean NLL [B] in nats over each row's answer tokens, no end token, under its adapter (or none)."""
        prompts, answers = _texts(prompts), _texts(answers)
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; give one answer per prompt.")
        ids = [self.encode_answer(p, a) for p, a in zip(prompts, answers, strict=True)]
        out = torch.zeros(len(prompts))
        with self.backbone.lock:
            for rows, read in self._prefills(prompts, adaptation, reserve=[len(i) for i in ids]):
                out[rows] = read.answer_nll([ids[i] for i in rows]).float().cpu()
        return out

    def generate(
        self,
        prompts: Sequence[str] | str,
        *,
        steps: int | None = None,
        adaptation: Adaptation | None = None,
        rate: RateLike = None,
        seed: int = 0,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> list[str]:
        """Adapt, answer, forget: the new text of each prompt.

        `steps`: by default those that the rate was validated at; none without a rate. Greedy unless `do_sample=True`; further keywords go to transformers' `generate`. With
        `adaptation`, its adapters are used and no step is taken.
        """
        prompts = _texts(prompts)
        for prompt in prompts:  # before any step is taken: is there room for an answer?
            self.encode(prompt, reserve=max_new_tokens)
        lowers: dict[tuple[int, ...], Lower] = {}
        if adaptation is None:
            adaptation, lowers = self._adapt(prompts, steps=steps, rate=rate, init=None, seed=seed)
        elif steps is not None:
            raise ValueError("give steps or adaptation, not both: an adaptation has already taken its steps.")
        repeats = kwargs.get("num_return_sequences") or 1
        texts = [""] * (len(prompts) * repeats)
        with self.backbone.lock:
            for rows, read in self._prefills(prompts, adaptation, [max_new_tokens] * len(prompts), lowers):
                ids = read.generate(max_new_tokens=max_new_tokens, **kwargs)
                new = self.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)
                for place, i in enumerate(rows):
                    texts[i * repeats : (i + 1) * repeats] = new[place * repeats : (place + 1) * repeats]
        return texts

    def encode_answer(self, prompt: str, answer: str) -> list[int]:
        """Token ids of an answer as it continues a prompt."""
        if not answer.strip():
            raise ValueError(f"the answer to {prompt[-40:]!r} is empty; there is nothing to score.")
        return encode_answer(self.backbone.tokenizer, prompt, answer, chat=self.chat)

    def _prefills(
        self,
        prompts: Sequence[str],
        adaptation: Adaptation | None,
        reserve: Sequence[int],
        lowers: Mapping[tuple[int, ...], Lower] | None = None,
    ):
        """(row indices, Prefill) of all prompts, in batches of similar length."""
        if adaptation is not None and adaptation.prompts != tuple(prompts):
            raise ValueError(
                "the adaptation was made for other prompts; pass the same prompts, in the same order "
                f"(it holds {len(adaptation.prompts)}, given were {len(prompts)})."
            )
        ids = [self.encode(p, reserve=room) for p, room in zip(prompts, reserve, strict=True)]
        for rows in self._batches(ids):
            batch = pad([ids[i] for i in rows], pad_id=self.backbone.pad_id).to(self.backbone.device)
            lora = adaptation.lora.rows(rows) if adaptation is not None else None
            initial = adaptation.initial_lora.rows(rows) if adaptation is not None else None
            lower = (lowers or {}).get(tuple(rows))
            if lower is not None and not torch.equal(lower.ids_BT, batch.ids_BT):
                lower = None  # an answer's room has cut a prompt since
            if adaptation is None or adaptation.reach == "all":
                yield rows, prefill(self.backbone, batch, lora, initial, lower=lower)
                continue
            reading = adaptation.readings.get(tuple(rows))
            if reading is not None and not torch.equal(reading.ids_BT, batch.ids_BT):
                reading = None
            yield rows, prefill(self.backbone, batch, lora, initial, reach="answer", reading=reading)

    def _batches(self, ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Row indices of batches of similar length, as large as this device likes them."""
        max_tokens = batch_tokens(self.backbone.device)
        return length_batches([len(i) for i in ids], batch_size=BATCH_SIZE, max_tokens=max_tokens)

    def _init(self, init: InitLike) -> Init:
        made = load_init(init) if isinstance(init, str | Path) else init or ZeroInit()
        return place_init(made, self.backbone)

    def _rate(self, rate: RateLike) -> Rate | None:
        if rate == "none":
            return None
        rule = load_rate(rate) if isinstance(rate, str | Path | float | int) else rate
        return None if rule is None else place_rate(rule, self.backbone)


def _texts(texts: Sequence[str] | str) -> tuple[str, ...]:
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    if not texts:
        raise ValueError("no prompts: give at least one.")
    return texts
