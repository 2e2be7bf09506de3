"""Adapter folders: read as PEFT reads them, written so that PEFT applies the same, lies refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import normal, random_adapter, same_bits
from peft.tuners.lora import LoraLayer
from peft_adapters import CONFIG, FILE, change, loaded, make_adapter, reconfigure, scores
from safetensors.torch import load_file

from fedlora.adapter import Adapter, Factors
from fedlora.adapter_folder import AdapterFolder, open_folder, write_folder
from fedlora.tensorfile import read_header, write_tensors

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
CASES = [
    ("bert", {"target_modules": ["query", "intermediate.dense"], "lora_alpha": 7}),
    ("bert", {"target_modules": ["query", "word_embeddings"], "bias": "all"}),
    ("bert", {"target_modules": ["key"], "bias": "lora_only", "use_rslora": True}),
    (
        "gpt2",
        {
            "target_modules": ["c_attn", "c_fc", "wte"],
            "use_rslora": True,
            "r": 4,
            "rank_pattern": {"attn": 1, "c_fc": 2},  # "attn" names no whole part of a name
            "alpha_pattern": {"h.1.attn.c_attn": 3, r"mlp\..*": 5},
        },
    ),
    ("llama", {"target_modules": "all-linear", "r": 6, "use_rslora": True}),
    ("llama", {"target_modules": r".*layers\.1\..*(q|k)_proj", "init_lora_weights": "mica"}),
    ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
]  # fmt: skip
each_case = pytest.mark.parametrize(("kind", "lora"), CASES)
CARELESS = {"peft_type": "LORA", "target_modules": ["query", "value"], "r": 99, "lora_alpha": 1}


def as_adapter(opened: AdapterFolder) -> Adapter:
    return Adapter(
        {name: opened.factors(name) for name in opened.layers},
        {name: opened.tensor(name) for name in opened.dense},
    )


def embeddings(opened: AdapterFolder) -> list[str]:
    return [name for name, entry in opened.layers.items() if entry.embedding]


@each_case
def test_increments_are_those_that_peft_applies(
    tiny: Tiny, tmp_path: Path, kind: str, lora: dict
) -> None:
    folder = make_adapter(tiny(kind), tmp_path / "a", **lora)
    opened = open_folder(folder)
    modules = {
        name: module
        for name, module in loaded(tiny(kind), folder).base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert opened.layers.keys() == modules.keys()
    for name, module in modules.items():
        factors = opened.factors(name)
        assert (factors.scaling, factors.rank) == (module.scaling["default"], module.r["default"])
        got = factors.scaling * factors.B.double() @ factors.A.double()
        want = module.get_delta_weight("default").detach()
        turned = opened.layers[name].embedding or type(module.get_base_layer()).__name__ == "Conv1D"
        torch.testing.assert_close(got.mT if turned else got, want)


@each_case
def test_what_is_written_back_is_the_same_file_and_the_same_model(
    tiny: Tiny, tmp_path: Path, kind: str, lora: dict
) -> None:
    folder = make_adapter(tiny(kind), tmp_path / "a", **lora)
    opened = open_folder(folder)
    write_folder(tmp_path / "b", as_adapter(opened), opened.settings, embeddings=embeddings(opened))
    before, after = load_file(folder / FILE), load_file(tmp_path / "b" / FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    want = scores(loaded(tiny(kind), folder))
    assert torch.equal(scores(loaded(tiny(kind), tmp_path / "b")), want)
    again = open_folder(tmp_path / "b")
    assert [e.scaling for e in again.layers.values()] == [e.scaling for e in opened.layers.values()]


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_applies_each_layers_own_rank_and_scaling(
    tiny: Tiny, tmp_path: Path, rslora: bool
) -> None:
    """Ranks 1 to 4 and scalings that no whole alpha gives, under one config."""
    names = [
        f"bert.encoder.layer.{layer}.attention.self.{part}"
        for layer in (0, 1)
        for part in ("query", "value")
    ]
    layers = {
        name: Factors(normal(rank, rank, 32).float(), normal(9, 32, rank).float(), scaling)
        for name, rank, scaling in zip(names, (1, 2, 3, 4), (2.0, 0.3, 1 / 3, 8.0), strict=True)
    }
    write_folder(tmp_path / "a", Adapter(layers), CARELESS | {"use_rslora": rslora})
    model = loaded(tiny("bert"), tmp_path / "a")
    for name, factors in layers.items():
        module = model.base_model.model.get_submodule(name)
        assert module.r["default"] == factors.rank
        assert module.scaling["default"] == pytest.approx(factors.scaling, rel=3e-16)


def test_what_was_folded_is_stacked_onto_its_layer(tmp_path: Path) -> None:
    whole = random_adapter(1)
    frozen = {"block.query": Factors(normal(5, 3, 5).float(), normal(6, 7, 3).float(), 1.0)}
    write_folder(
        tmp_path / "a",
        Adapter(whole.layers, whole.dense, frozen),
        CARELESS | {"target_modules": ["query", "value"]},
    )
    opened = open_folder(tmp_path / "a")
    assert [entry.rank for entry in opened.layers.values()] == [5, 2]
    got = opened.factors("block.query")
    first, second = whole.layers["block.query"], frozen["block.query"]
    want = first.scaling * first.B @ first.A + second.B @ second.A
    torch.testing.assert_close(got.scaling * got.B @ got.A, want)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_folder(tmp_path / name, random_adapter(1), CARELESS | {"modules_to_save": {"head"}})
    for file in (FILE, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_adapter_comes_back_bit_for_bit(tmp_path: Path) -> None:
    adapter = random_adapter(1)
    write_folder(tmp_path / "a", adapter, CARELESS)
    opened = open_folder(tmp_path / "a")
    for name, factors in adapter.layers.items():
        assert same_bits(opened.factors(name), factors)
    for name, tensor in adapter.dense.items():
        assert torch.equal(opened.tensor(name), tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_halves_are_read_without_loss(tmp_path: Path, dtype: torch.dtype) -> None:
    write_folder(tmp_path / "a", random_adapter(1), CARELESS)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "a" / FILE).items()}
    change(tmp_path / "a", tensors)
    A = open_folder(tmp_path / "a").factors("block.query").A
    assert torch.equal(A, tensors["base_model.model.block.query.lora_A.weight"].to(A.dtype))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter({"other": random_adapter(1).layers["block.query"]}), "none that target_modules"),
        (
            Adapter({"query": Factors(torch.full((1, 2), torch.nan), torch.ones(2, 1), 1.0)}),
            "'query.lora_A.weight' holds NaN or Inf",
        ),
        (Adapter({}, {"head": torch.tensor([torch.inf])}), "'head' holds NaN or Inf"),
    ],
)
def test_an_adapter_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, adapter: Adapter, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path / "a", adapter, CARELESS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        write_folder(tmp_path, random_adapter(1), CARELESS)


# ---------------------------------------------------------------- what is refused


REFUSED = [
    ({"peft_type": "IA3"}, "peft_type = 'IA3' is not merged: only 'LORA'"),
    ({"peft_type": "PROMPT_TUNING"}, "peft_type = 'PROMPT_TUNING'"),
    ({"use_dora": True}, "use_dora = True is not merged: DoRA's magnitudes"),
    ({"lora_bias": True}, "lora_bias = True is not merged"),
    ({"use_qalora": True}, "use_qalora"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices = "),
    ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"monteclora_config": {"x": 1}}, "monteclora_config"),
    ({"velora_config": {"num_groups": 64}}, "velora_config"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not merged: it changes the"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"init_lora_weights": "olora"}, "olora"),
    ({"init_lora_weights": "corda"}, "corda"),
    ({"init_lora_weights": "loftq"}, "loftq"),
    ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    ({"use_rslorra": True}, "does not know; did you mean 'use_rslora'"),
    ({"new_in_peft_2": {"x": 1}}, "is a setting this version does not know"),
    ({"r": 0}, "r = 0 is no rank"),
    ({"r": True}, "r = True is no rank"),
    ({"r": "8"}, "r = '8' is no rank"),
    ({"lora_alpha": -1}, "lora_alpha = -1 is no scale"),
    ({"lora_alpha": 0}, "lora_alpha = 0 is no scale"),
    ({"lora_alpha": float("nan")}, "lora_alpha = nan is no scale"),
    ({"lora_alpha": None}, "lora_alpha = None is no scale"),
    ({"use_rslora": "yes"}, "use_rslora = 'yes' is neither"),
    ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] = 0 is no rank"),
    ({"rank_pattern": {"(": 2}}, "is no regular expression"),
    ({"rank_pattern": [1]}, "is no table of layers"),
    ({"alpha_pattern": {"query": "x"}}, r"alpha_pattern\['query'\] = 'x' is no scale"),
    ({"target_modules": 3}, "target_modules = 3 is no list of names"),
    ({"target_modules": "("}, "is no regular expression"),
    ({"target_modules": ")("}, "is no regular expression"),
    ({"target_modules": ["value"]}, "layer 'block.query' is none that target_modules"),
    ({"r": 3}, "not of the rank 3 that adapter_config.json gives it"),
    ({"rank_pattern": {"value": 1}}, "layer 'block.value': A of shape .* rank 1"),
]  # fmt: skip


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    write_folder(tmp_path / "plain", random_adapter(1), CARELESS)
    return tmp_path / "plain"


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_a_setting_that_cannot_be_merged_is_refused_by_name(
    plain: Path, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_folder(reconfigure(plain, **settings))
    assert str(plain) in str(caught.value)


def test_settings_that_are_off_are_no_obstacle(plain: Path) -> None:
    off = {"use_dora": False, "arrow_config": None, "new_in_peft_2": None, "loftq_config": {}}
    open_folder(reconfigure(plain, **off))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("block.query.lora_magnitude_vector", "DoRA's magnitudes"),
        ("block.query.lora_B.bias", "a bias on B"),
        ("emb.token_adapter.trainable_tokens_delta", "trained token rows"),
        ("block.query.lora_diag", "KaSA's diagonal"),
        ("block.query.lora_C.weight", "a part of LoRA that is not known"),
        ("block.key.lora_A.weight", "layer 'block.key' has no lora_B"),
        ("block.query.lora_embedding_A", "has two lora_A"),
    ],
)
def test_a_tensor_that_is_no_part_of_plain_lora_is_refused_by_name(
    plain: Path, name: str, message: str
) -> None:
    extra = {f"base_model.model.{name}": torch.ones(2, 5)}
    change(plain, load_file(plain / FILE) | extra)
    with pytest.raises(ValueError, match=message):
        open_folder(plain)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"block.query.lora_A.weight": torch.ones(2, 5)}, "not begin with 'base_model.model.'"),
        ({"base_model.model.head": torch.ones(2)}, "holds no LoRA layer"),
        (
            {
                "base_model.model.query.lora_A.weight": torch.ones(2, 5, 1, 1),
                "base_model.model.query.lora_B.weight": torch.ones(7, 2, 1, 1),
            },
            r"lora_A has shape \(2, 5, 1, 1\): only layers with two axes",
        ),
        (
            {
                "base_model.model.query.lora_A.weight": torch.ones(2, 5, dtype=torch.int8),
                "base_model.model.query.lora_B.weight": torch.ones(7, 2),
            },
            "lora_A is of torch.int8",
        ),
        (
            {
                "base_model.model.query.lora_A.weight": torch.ones(2, 5),
                "base_model.model.query.lora_B.weight": torch.ones(7, 1),
            },
            r"A of shape \(2, 5\) and B of shape \(7, 1\)",
        ),
        (
            {
                "base_model.model.query.lora_A.weight": torch.ones(2, 0),
                "base_model.model.query.lora_B.weight": torch.ones(7, 2),
            },
            "A of shape",
        ),
    ],
)  # fmt: skip
def test_tensors_of_another_form_are_refused(plain: Path, tensors: dict, message: str) -> None:
    change(plain, tensors)
    with pytest.raises(ValueError, match=message):
        open_folder(plain)


def test_a_pickle_is_refused_with_the_remedy(plain: Path) -> None:
    (plain / FILE).unlink()
    (plain / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    with pytest.raises(ValueError, match=r"a pickle.*safe_serialization=True"):
        open_folder(plain)


def test_a_folder_without_its_files_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no adapter folder"):
        open_folder(tmp_path / "nowhere")
    (plain / FILE).unlink()
    with pytest.raises(ValueError, match=f"there is no {FILE}"):
        open_folder(plain)
    (plain / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"there is no {CONFIG}"):
        open_folder(plain)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00", '{"peft_type": "LORA"}'])
def test_settings_that_are_none_are_refused(plain: Path, text: str) -> None:
    (plain / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=CONFIG):
        open_folder(plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none_is_found_when_it_is_read(
    plain: Path, value: float, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(plain / FILE).items()}
    tensors["base_model.model.block.value.lora_B.weight"][3, 1] = value
    tensors["base_model.model.head.bias"][0] = value
    change(plain, tensors)
    opened = open_folder(plain)
    opened.factors("block.query")
    with pytest.raises(ValueError, match=r"plain: layer 'block.value', lora_B holds NaN or Inf"):
        opened.factors("block.value")
    with pytest.raises(ValueError, match=r"plain: tensor 'head.bias' holds NaN or Inf"):
        opened.tensor("head.bias")


# ---------------------------------------------------------------- headers that lie


def file_of(header: object, data: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "empty": (b"", "cut in its header"),
    "only a length": ((8).to_bytes(8, "little"), "cut in its header"),
    "a header longer than the file": (file_of({}, 0, length=1 << 40), "cut in its header"),
    "no JSON": (file_of(b"{]"), "its header is no JSON"),
    "no text": (file_of(b"\xff\xfe"), "its header is no JSON"),
    "a deep nest": (file_of(b"[" * 100_000), "its header is no JSON"),
    "no table": (file_of([1, 2]), "no table of names"),
    "the same name twice": (
        file_of(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode()),
        "name 'a' occurs 2 times",
    ),
    "no entry": (file_of({"a": 3}), "'a' is not described by"),
    "a part missing": (file_of({"a": {"dtype": "F32", "shape": [4]}}), "not described by"),
    "an unknown dtype": (file_of({"a": entry("F8_E4M3", [16])}), "has dtype 'F8_E4M3'"),
    "a dtype that is a list": (file_of({"a": entry([])}), r"has dtype \[\]"),
    "a negative size": (file_of({"a": entry(shape=[-4])}), r"has shape \[-4\]"),
    "half a size": (file_of({"a": entry(shape=[4.0])}), "not a list of whole numbers"),
    "a size that is true": (file_of({"a": entry(shape=[4, True])}), "not a list of whole"),
    "three offsets": (file_of({"a": entry(offsets=[0, 8, 16])}), "not two rising"),
    "falling offsets": (file_of({"a": entry(offsets=[16, 0])}), "not two rising"),
    "negative offsets": (file_of({"a": entry(offsets=[-16, 0])}), "not two rising"),
    "too few bytes": (file_of({"a": entry(shape=[5])}), "needs 20 bytes, its offsets hold 16"),
    "another dtype": (file_of({"a": entry("F16")}), "needs 8 bytes, its offsets hold 16"),
    "outside the file": (file_of({"a": entry(offsets=[16, 32])}), "leaves a gap before it"),
    "beyond the end": (file_of({"a": entry(shape=[8], offsets=[0, 32])}), "speaks of"),
    "over another": (file_of({"a": entry(), "b": entry()}), "overlaps another"),
    "a huge shape": (file_of({"a": entry(shape=[1 << 62, 1 << 62])}), "needs"),
    "bytes at the end": (file_of({"a": entry()}, 17), "cut or added to"),
    "bytes missing": (file_of({"a": entry()}, 15), "cut or added to"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    data, message = LIES[lie]
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value)


def test_a_file_written_here_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "matrix": normal(1, 3, 5).float().T,
        "half": normal(2, 4).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "a name with \u00e4": normal(3, 2),
    }
    write_tensors(tmp_path / "a.safetensors", tensors.items())
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_tensors_are_written_as_they_are_made(tmp_path: Path) -> None:
    """The one before is in the file when the next is asked for: nothing is collected."""

    def made() -> object:
        yield "a", torch.ones(100_000)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) >= 300_000
        yield "b", torch.ones(1)

    write_tensors(tmp_path / "a.safetensors", made())


def test_an_absurd_header_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 31)  # sparse: takes no room
    with pytest.raises(ValueError, match="claims a header of 1073741824 bytes"):
        read_header(tmp_path / "a.safetensors")
