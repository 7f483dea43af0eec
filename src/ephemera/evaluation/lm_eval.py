"""lm-evaluation-harness's view of an adaptive model: adapt to a request's context, score its continuations, forget.

Releases of lm-eval up to 0.4.13 find a model by name only once some import has registered it, and import nothing of
others' by themselves. So `python -m ephemera.evaluation.lm_eval` is lm-eval's own command line with `--model ephemera`
known to it; from Python, import this module before `lm_eval.simple_evaluate(model="ephemera", ...)`. Later ones read
the entry points `lm_eval.models` (lm-evaluation-harness pull request 4013), where pyproject.toml names this class.

Adapters see the context alone, never a continuation. Tokens are split as lm-eval's own `HFLM` splits them, so that
with `steps=0` the numbers are that model's.
"""

# pyright: reportMissingImports=false
# (lm-eval is an extra: the type check has to pass without it)
from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jinja2
import torch
from tqdm import tqdm

from ephemera import __version__
from ephemera.evaluation.contexts import Adapters, Contexts, Ids
from ephemera.made_for import Reach
from ephemera.messages import check_unicode, unknown
from ephemera.model import AdaptiveLM
from ephemera.rates import default_steps

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ModuleNotFoundError as missing:
    MISSING = f"no module {missing.name!r}: this needs lm-evaluation-harness, pip install 'ephemera[lm-eval]'"
    if __name__ == "__main__":
        raise SystemExit(f"ephemera: {MISSING}") from None
    raise ModuleNotFoundError(MISSING) from missing

if __name__ == "__main__":  # as the module that the entry point names: two classes of one model would be refused
    from ephemera.evaluation.lm_eval import main as of_the_module

    of_the_module()
    raise SystemExit(0)

MAX_GEN_TOKS = 256  # HFLM's default

K = TypeVar("K")
V = TypeVar("V")

logger = logging.getLogger(__name__)


@register_model("ephemera")
class EphemeraLM(TemplateLM):
    """A model for lm-eval that gives every context its own adapter.

    `pretrained`, `init`, `rate`, `reach`, `dtype` and `device` as in `AdaptiveLM.from_pretrained`; `steps` by default
    what the rate was validated at, 0 without one; `batch_size` contexts adapt together, "auto" for as many as the device likes;
    `max_length` narrows the model's window; `seed` draws the zero init. ValueError names an unknown argument.
    """

    tokenizer: Any

    def __init__(
        self,
        pretrained: str,
        *,
        init: str | None = None,
        rate: str | float | None = None,
        steps: int | None = None,
        reach: Reach | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        seed: int = 0,
        **others: Any,
    ):
        super().__init__()
        for name in others:
            raise unknown("model argument", name, ["pretrained", *(type(self).__init__.__kwdefaults__ or {})])
        seed = _whole("seed", seed)
        together = None if batch_size == "auto" else _whole("batch_size", batch_size, least=1)
        where: dict[str, Any] = {"dtype": dtype, "device": device}
        self.lm = AdaptiveLM.from_pretrained(str(pretrained), init=init, rate=rate, reach=reach, **where)
        steps = _whole("steps", default_steps(self.lm.rate) if steps is None else steps)
        self.backbone, self.tokenizer = self.lm.backbone, self.lm.backbone.tokenizer
        self.max_length = self.backbone.max_length if max_length is None else _whole("max_length", max_length, least=2)
        if self.max_length > self.backbone.max_length:
            raise ValueError(f"max_length is {max_length}; {pretrained}'s window is {self.backbone.max_length}.")
        self.contexts = Contexts(self.lm, steps=steps, seed=seed, batch_size=together, max_length=self.max_length)
        self.settings = {"pretrained": pretrained, "init": init, "rate": rate, "steps": steps, "seed": seed}
        self.settings["reach"] = self.contexts.reach
        self._device = self.backbone.device

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None):
        """From --model_args, and lm-eval's options, which always hold a batch size and a device: the former win."""
        options = {key: value for key, value in (additional_config or {}).items() if value is not None}
        if str(options.get("device")).startswith("cuda") and not torch.cuda.is_available():
            del options["device"]  # the option's default is cuda:0, also where there is none
        if "pretrained" not in arg_dict:
            raise ValueError("which model? Give --model_args pretrained=smollm2-135m-instruct,...")
        return cls(**{**options, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None):
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results; it asks after the evaluation."""
        return {
            "model_num_parameters": self.backbone.model.num_parameters(),
            "model_dtype": str(self.backbone.dtype),
            "ephemera": {"version": __version__, **self.settings, "contexts_fallen_back": self.contexts.fell_back},
        }

    # Tokens, as HFLM makes them

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        def templated(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return templated(chat_history)
        except jinja2.exceptions.TemplateError:
            logger.warning("the chat template refuses this dialogue; trying without its system message")
            try:
                return templated([m for m in chat_history if m["role"] != "system"])
            except jinja2.exceptions.TemplateError as error:
                raise ValueError(
                    f"this model's chat template refuses these messages: {error}. Leave out --apply_chat_template, or "
                    "--fewshot_as_multiturn."
                ) from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; no second BOS where a chat template has written one. ValueError for invalid Unicode."""
        check_unicode(string, f"the text {string[:40]!r}")
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.backbone.check_ids(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's own split (the context's trailing white space goes to the continuation), but neither side empty."""
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:  # its text merged into the context's last token: read it on its own
            spaces = context[len(context.rstrip()) :]
            continuation_ids = self.tok_encode(spaces + continuation, add_special_tokens=False)
        return context_ids or [self.prefix_token_id], continuation_ids

    # Requests

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each (texts, context ids, continuation ids); one adaptation per context."""
        of_context = _grouped((tuple(context), i) for i, (_, context, _) in enumerate(requests))
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self.backbone.lock, _bar(len(requests), "loglikelihood", disable_tqdm) as bar:
            for contexts in self.contexts.batches(list(of_context)):
                adapters = self.contexts.adapt(contexts)
                # A continuation that leaves no room cuts its context from the left, for reading; not for adapting
                cut = _grouped(
                    ((place, min(len(context), self.contexts.room(len(requests[i][2]) - 1))), i)
                    for place, context in enumerate(contexts)
                    for i in of_context[context]
                )
                read = self.contexts.read(adapters, [p for p, _ in cut], [contexts[p][-kept:] for p, kept in cut])
                groups = list(cut.values())
                for turn in range(max(map(len, groups))):  # one continuation of each context at a time
                    rows = [row for row, group in enumerate(groups) if len(group) > turn]
                    chosen = [groups[row][turn] for row in rows]
                    logp, greedy = read.score([requests[i][2] for i in chosen], rows)
                    for i, *answer in zip(chosen, logp.tolist(), greedy.tolist(), strict=True):
                        out[i] = (answer[0], answer[1])
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], out[i])
                    bar.update(len(chosen))
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, as HFLM counts it; ValueError where adapters would come from a context.

        There is none: the text is all answer. The base model's perplexity under this model's name would mislead.
        """
        if self.contexts.steps or self.lm.init.reads_prompts:
            raise ValueError(
                "perplexity of whole texts (loglikelihood_rolling) has no context to adapt to, and adapting to the text "
                "would score a model on what it was trained on. Use steps=0 and no generator for the model's own "
                "perplexity, or a task with contexts."
            )
        windows = [
            (i, make_disjoint_window(window))
            for i, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
        ]
        scored = self._loglikelihood_tokens([(None, *window) for _, window in windows], disable_tqdm=disable_tqdm)
        sums = [0.0] * len(requests)
        for (i, _), (logp, _) in zip(windows, scored, strict=True):
            sums[i] += logp
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """New text of each (context, gen_kwargs), up to a stop string; one adaptation per context."""
        of_context = _grouped(
            (tuple(self.tok_encode(r.args[0])) or (self.prefix_token_id,), i) for i, r in enumerate(requests)
        )
        out = [""] * len(requests)
        with self.backbone.lock, _bar(len(requests), "generate_until", disable_tqdm) as bar:
            for contexts in self.contexts.batches(list(of_context)):
                adapters = self.contexts.adapt(contexts)
                alike = _grouped(
                    (json.dumps(requests[i].args[1], sort_keys=True, default=str), (place, i))
                    for place, context in enumerate(contexts)
                    for i in of_context[context]
                )
                for asked in alike.values():
                    for start in range(0, len(asked), len(contexts)):
                        places, chosen = zip(*asked[start : start + len(contexts)], strict=True)
                        gen_kwargs = requests[chosen[0]].args[1]
                        new = self._generate(adapters, places, [contexts[p] for p in places], gen_kwargs)
                        for i, text in zip(chosen, new, strict=True):
                            out[i] = text
                            self.cache_hook.add_partial("generate_until", requests[i].args, text)
                        bar.update(len(chosen))
        return out

    def _generate(
        self, adapters: Adapters, places: Sequence[int], contexts: Sequence[Ids], gen_kwargs: dict[str, Any]
    ) -> list[str]:
        if "max_length" in gen_kwargs or gen_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError(f"generation settings {gen_kwargs}: give max_gen_toks, no max_length, and one sequence.")
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, MAX_GEN_TOKS))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
        max_new_tokens: int = kwargs.pop("max_gen_toks")
        if not kwargs["do_sample"]:
            kwargs.pop("temperature", None)
        room = self.contexts.room(max_new_tokens)
        read = self.contexts.read(adapters, places, [context[-room:] for context in contexts])
        width = read.batch.ids_BT.shape[1]
        stop = stop_sequences_criteria(self.tokenizer, until, width, len(contexts))
        new = read.generate(max_new_tokens=max_new_tokens, stopping_criteria=stop, **kwargs)
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [postprocess_generated_text(text, until, None) for text in texts]


def _whole(name: str, value: Any, *, least: int = 0) -> int:
    text = str(value)
    if not text.isdigit() or int(text) < least:
        extra = " or auto" if name == "batch_size" else ""
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} up{extra}.")
    return int(text)


def _grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _bar(total: int, what: str, disable: bool) -> tqdm:
    return tqdm(total=total, desc=f"Running {what} requests", disable=disable or None)  # None: on a terminal only


def main() -> None:
    """lm-eval's own command line, with `--model ephemera`; one line on stderr for a user's mistake."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        logger.debug("where it came from", exc_info=True)  # LMEVAL_LOG_LEVEL=DEBUG shows it
        print(f"ephemera: {error}", file=sys.stderr)
        raise SystemExit(2) from None
