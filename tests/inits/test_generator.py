import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from ephemera import artifact
from ephemera.batch import pad
from ephemera.inits import LoraGenerator, PeftInit, ZeroInit, load_generator, load_init
from ephemera.inits.generator import last_state
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.lora import LoraBatch, Projection
from ephemera.made_for import MadeFor
from ephemera.model import AdaptiveLM
from ephemera.rates import FixedRate
from ephemera.scoring import Encoded, prompt_batch
from ephemera.training.generator import GeneratorTrainee, fit_states
from reference import close, merged_model, merged_weights, slow_nll
from tiny_models import SENTENCES, left, random_ids, save_tiny, tiny_backbone, tiny_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = [
    ("llama", "qv"),
    ("llama", "attention"),
    ("llama", LINEAR),
    ("gpt_neox", "qv"),
    ("gpt_neox", ["query_key_value"]),
    ("gemma3", "qv"),
]
PROMPTS = list(SENTENCES[:3])


def fresh(backbone: FrozenLM, **settings: Any) -> LoraGenerator:
    torch.manual_seed(7)
    values: dict[str, Any] = {"hidden_size": 12, "r": 2, "lora_alpha": 5.0, **settings}
    return LoraGenerator(projections=backbone.projections, state_size=backbone.hidden_size, **values).to(backbone.dtype)


def random_generator(backbone: FrozenLM, **settings: Any) -> LoraGenerator:
    """No weight is zero, no mean is 0 and no deviation is 1."""
    return randomised(fresh(backbone, **settings))


def randomised(generator: LoraGenerator) -> LoraGenerator:
    with torch.no_grad():
        for weight in generator.parameters():
            weight.normal_(0, 0.3)
        generator.mean_H.normal_(0, 0.3)
        generator.std_H.uniform_(0.5, 2)
    return generator


def encoded(prompts: list[int], answers: list[int], *, seed: int = 4) -> list[Encoded]:
    pairs = zip(random_ids(prompts, seed=seed), random_ids(answers, seed=seed + 1), strict=True)
    return [Encoded(str(i), prompt, answer) for i, (prompt, answer) in enumerate(pairs)]


# --- TaskWeaver Eq. 1-3 in a loop ---


def slow_linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = torch.stack([(row * x).sum() for row in state[f"{name}.weight"]])
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def slow_adapter(generator: LoraGenerator, projections: tuple[Projection, ...], place: int, h_H: Tensor):
    """(A [R,I], B [O,R]) of one projection and one row."""
    state = {**dict(generator.named_parameters()), **dict(generator.named_buffers())}
    kinds: list[tuple[str, int, int]] = []
    for p in projections:
        if (p.kind, p.in_features, p.out_features) not in kinds:
            kinds.append((p.kind, p.in_features, p.out_features))
    p = projections[place]
    m = kinds.index((p.kind, p.in_features, p.out_features))
    x = ((h_H.to(state["mean_H"]) - state["mean_H"]) / state["std_H"]).clamp(-5, 5)
    made = []
    for k, matrix in enumerate("AB"):
        c = slow_linear(state, "proj", x)
        c = c + state["layer.weight"][p.layer] + state["module.weight"][m] + state["matrix.weight"][k]
        inner = slow_linear(state, "first", c)
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        y = slow_linear(state, "second", inner)
        z = (y - y.mean()) / (((y - y.mean()) ** 2).mean() + 1e-5).sqrt()
        z = z * state["norm.weight"] + state["norm.bias"]
        out = slow_linear(state, f"{matrix}_heads.{m}.0", z)
        rows, columns = (generator.r, p.in_features) if matrix == "A" else (p.out_features, generator.r)
        made.append(torch.stack([out[i * columns : (i + 1) * columns] for i in range(rows)]))
    return made[0], made[1]


def slow_lora(generator: LoraGenerator, projections: tuple[Projection, ...], h_BH: Tensor) -> LoraBatch:
    pairs = [[slow_adapter(generator, projections, m, h_H) for m in range(len(projections))] for h_H in h_BH]
    A, B = ([torch.stack([row[m][k] for row in pairs]) for m in range(len(projections))] for k in (0, 1))
    return LoraBatch.of(projections, tuple(A), tuple(B), r=generator.r, lora_alpha=generator.lora_alpha)


def slow_state(backbone: FrozenLM, ids: list[int]) -> Tensor:
    """h [H] of one unpadded prompt."""
    output = backbone.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[-1][0, -1].detach()


@pytest.mark.parametrize(("architecture", "targets"), MODELS)
def test_adapters_equal_the_slow_loop(architecture, targets):
    backbone = tiny_backbone(architecture, target_modules=targets)
    generator = random_generator(backbone)
    prompts = random_ids([7, 3])
    h_BH = torch.stack([slow_state(backbone, ids) for ids in prompts])
    want = slow_lora(generator, backbone.projections, h_BH)
    with torch.no_grad():
        have = generator.lora(backbone.projections, h_BH)
        close(have.tensors, want.tensors)
        whole = generator(backbone, left(prompts), [0, 0])
    assert (whole.r, whole.lora_alpha, whole.projections) == (2, 5.0, backbone.projections)
    close(whole.tensors, want.tensors, 1e-4)  # h is float32
    assert all((t[0] - t[1]).abs().max() > 1e-3 for t in have.tensors)  # prompts differ


def test_kinds_of_some_layers_and_of_two_shapes():
    """Layers without a kind, and layers whose shape differs, keep their own embeddings and heads."""
    spec = [("q", 0, 6, 8), ("v", 0, 6, 4), ("q", 1, 6, 8), ("q", 2, 6, 10), ("v", 2, 6, 4), ("q", 3, 6, 10)]
    projections = tuple(Projection(str(i), *s) for i, s in enumerate(spec))
    generator = LoraGenerator(projections=projections, state_size=6, hidden_size=5, r=3).double()
    randomised(generator)
    assert len(generator.A_heads) == 3
    h_BH = 8 * torch.randn(2, 6, dtype=torch.float64)  # some of it is clamped
    assert ((h_BH - generator.mean_H) / generator.std_H).abs().max() > 5
    close(generator.lora(projections, h_BH).tensors, slow_lora(generator, projections, h_BH).tensors)


def test_normalization_of_training_prompts(llama):
    generator = fresh(llama)
    rows = encoded([5, 9, 3, 12, 7, 4, 8, 6, 10, 5], [1] * 10)
    fit_states(llama, generator, rows)
    states_NH = torch.stack([slow_state(llama, row.prompt) for row in rows])
    close(generator.mean_H, states_NH.mean(0), 1e-5)
    close(generator.std_H, states_NH.std(0), 1e-5)


def test_h_is_finite_where_training_prompts_agreed(llama):
    generator = random_generator(llama)
    generator.fit_normalization(torch.ones(4, llama.hidden_size))
    lora = generator.lora(llama.projections, 2 * torch.ones(1, llama.hidden_size))
    assert all(bool(t.isfinite().all()) for t in lora.tensors)


# --- the start ---


@pytest.mark.parametrize(("architecture", "targets"), MODELS)
def test_starts_as_a_no_op_and_then_moves(architecture, targets):
    backbone = tiny_backbone(architecture, target_modules=targets)
    generator = fresh(backbone, init_std=0.05)
    rows = encoded([7, 4], [2, 3])
    batch = prompt_batch(backbone, rows)
    lora = generator(backbone, batch, [0, 0])
    assert not any(B.any() for B in lora.B)
    kinds = list(dict.fromkeys((p.kind, p.in_features, p.out_features) for p in backbone.projections))
    for p, A_BRI in zip(backbone.projections, lora.A, strict=True):
        head = generator.A_heads[kinds.index((p.kind, p.in_features, p.out_features))]
        assert isinstance(head, torch.nn.Sequential)
        bias = head[-1].get_parameter("bias").view(2, p.in_features)
        assert torch.equal(A_BRI[0], bias)
        assert torch.equal(A_BRI[1], bias)
        assert 0.5 * 0.05 < bias.std() < 2 * 0.05
    with torch.no_grad():
        hidden = backbone.forward(batch, lora).hidden_BTD
        assert torch.equal(backbone.logits(hidden), backbone.logits(backbone.forward(batch).hidden_BTD))
    for b, row in enumerate(rows):
        want = backbone.model(input_ids=torch.tensor([row.prompt])).logits[0]
        close(backbone.logits(hidden[b, -len(row.prompt) :]), want)

    trainee = GeneratorTrainee(backbone, generator, validation={})
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        trainee.backward(rows, 0)
        optimizer.step()
        assert all(B.abs().max() > 1e-5 for B in generator(backbone, batch, [0, 0]).B)
    # By now every head has a weight, and everything behind the heads learns
    trainee.backward(rows, 0)
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    for embedding in (generator.layer, generator.module, generator.matrix):
        assert embedding.weight.grad is not None
        assert (embedding.weight.grad.abs().amax(1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


# --- rows, padding, answers ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_alone_is_the_row_in_a_batch(llama, side):
    generator = random_generator(llama)
    prompts = random_ids([9, 2, 5, 1])
    batch = pad(prompts, side=side)
    # In float64, for float32 would hide a small share of a neighbour or of padding
    states_BH = generator.state_BH(llama, batch)
    lora = generator(llama, batch, [0] * 4)
    for b, ids in enumerate(prompts):
        close(states_BH[b], slow_state(llama, ids), 1e-6)
        alone = generator(llama, left([ids]), [0])
        close(lora.rows([b]).tensors, alone.tensors, 1e-4)


def test_states_are_chosen_by_the_mask():
    hidden = torch.arange(1.0, 9).view(2, 4, 1)  # 1 2 3 4, 5 6 7 8
    for side, want in (("right", [[2], [8]]), ("left", [[4], [8]])):
        assert last_state(hidden, pad([[3, 3], [3, 3, 3, 3]], side=side)).tolist() == want


def test_answers_never_reach_h(llama):
    generator = random_generator(llama)
    trainee = GeneratorTrainee(llama, generator, validation={})
    seen: list[Tensor] = []
    generator.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    prompts = random_ids([6, 9])
    for answers in ([[5, 6], [7]], [[50], [60, 70, 80, 90]]):
        rows = [Encoded("", p, a) for p, a in zip(prompts, answers, strict=True)]
        trainee.backward(rows, 0)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    close(seen[0], torch.stack([slow_state(llama, ids) for ids in prompts]), 1e-6)


# --- gradients ---


@pytest.mark.parametrize(("architecture", "targets"), MODELS)
def test_gradient_is_autograd_through_merged_weights(architecture, targets):
    backbone = tiny_backbone(architecture, target_modules=targets)
    generator = random_generator(backbone)
    rows = encoded([6, 9, 4, 7], [3, 1, 2, 2])  # four, for the mean's 1/4 is exact in float32
    report = GeneratorTrainee(backbone, generator, validation={}).backward(rows, 0)
    have = [p.grad for p in generator.parameters() if p.grad is not None]

    h_BH = generator.state_BH(backbone, prompt_batch(backbone, rows))
    lora = slow_lora(generator, backbone.projections, h_BH)
    nlls = []
    for b, row in enumerate(rows):
        weights = merged_weights(backbone, lora, b)
        nlls.append(slow_nll(backbone.model, row.prompt + row.answer, first=len(row.prompt), weights=weights))
    loss = torch.stack(nlls).mean()
    assert report["nll"] == pytest.approx(loss.item(), abs=1e-9)
    assert (report["K"], report["non_finite"]) == (0, 0)
    close(have, torch.autograd.grad(loss, list(generator.parameters())), 1e-9)
    assert all(p.grad is None for p in backbone.model.parameters())


# --- beside a bfloat16 model ---


def test_in_bfloat16_the_adapters_are_the_same_up_to_its_rounding(llama):
    generator = random_generator(llama, hidden_size=64).float()
    generator.mean_H.mul_(1000)  # a mean that bfloat16 would round by more than the deviation
    h_BH = generator.mean_H + generator.std_H * torch.randn(6, len(generator.mean_H))
    with torch.no_grad():
        want = generator.lora(llama.projections, h_BH).tensors
        have = generator.in_dtype(torch.bfloat16).lora(llama.projections, h_BH).tensors
    for a, b in zip(have, want, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()
        assert (a - a.mean(0)).norm() > 0.2 * a.norm()  # prompts still differ
    assert not all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    again = generator.in_dtype(torch.float32).lora(llama.projections, h_BH).tensors
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    assert all(p.dtype == torch.float32 for p in generator.parameters())  # the one it was made from is as it was


def test_only_inference_beside_a_bfloat16_model_is_in_bfloat16(tmp_path):
    def dtypes(init):
        assert isinstance(init, LoraGenerator)
        return {p.dtype for p in init.parameters()}

    single, half = (tiny_backbone(dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    stored(tmp_path / "single", single)
    stored(tmp_path / "half", half)
    loaded = load_init(tmp_path / "single")
    assert loaded.placed(single) is loaded
    assert dtypes(loaded) == {torch.float32}
    assert dtypes(load_init(tmp_path / "half").placed(half)) == {torch.bfloat16}
    assert dtypes(AdaptiveLM(half, init=tmp_path / "half").init) == {torch.bfloat16}
    learning = random_generator(half).float()
    assert learning.placed(half) is learning
    assert dtypes(learning) == {torch.float32}
    with pytest.raises(ValueError, match="this generator was trained for tiny-llama"):
        load_init(tmp_path / "single").placed(tiny_backbone(dtype=torch.float32, seed=1))
    # A start that computes nothing stays what it is
    assert ZeroInit().placed(half) == ZeroInit()


# --- on disk ---


def stored(folder: Path, backbone: FrozenLM, **settings: Any) -> LoraGenerator:
    generator = random_generator(backbone, trained_for=describe(backbone), **settings).float()
    generator.save_pretrained(folder)
    return generator


def test_a_generator_is_saved_and_loaded(tmp_path):
    backbone = tiny_backbone(dtype=torch.float32, target_modules="attention")
    generator = stored(tmp_path / "a", backbone, target_modules="attention")
    loaded = load_generator(tmp_path / "a")
    assert loaded.config == generator.config
    assert loaded.state_dict().keys() == generator.state_dict().keys()
    assert not any(p.requires_grad for p in loaded.parameters())
    batch = left(random_ids([5, 8]))
    want = generator(backbone, batch, [0, 0]).tensors
    assert all(torch.equal(a, b) for a, b in zip(loaded(backbone, batch, [0, 0]).tensors, want, strict=True))
    loaded.check(backbone)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["generator.json", "generator.safetensors"]

    generator.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    half = load_generator(tmp_path / "b").state_dict()
    for key, value in generator.state_dict().items():
        assert half[key].dtype == torch.float32
        assert ((half[key] - value).abs() <= value.abs() * 2**-8).all()
    sizes = [(tmp_path / name / "generator.safetensors").stat().st_size for name in "ab"]
    assert sizes[1] < 0.75 * sizes[0]
    shutil.move(tmp_path / "a", tmp_path / "c")
    assert isinstance(load_init(str(tmp_path / "c")), LoraGenerator)


def test_what_it_was_made_for(llama, tmp_path):
    """Kept in its file; files from before there was a record are plain, of the tasks in their card."""
    chats = stored(tmp_path / "chat", llama, made_for=MadeFor(("squad",), "chat", "answer", 0), reach="answer")
    again = load_generator(tmp_path / "chat")
    assert (again.made_for, again.format, again.reach) == (chats.made_for, "chat", "answer")
    lm = AdaptiveLM(llama, init=again)
    (note,) = lm.adapt(["The river runs"]).notes
    assert note == "this generator was trained on chat prompts of squad"
    stored(tmp_path / "old", llama)
    written = json.loads((tmp_path / "old" / "generator.json").read_text())
    del written["made_for"]
    (tmp_path / "old" / "generator.json").write_text(json.dumps(written))
    (tmp_path / "old" / "README.md").write_text(
        "# old\n\nTrained on 9 prompts drawn from snli (9 rows), boolq (3 rows).\n"
    )
    old = load_generator(tmp_path / "old")
    assert old.made_for == MadeFor(("snli", "boolq"), steps=0)
    assert AdaptiveLM(llama, init=old).adapt(["The river runs"]).notes == (None,)


def test_corrupt_folders(tmp_path):
    def cut_weights(folder):
        path = folder / "generator.safetensors"
        path.write_bytes(path.read_bytes()[:-8])

    def no_weights(folder):
        (folder / "generator.safetensors").unlink()

    def cut_config(folder):
        path = folder / "generator.json"
        path.write_text(path.read_text()[:-20])

    def no_object(folder):
        (folder / "generator.json").write_text('"generator"')

    def no_projections(folder):
        (folder / "generator.json").write_text('{"state_size": 32}')

    def changed(folder, **values):
        config = json.loads((folder / "generator.json").read_text())
        (folder / "generator.json").write_text(json.dumps({**config, **values}))

    def other_size(folder):
        changed(folder, hidden_size=13)

    def other_key(folder):
        changed(folder, hidden_sizes=12)

    def no_description(folder):
        changed(folder, trained_for={})

    def no_targets(folder):
        changed(folder, target_modules=5)

    def no_alpha(folder):
        changed(folder, lora_alpha="x")

    backbone = tiny_backbone(dtype=torch.float32)
    for spoil in (
        *(cut_weights, no_weights, cut_config, no_object),
        *(no_projections, other_size, other_key),
        *(no_description, no_targets, no_alpha),
    ):
        folder = tmp_path / spoil.__name__
        stored(folder, backbone)
        load_generator(folder)
        spoil(folder)
        with pytest.raises(ValueError, match=rf"the generator in .*{spoil.__name__} is corrupt or incomplete"):
            load_generator(folder)


@pytest.mark.parametrize(("key", "neutral", "gone"), [("source", "last", "ends"), ("head_rank", None, 3)])
def test_settings_that_are_gone_load_at_their_neutral_value_only(key, neutral, gone, tmp_path):
    generator = stored(tmp_path, tiny_backbone(dtype=torch.float32))
    config = json.loads((tmp_path / "generator.json").read_text())
    (tmp_path / "generator.json").write_text(json.dumps({**config, key: neutral}))
    assert load_generator(tmp_path).config == generator.config
    (tmp_path / "generator.json").write_text(json.dumps({**config, key: gone}))
    with pytest.raises(
        ValueError, match=rf"^the generator in .* sets {key} to .*, which this version no longer supports"
    ):
        load_generator(tmp_path)


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "NETWORKS", tmp_path / "networks")
    stored(tmp_path / "networks" / "generator-choice", tiny_backbone(dtype=torch.float32))
    assert isinstance(load_init("generator-choice"), LoraGenerator)
    with pytest.raises(ValueError, match=r"unknown generator 'generator-chioce'. Did you mean 'generator-choice'\?"):
        load_init("generator-chioce")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no generator: generator.json and generator.safetensors are expected"):
        load_init(tmp_path / "empty")
    assert load_init("zero", r=3) == ZeroInit(r=3)


def test_another_model_is_named():
    first = tiny_backbone("llama", dtype=torch.float32)
    generator = random_generator(first, trained_for=describe(first))
    generator.check(first)
    with pytest.raises(ValueError, match=r"trained for tiny-llama .*q_proj\); the model at hand is tiny-gpt_neox "):
        generator.check(tiny_backbone("gpt_neox", dtype=torch.float32))
    with pytest.raises(ValueError, match=r"trained for tiny-llama .*weights \w+\); the model at hand is tiny-llama"):
        generator.check(tiny_backbone("llama", dtype=torch.float32, seed=1))


@pytest.mark.parametrize("described", [True, False])
def test_other_target_modules_are_refused(described):
    first = tiny_backbone("llama", dtype=torch.float32)
    generator = random_generator(first, trained_for=describe(first) if described else None)
    other = tiny_backbone("llama", dtype=torch.float32, target_modules="attention")
    with pytest.raises(ValueError, match=r"\b4 projections\b.*tiny-llama.*\b8\b"):
        generator.check(other)
    with pytest.raises(ValueError, match=r"\b4 projections\b.*tiny-llama.*\b8\b"):
        AdaptiveLM(other, init=generator)


# --- through AdaptiveLM ---


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", LINEAR), ("llama", "qv"), ("gpt_neox", "qv"), ("gpt_neox", ["dense"])]
)
def test_adaptive_lm_starts_from_a_generator(architecture, targets, tmp_path):
    save_tiny(tmp_path / "model", architecture)
    backbone = AdaptiveLM.from_pretrained(
        str(tmp_path / "model"), lora={"target_modules": targets}, device="cpu"
    ).backbone
    generator = stored(tmp_path / "generator", backbone, target_modules=targets)
    lm = AdaptiveLM.from_pretrained(str(tmp_path / "model"), init=tmp_path / "generator", device="cpu")
    assert [p.name for p in lm.backbone.projections] == [p.name for p in backbone.projections]
    still = lm.adapt(PROMPTS, steps=0)
    for b, prompt in enumerate(PROMPTS):
        h_1H = slow_state(backbone, lm.encode(prompt))[None]
        want = generator.lora(lm.backbone.projections, h_1H)
        close(still.lora.rows([b]).tensors, want.tensors, 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(still.lora.tensors, still.initial_lora.tensors, strict=True))

    moved = lm.adapt(PROMPTS, steps=2, rate=FixedRate(1e-5))
    close(moved.initial_lora.tensors, still.lora.tensors, 1e-5)
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(moved.lora.tensors, still.lora.tensors, strict=True))
    assert (
        moved.prompt_nll_BK[:, 1] < moved.prompt_nll_BK[:, 0]
    ).all()  # the rate is small, for these weights are wild

    folder = still.export_peft(tmp_path / "exported", row=1)
    ids = torch.tensor([lm.encode(PROMPTS[1])])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    unadapted = base(ids).logits.detach()
    have = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits
    want = lm.backbone.logits(lm.backbone.forward(left(ids.tolist()), still.lora.rows([1])).hidden_BTD)
    torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(have, merged_model(lm.backbone, still.lora, 1)(ids).logits, atol=1e-4, rtol=1e-4)
    assert (have - unadapted).abs().max() > 1e-2


# --- PEFT adapters as a start ---


def peft_adapter(folder: Path, architecture: str, **settings: Any) -> torch.nn.Module:
    """A saved LoRA of random weights, and PEFT's own model with it."""
    values: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **settings}
    model = tiny_model(architecture, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **values))
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    peft.save_pretrained(str(folder))
    return peft.eval()


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        *[("llama", ["q_proj", "v_proj"]), ("llama", ["q_proj"]), ("llama", LINEAR)],
        *[("gemma3", ["q_proj", "v_proj"]), ("gpt_neox", ["query_key_value"])],
    ],
)
def test_a_peft_adapter_as_init_gives_pefts_logits(architecture, targets, tmp_path):
    save_tiny(tmp_path / "model", architecture)
    peft = peft_adapter(tmp_path / "adapter", architecture, target_modules=targets)
    lm = AdaptiveLM.from_pretrained(str(tmp_path / "model"), init=tmp_path / "adapter", device="cpu")
    adaptation = lm.adapt(PROMPTS, steps=0)
    for b, prompt in enumerate(PROMPTS):
        batch = left([lm.encode(prompt)])
        have = lm.backbone.logits(lm.backbone.forward(batch, adaptation.lora.rows([b])).hidden_BTD)
        torch.testing.assert_close(have, peft(input_ids=batch.ids_BT).logits, atol=1e-4, rtol=1e-4)
        assert (have - lm.backbone.model(batch.ids_BT).logits).abs().max() > 1e-2
    moved = lm.adapt(PROMPTS, steps=1, rate=0.05)
    close(moved.initial_lora.tensors, adaptation.lora.tensors, 0)
    assert (moved.lora.B[0] - adaptation.lora.B[0]).abs().max() > 0


def test_peft_adapters_that_are_no_plain_lora(tmp_path):
    for name, settings in {
        "rank_pattern": {"rank_pattern": {"q_proj": 2}},
        "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
        "use_rslora": {"use_rslora": True},
        "use_dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
    }.items():
        peft_adapter(tmp_path / name, "llama", **settings)
        with pytest.raises(ValueError, match=rf"the adapter in .* is not a plain LoRA \({name}\)"):
            PeftInit.load(tmp_path / name)
    folder = tmp_path / "cut"
    peft_adapter(folder, "llama")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cut holds no readable PEFT adapter"):
        load_init(folder)


def test_peft_adapters_of_other_modules_or_models(tmp_path):
    peft_adapter(tmp_path / "up", "llama", target_modules=["up_proj"])
    backbone = tiny_backbone(dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"has model.layers.0.mlp.up_proj \(32 to 40\); tiny-llama has no such adapted"
    ):
        AdaptiveLM(backbone, init=tmp_path / "up")
    peft_adapter(tmp_path / "wide", "gemma3")
    with pytest.raises(ValueError, match=r"q_proj \(32 to 48\); tiny-llama has it as \(32, 32\)"):
        AdaptiveLM(backbone, init=tmp_path / "wide")
