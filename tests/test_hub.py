"""Networks on the hub: what is fetched and how, what is pushed, and one clear line for what goes wrong."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, errors

from ephemera import cards, hub
from ephemera.artifact import NETWORKS
from ephemera.early_exit.lens import Lens
from ephemera.inits import LoraGenerator, PeftInit, load_generator, load_init
from ephemera.model import AdaptiveLM
from ephemera.rates import AveragedRate, PerProjectionRate, ScaleNet, load_rate
from tiny_models import random_scalenet, save_tiny, tiny_backbone


class FakeHub:
    """Repositories as folders, by id and revision; it gives the files that the patterns name, as the hub does."""

    def __init__(self, root: Path):
        self.root, self.asked = root, []

    def snapshot_download(self, *, repo_id, revision=None, allow_patterns):
        self.asked.append((repo_id, revision))
        source = self.root / repo_id / (revision or "main")
        given = self.root / "cache" / repo_id / (revision or "main")
        for path in source.rglob("*"):
            name = path.relative_to(source).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (given / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, given / name)
        given.mkdir(parents=True, exist_ok=True)
        return str(given)

    def create_repo(self, repo_id, *, private, exist_ok):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        shutil.copytree(folder_path, self.root / repo_id / (revision or "main"))
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeHub:
    there = FakeHub(tmp_path / "hub")
    for name in ("snapshot_download", "create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub, name, getattr(there, name))
    monkeypatch.chdir(tmp_path)
    return there


def test_a_network_comes_back_from_the_hub_as_it_went(fake):
    pushed = random_scalenet(tiny_backbone("llama"))
    assert pushed.push_to_hub("someone/rates") == "https://huggingface.co/someone/rates"
    pushed.push_to_hub("someone/rates", revision="v2")
    (fake.root / "someone/rates/main/training_state.bin").write_text("large")
    back = ScaleNet.from_pretrained("someone/rates")
    for name, tensor in pushed.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    assert back.config == pushed.config
    assert not (fake.root / "cache/someone/rates/main/training_state.bin").exists()
    load_rate("someone/rates@v2")
    assert fake.asked == [("someone/rates", None), ("someone/rates", "v2")]
    front = ModelCard((fake.root / "someone/rates/main/README.md").read_text()).data
    assert front.library_name == "ephemera"
    assert front.pipeline_tag == "text-generation"


def test_shipped_networks_go_with_their_gate_and_card(fake):
    ScaleNet.from_pretrained("universal").push_to_hub("someone/universal")
    folder = fake.root / "someone/universal/main"
    assert (folder / "README.md").read_text() == (NETWORKS / "universal" / "README.md").read_text()
    back = ScaleNet.from_pretrained("someone/universal")
    assert back.gate is not None
    assert back.gate.threshold == load_rate("universal").gate.threshold
    LoraGenerator.from_pretrained("taskweaver").push_to_hub("someone/taskweaver")
    assert isinstance(load_init("someone/taskweaver"), LoraGenerator)
    Lens.from_pretrained("scalenet-fast").push_to_hub("someone/lens")
    assert Lens.from_pretrained("someone/lens").exit_layers == Lens.from_pretrained("scalenet-fast").exit_layers
    load_rate("scalenet-fast").push_to_hub("someone/fast")
    assert load_rate("someone/fast").objective.lens is not None


def test_constants_and_averaged_rates(fake):
    backbone = tiny_backbone("llama")
    constants = PerProjectionRate(projections=len(backbone.projections), base_rates=[0.5])
    constants.push_to_hub("someone/constants")
    assert PerProjectionRate.from_pretrained("someone/constants").base_rates == pytest.approx((0.5,))
    load_rate(str(NETWORKS / "scalenet-squad" / "averaged")).push_to_hub("someone/averaged")
    assert isinstance(AveragedRate.from_pretrained("someone/averaged"), AveragedRate)
    with pytest.raises(ValueError, match="holds a PerProjectionRate, not a ScaleNet"):
        ScaleNet.from_pretrained("someone/constants")


def test_a_model_takes_hub_ids(fake):
    folder = save_tiny(fake.root.parent / "model", "llama")
    base = AdaptiveLM.from_pretrained(str(folder), rate=60.0, device="cpu")
    network = random_scalenet(base.backbone).float()
    network.push_to_hub("someone/rates")
    made = base.adapt("The mill")
    made.export_peft(fake.root / "someone/start/main")
    lm = AdaptiveLM.from_pretrained(str(folder), rate="someone/rates", init="someone/start", device="cpu")
    assert isinstance(lm.init, PeftInit)
    same = AdaptiveLM(base.backbone, rate=network, init=str(fake.root / "someone/start/main"))
    ours, theirs = lm.adapt("The mill", steps=1), same.adapt("The mill", steps=1)
    assert torch.allclose(ours.rates_BKM, theirs.rates_BKM)
    assert torch.allclose(ours.prompt_nll_BK, theirs.prompt_nll_BK)


def response(code: int) -> httpx.Response:
    return httpx.Response(code, request=httpx.Request("GET", "https://huggingface.co/api"))


def http_error(kind, code: int):
    """As the client raises it; the class of the response depends on the client that huggingface_hub uses."""
    return kind(f"{code} Client Error.", response=response(code))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(errors.RepositoryNotFoundError, 404), "the hub has no such repository, or it is private"),
        (http_error(errors.RevisionNotFoundError, 404), "someone/gone has no revision 'v3'"),
        (http_error(errors.GatedRepoError, 403), "its owner grants access on request"),
        (
            errors.LocalEntryNotFoundError("offline mode is enabled."),
            "the hub did not give it (offline mode is enabled)",
        ),
        (http_error(errors.HfHubHTTPError, 500), "the hub did not give it (500 Client Error)"),
        (ConnectionError("no route"), "the hub did not give it (no route)"),
    ],
)
def test_what_goes_wrong_is_one_line(fake, monkeypatch, error, words):
    def fail(**_):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for load in (load_rate, load_init, Lens.from_pretrained):
        with pytest.raises(ValueError, match="someone/gone@v3") as caught:
            load("someone/gone@v3")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_refused_push_is_one_line(fake, monkeypatch):
    def fail(*_, **__):
        raise http_error(errors.HfHubHTTPError, 401)

    monkeypatch.setattr(huggingface_hub, "upload_folder", fail)
    network = random_scalenet(tiny_backbone("llama"))
    with pytest.raises(ValueError, match=r"cannot push to 'someone/rates': 401 Client Error. .*hf auth login"):
        network.push_to_hub("someone/rates")
    with pytest.raises(ValueError, match=r"'rates' is no repository. Allowed: user/repo"):
        network.push_to_hub("rates")


def test_a_repository_without_the_files(fake):
    (fake.root / "someone/empty/main").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"'someone/empty' holds no rate: it needs rate.json and rate.safetensors"):
        load_rate("someone/empty")
    with pytest.raises(ValueError, match=r"holds no generator or adapter: it needs generator.json and"):
        load_init("someone/empty")


def test_the_real_client_offline():
    with pytest.raises(ValueError, match="no such folder is here, and the hub did not give it") as caught:
        load_rate("someone/nowhere")
    assert "\n" not in str(caught.value)


def test_a_folder_comes_before_the_hub(fake):
    random_scalenet(tiny_backbone("llama")).save_pretrained("runs/mine")
    assert isinstance(load_rate("runs/mine"), ScaleNet)
    assert fake.asked == []
    assert [hub.is_id(spec) for spec in ("a/b", "a/b@v1", "./a", "a/b/c", "universal", Path("a/b"))] == [True] * 2 + [
        False
    ] * 4


@pytest.mark.parametrize(
    "folder", sorted(p for p in NETWORKS.iterdir() if (p / "README.md").exists()), ids=lambda p: p.name
)
def test_shipped_cards_have_front_matter(folder):
    card = ModelCard.load(folder / "README.md")
    front = card.data.to_dict()
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front["license"] == "apache-2.0"
    assert front["datasets"]
    assert front["metrics"] == ["nll"]
    assert card.text.lstrip().startswith(f"# {folder.name}")
    network = load_generator(folder.name) if (folder / "generator.json").exists() else load_rate(folder.name)
    assert ("with the gate" in card.text) == (network.gate is not None)


def test_a_harm_table_replaces_the_one_before():
    table = cards.harm_table(
        {"harm": 0.1, "calibration": {"n": 7, "change": -0.5, "harmed": 0.25, "helped": 0.5, "abstained": 0}}, None
    )
    assert "| 7 calibration rows, with the gate | −0.500 | 25.0% | 50.0% | 0.0% |" in table
    once = cards.with_harm("# card\n\ntext\n", table)
    assert cards.with_harm(once, table) == once
    assert cards.harm_table(None, {"validation_nll_0": 1.0}) == ""
