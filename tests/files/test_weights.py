"""Tests that weight files of all supported formats are loaded, and that no file can run code."""

import argparse
import copy
import json
import os
import pickle
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from lightning_dist import Teacher
from lightning_dist.files.weights import load_weights, read_checkpoint
from lightning_dist.models.small import SmallCNN


@pytest.fixture
def network() -> nn.Module:
    return SmallCNN([4, 8])


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


def other(state: dict) -> dict:
    return {name: value + 1 for name, value in state.items()}


def without_counters(state: dict) -> dict:
    return {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}


FOUND = {
    "no counters": without_counters,
    "any common prefix": lambda state: prefixed(state, "algorithm.backbone."),
    "teacher alone": lambda state: {"state_dict": prefixed(state, "teacher.")},
    "beside other parts": lambda state: prefixed(state, "encoder.") | {"loss.w": torch.ones(1)},
    "net": lambda state: {"net": state, "acc": 0.9},
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 3},
    "module": lambda state: {"module": prefixed(state, "backbone."), "global_steps": 3},
    "params_ema": lambda state: {"params": other(state), "params_ema": state},
}


@pytest.mark.parametrize("kind", FOUND)
def test_weights_are_found_wherever_a_program_put_them(tmp_path, kind):
    network, fresh = (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)) for _ in range(2))
    torch.save(FOUND[kind](network.state_dict()), tmp_path / "w.pth")
    load_weights(fresh, tmp_path / "w.pth")
    assert same(network, fresh)


def test_a_counter_that_the_network_lacks_is_no_difference(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    fresh = nn.Sequential(nn.Conv2d(1, 2, 3), FrozenBatchNorm2d(2))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    load_weights(fresh, tmp_path / "w.pth")
    assert torch.equal(fresh[0].weight, network[0].weight)


def test_two_networks_of_one_kind_are_refused_by_their_prefixes(tmp_path, network):
    state = network.state_dict()
    torch.save(prefixed(state, "query.") | prefixed(other(state), "key."), tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"several networks of this kind, under 'key\.', 'query\.'"
    ):
        load_weights(network, tmp_path / "w.pth")


@pytest.mark.parametrize(
    "contents",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict": prefixed(state, "student."), "pytorch-lightning_version": "2"},
        lambda state: {"state_dict_ema": prefixed(state, "module.")},
        lambda state: prefixed(state, "module.student."),
        lambda state: {"state_dict": prefixed(state, "net._orig_mod.") | {"loss.w": torch.ones(1)}},
        lambda state: {"epoch": 3, "model": other(state), "ema_model": prefixed(state, "module.")},
        lambda state: {"model": other(state), "model_ema": prefixed(state, "module.")},
        lambda state: {"state_dict": state, "state_dict_ema": None, "ema_model": {}},
        lambda state: {
            "state_dict": prefixed(other(state), "student.")
            | prefixed(state, "student_ema.module.")
            | {"student_ema.n_averaged": torch.tensor(3)}
        },
    ],
    ids=[
        "plain",
        "published",
        "lightning",
        "ema",
        "two prefixes",
        "compiled, with other entries",
        "ema beside raw",
        "torchvision's ema",
        "no ema",
        "lightning's ema",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_weights_in_torch_files_are_loaded(tmp_path, network, contents, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(contents(network.state_dict()), path)
    loaded = SmallCNN([4, 8])
    load_weights(loaded, path)
    assert same(loaded, network)


def test_weights_in_safetensors_files_are_loaded(tmp_path, network):
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    teacher = Teacher(SmallCNN([4, 8]), weights=tmp_path / "weights.safetensors")
    assert same(teacher.network, network)


def test_a_file_in_a_package_is_loaded():
    load_weights(SmallCNN([32, 64, 128]), "pkg://lightning_dist/assets/digits_teacher.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_arguments_and_numpy_values_beside_the_weights_are_ignored(tmp_path, network, zipped):
    extras = {
        "args": argparse.Namespace(lr=0.1, seen=[np.float32(1)]),
        "best": np.float64(0.7),
        "epoch": np.int64(3),
        "history": np.arange(3.0),
        "objects": np.array([{"a": 1}], dtype=object),
    }
    path = tmp_path / "weights.pth"
    torch.save(
        {"model": network.state_dict(), **extras}, path, _use_new_zipfile_serialization=zipped
    )
    loaded = SmallCNN([4, 8])
    load_weights(loaded, path)
    assert same(loaded, network)
    assert not any(
        isinstance(value, (np.generic, np.ndarray, argparse.Namespace))
        for value in read_checkpoint(path).values()
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("extra", "name"), [(Path("logs"), "pathlib.PosixPath"), (deque([1]), "collections.deque")]
)
def test_other_objects_beside_the_weights_are_refused_by_name(
    tmp_path, network, zipped, extra, name
):
    path = tmp_path / "weights.pth"
    contents = {"model": network.state_dict(), "extra": extra}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"contains {name} beside tensors.*save_file"):
        load_weights(network, path)


def test_code_in_the_arguments_beside_the_weights_is_not_run(tmp_path, network):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save({"model": network.state_dict(), "args": argparse.Namespace(x=Runs(trace))}, path)
    with pytest.raises(ValueError, match="never loaded"):
        load_weights(network, path)
    assert not trace.exists()


def test_the_error_for_another_number_of_classes_says_what_to_set(tmp_path):
    safetensors.torch.save_file(SmallCNN([4, 8], 100).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"set num_classes=100 of the network"):
        load_weights(SmallCNN([4, 8]), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"as it was trained \(architecture, num_classes\)"):
        load_weights(SmallCNN([4, 16], 100), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "broken",
    [
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
    ],
    ids=["meta", "sparse"],
)
def test_meta_and_sparse_tensors_are_listed_and_nothing_is_loaded(tmp_path, network, broken):
    state = other(network.state_dict())
    state["head.weight"] = broken(state["head.weight"])
    torch.save(state, tmp_path / "weights.pth")
    before = copy.deepcopy(network)
    with pytest.raises(ValueError, match=r"1 on the meta device or sparse: head\.weight"):
        load_weights(network, tmp_path / "weights.pth")
    assert same(network, before)


def test_a_safetensors_header_with_a_wrong_length_is_refused(tmp_path, network):
    path = tmp_path / "weights.safetensors"
    for length in (2**63, 2**40, 10):
        path.write_bytes(length.to_bytes(8, "little") + b"{" * 64)
        with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
            load_weights(network, path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_changed_bytes_is_loaded_or_refused(tmp_path, network, zipped):
    path = tmp_path / "weights.pth"
    torch.save({"model": network.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    contents = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(contents[: random.integers(1, 2 * len(contents))])
        for place in random.integers(0, min(len(changed), 1500), 4):
            changed[place] = random.integers(256)
        path.write_bytes(changed)
        with suppress(ValueError):  # An error of another class fails the test.
            load_weights(network, path)


def test_a_file_whose_dict_contains_itself_is_refused(tmp_path, network):
    contents: dict = {}
    contents["model"] = contents
    torch.save(contents, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="nested more than 64 levels"):
        load_weights(network, tmp_path / "weights.pth")


class Runs:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, network, suffix, writer):
    path, trace = tmp_path / f"weights{suffix}", tmp_path / "trace"
    contents = {"model": network.state_dict(), "extra": Runs(trace)}
    if writer == "torch":
        torch.save(contents, path)
    else:
        path.write_bytes(pickle.dumps(contents))
    with pytest.raises(ValueError, match=f"weights{suffix} is damaged"):
        load_weights(network, path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_damaged_file_is_refused_by_name(tmp_path, network, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), path)
    else:
        safetensors.torch.save_file(network.state_dict(), path)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(keep * len(contents)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=f"weights{suffix} is damaged"):
        load_weights(network, path)


def test_a_missing_file_is_named(tmp_path, network):
    with pytest.raises(FileNotFoundError, match=r"there is no weight file .*nothing\.pth"):
        load_weights(network, tmp_path / "nothing.pth")


def test_entries_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path, network):
    state = network.state_dict()
    state["features.9.weight"] = state.pop("features.0.weight")
    state["head.weight"] = torch.zeros(100, 8)
    torch.save(state, tmp_path / "weights.pth")
    target = SmallCNN([4, 8])
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit SmallCNN") as caught:
        load_weights(target, tmp_path / "weights.pth")
    message = str(caught.value)
    assert "1 missing: features.0.weight" in message
    assert "1 unexpected: features.9.weight" in message
    assert "head.weight (100, 8) for (10, 8)" in message
    assert message.endswith("Build the network as it was trained (architecture, num_classes)")
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "contents", [[1, 2], {"epoch": 3}, {"model": {"a": "text"}}, {}, {0: torch.ones(1)}]
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, network, contents):
    torch.save(contents, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="expected a state_dict"):
        load_weights(network, tmp_path / "weights.pth")


def test_read_checkpoint_returns_all_entries(tmp_path):
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == {"epoch": 3, "state_dict": {}}


def test_a_name_of_many_levels_is_refused_at_once(tmp_path):
    """Every level of a name is a prefix to try: without a limit, a name of 1 MB takes hours."""
    torch.save({"a." * 30_000 + "x": torch.zeros(1)}, tmp_path / "deep.pth")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"deep\.pth does not fit"):
        load_weights(nn.Linear(2, 2), tmp_path / "deep.pth")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "result",
    [
        json.dumps({"checkpoint": "x" * 5000}),
        json.dumps({"checkpoint": "\ud800"}),
        json.dumps({"checkpoint": ["last.ckpt"]}),
        '{"checkpoint": ' + 960 * "[" + 960 * "]" + "}",
        "[" * 100_000,
        2**40,
    ],
    ids=["a long name", "no name", "a list", "nested", "no JSON", "a sparse file"],
)
def test_a_damaged_result_of_a_run_is_refused_by_name(tmp_path, result):
    (tmp_path / "checkpoints").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "result.json").write_text(result if isinstance(result, str) else "")
    if isinstance(result, int):
        os.truncate(tmp_path / "result.json", result)
    with pytest.raises(ValueError, match=r"result\.json is damaged: name a file in .*checkpoints"):
        read_checkpoint(tmp_path)


def test_a_result_without_a_checkpoint_means_the_last_one(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "result.json").write_text('{"checkpoint": null}')
    assert read_checkpoint(tmp_path).keys() == {"a"}


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_is_mostly_holes_is_refused(tmp_path, name):
    """A few bytes of an archive unpack to a file that would fill the memory with zeros."""
    size = 2**30
    if name == "w.pth":
        with torch.serialization.skip_data():
            torch.save({"a": torch.empty(size // 4)}, tmp_path / name)
    else:
        data = {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
        header = json.dumps(data).encode()
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(tmp_path / name, 8 + len(header) + size)
    with open(tmp_path / name, "r+b") as file:  # many parts before the largest hole
        for part in range(1, 200):
            file.seek(part * 2**14)
            file.write(b"\0")
    with pytest.raises(
        ValueError, match=r"w\..* has \d+ bytes, and only \d+ of them are on the disk"
    ):
        read_checkpoint(tmp_path / name)


def test_a_file_with_some_holes_is_read(tmp_path):
    torch.save({"a": torch.ones(9 * 2**20), "b": torch.zeros(9 * 2**20)}, tmp_path / "w.pth")
    contents, nothing = (tmp_path / "w.pth").read_bytes(), bytes(2**20)
    with open(tmp_path / "w.pth", "wb") as file:
        for start in range(0, len(contents), len(nothing)):
            block = contents[start : start + len(nothing)]
            file.seek(len(block), os.SEEK_CUR) if block == nothing else file.write(block)
    assert read_checkpoint(tmp_path / "w.pth")["b"].sum() == 0
