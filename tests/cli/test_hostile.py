"""Tests that every way to load weights refuses hostile files by name, and that no code runs."""

import io
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from hostile import Runs, hostile_config, saved
from lightning_dist.cache.files import ViewFiles
from lightning_dist.cache.reading import RowFile
from lightning_dist.cli.run.saved_config import CONFIG_KEY
from lightning_dist.files import pickles
from lightning_dist.files.weights import load_weights, read_checkpoint
from lightning_dist.models.small import SmallCNN

QUICK = ("trainer=cpu", "experiment=digits", "trainer.max_epochs=1")
QUICK += ("print_config=false", "callbacks.progress=null")


def weights() -> dict[str, torch.Tensor]:
    return SmallCNN([32, 64, 128]).state_dict()


def repacked(name: str, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a torch file with an additional entry, or with compressed entries."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(weights()))) as source,
        zipfile.ZipFile(buffer, "w", compression) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        target.writestr(name, b"x" * 4096)
    return buffer.getvalue()


def overlapping() -> bytes:
    """Return a zip file that lists one entry a hundred times, so that it unpacks to more data."""
    once = repacked("archive/data/99")
    with zipfile.ZipFile(io.BytesIO(once)) as source:
        start = source.start_dir
        end = once.rindex(b"PK\x05\x06")
        entry = once[once.rindex(b"PK\x01\x02", 0, end) : end]
        count = len(source.infolist()) + 100
    directory = once[start:end] + 100 * entry
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    return once[:start] + directory + tail


def bomb() -> bytes:
    """Return a safetensors header that declares a tensor of 4 TB."""
    header = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    return len(header).to_bytes(8, "little") + header + b"\0" * 64


def two_directories(end64: bool) -> bytes:
    """Return a zip file of compressed entries, with a second directory that lists other entries.

    torch reads the first directory, whose place the end of the file records. Python reads the
    second directory, which is directly before the end and lists nothing as compressed.
    """
    compressed = io.BytesIO()
    stored = saved(weights() | {"zeros": torch.zeros(2**20)})
    with (
        zipfile.ZipFile(io.BytesIO(stored)) as source,
        zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        start, count = target.start_dir, len(target.infolist())
    with zipfile.ZipFile(compressed) as target:
        start, count = target.start_dir, len(target.infolist())
    contents = compressed.getvalue()
    directory = contents[start : contents.rindex(b"PK\x05\x06")]
    harmless, at = bytearray(directory), 0
    while at < len(harmless):
        harmless[at + 10 : at + 12] = b"\0\0"  # The compression method is 0, which means "stored".
        harmless[at + 24 : at + 28] = harmless[at + 20 : at + 24]  # the size
        at += 46 + sum(struct.unpack("<3H", harmless[at + 28 : at + 34]))
    tail = b""
    if end64:
        place = start + 2 * len(directory)
        ends = (44, 45, 45, 0, 0, count, count, len(directory), start)
        tail = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", *ends)
        tail += struct.pack("<4sLQL", b"PK\x06\x07", 0, place, 1)
    ends = (0, 0, count, count, len(directory), start, 0)
    tail += struct.pack("<4s4H2LH", b"PK\x05\x06", *ends)
    return contents[:start] + directory + bytes(harmless) + tail


class Allocates:
    """An object that is a bytearray of many zeros when it is unpickled."""

    def __reduce__(self):
        return bytearray, (2**28,)


def nested() -> list:
    """Return nested lists that take forever to copy, because each contains the next list twice."""
    inside: list = []
    for _ in range(40):
        inside = [inside, inside]
    return inside


def text(value: str) -> bytes:
    """Return the opcodes of a pickle that push a text."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def pickled(opcodes: bytes, name: str = "data.pkl") -> bytes:
    """Return a torch file whose pickle is a dict with the value that some opcodes push."""
    contents = b"\x80\x02}" + text("a") + opcodes + b"s."
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(1)}))) as source,
        zipfile.ZipFile(buffer, "w") as target,
    ):
        for entry in source.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            renamed = entry.filename.replace("data.pkl", name)
            target.writestr(renamed, contents if is_pickle else source.read(entry))
    return buffer.getvalue()


def doubled_tuples() -> bytes:
    """Return a dict whose key is a nested tuple, in which each tuple contains the next tuple twice.

    Python computes the hash of the key from 2^24 values; with a few more bytes in the file, it
    would take forever.
    """
    levels = b"".join(b"q%ch%c\x86" % (i, i) for i in range(24))
    return pickled(b"})" + levels + b"Ns")


def doubled_bytes() -> bytes:
    """Return a pickle that encodes bytes again and again, each time to twice the length."""
    encode = b"c_codecs\nencode\n"
    value = encode + text("x" * 64) + text("latin1") + b"\x86R"
    for _ in range(12):
        value = encode + value + text("hex") + b"\x86R"
    return pickled(value)


def long_directory() -> bytes:
    """Return an archive with a directory of 9 MB, which takes Python half a minute to list."""
    entry = b"PK\x01\x02" + struct.pack("<6H3L5H2L", 20, 20, *[0] * 7, 1, *[0] * 6) + b"x"
    count, start = 200_000, 34
    where = (count, count, len(entry) * count, start)
    tail = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, *where)
    tail += struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(entry) * count, 1)
    tail += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)
    return b"PK\x03\x04" + b"\0" * 30 + entry * count + tail


def empty_tensors() -> bytes:
    """Return a safetensors header of 9 MB that lists tensors without values."""
    entries = (
        b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(160_000)
    )
    header = b"{" + b",".join(entries) + b"}"
    return len(header).to_bytes(8, "little") + header


def old_format(contents: object) -> bytes:
    """Return a file in the format that torch.save wrote before version 1.6."""
    buffer = io.BytesIO()
    torch.save(contents, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


CORPUS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "pickle": ("w.pth", lambda: pickle.dumps(Runs())),
    "pickle in a zip": ("w.pth", lambda: saved({"state_dict": weights(), "extra": Runs()})),
    "pickle by another name": ("w.safetensors", lambda: pickle.dumps(Runs())),
    "truncated zip": ("w.ckpt", lambda: saved(weights())[:-2000]),
    "truncated safetensors": ("w.safetensors", lambda: safetensors.torch.save(weights())[:-100]),
    "header that is too long": ("w.safetensors", lambda: (2**40).to_bytes(8, "little") + b"{"),
    "header of a huge tensor": ("w.safetensors", bomb),
    "header of deep nesting": (
        "w.safetensors",
        lambda: (100_000).to_bytes(8, "little") + b'{"a":' * 20_000,
    ),
    "path traversal": ("w.pth", lambda: repacked("archive/data/../../../evil")),
    "absolute path": ("w.pth", lambda: repacked("/etc/evil")),
    "Windows path": ("w.pth", lambda: repacked("archive\\..\\..\\evil")),
    "compressed zip": ("w.pth", lambda: repacked("archive/more", zipfile.ZIP_DEFLATED)),
    "overlapping entries": ("w.pth", lambda: overlapping()),
    "two directories": ("w.pth", lambda: two_directories(end64=False)),
    "two directories of 64 bits": ("w.pth", lambda: two_directories(end64=True)),
    "something after an archive": ("w.pth", lambda: saved(weights()) + b"x"),
    "something before an archive": ("w.pth", lambda: b"PK" + saved(weights())),
    "header of empty tensors": ("w.safetensors", empty_tensors),
    "lists without end": ("w.ckpt", lambda: saved(weights() | {"optimizer_states": nested()})),
    "a bytearray": ("w.pth", lambda: saved(weights() | {"a": Allocates()})),
    "a bytearray in the old format": ("w.pth", lambda: old_format({"a": Allocates()})),
    "a bytearray by another case": (
        "w.pth",
        lambda: pickled(b"c__builtin__\nbytearray\nJ\0\0\0\x10\x85R", "DATA.PKL"),
    ),
    "a tuple of tuples": ("w.pth", doubled_tuples),
    "bytes that grow": ("w.pth", doubled_bytes),
    "a directory without end": ("w.pth", long_directory),
    "a reader of files": (
        "w.pth",
        lambda: pickled(
            b"ctraceback\nFrameSummary\n" + text(__file__) + b"K\x01" + text("n") + b"\x87R"
        ),
    ),
    "a connection": (
        "w.pth",
        lambda: pickled(
            b"ctorch.distributed.device_mesh\nDeviceMesh\n" + text("cpu") + b"](K\0K\x01e\x86R"
        ),
    ),
    "a repeated number": ("w.pth", lambda: saved({"a": torch.ones(1).expand(10**6, 10**6)})),
    "a repeated number in the old format": (
        "w.pth",
        lambda: old_format({"a": torch.ones(1).expand(10**6, 10**6)}),
    ),
    "a tensor without storage": (
        "w.pth",
        lambda: saved({"a": torch.ones(3), "b": [torch.ones(2**18).expand(2**8, -1)] * 9}),
    ),
    "text": ("w.pth", lambda: b"#!/bin/sh\nmkdir trace\n"),
    "nothing": ("w.ckpt", lambda: b""),
}

ENTRIES = {
    "teacher": ("train", *QUICK, "teacher.weights={file}"),
    "resume from a checkpoint": ("train", *QUICK, "ckpt_path={file}"),
    "eval": ("eval", "ckpt={file}", "trainer=cpu"),
    "predict": ("predict", "ckpt={file}", "images=.", "trainer=cpu"),
    "export": ("export", "ckpt={file}"),
}


def write(name: str, folder: Path) -> Path:
    file, make = CORPUS[name]
    (folder / file).write_bytes(make())
    return folder / file


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_file_is_refused_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = write(name, tmp_path)
    before = set(tmp_path.rglob("*"))
    network = SmallCNN([32, 64, 128])
    with pytest.raises(ValueError, match=path.name):
        load_weights(network, path)
    with pytest.raises(ValueError, match=path.name):
        read_checkpoint(path)
    assert set(tmp_path.rglob("*")) == before, "something was run or unpacked"
    assert not Path("/etc/evil").exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_of_too_many_steps_is_refused(tmp_path, monkeypatch, old):
    """A million lists take a million bytes in a file, but seconds and 64 times the memory."""
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 1000)
    lists = {"a": [[] for _ in range(1000)]}
    (tmp_path / "w.pth").write_bytes(old_format(lists) if old else saved(lists))
    with pytest.raises(ValueError, match=r"w\.pth .* more than 1000 opcodes"):
        read_checkpoint(tmp_path / "w.pth")
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "w.pth") == lists


def test_a_long_text_in_the_old_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_MOST_BYTES", 1000)
    (tmp_path / "w.pth").write_bytes(old_format({"a": 2000 * "x"}))
    with pytest.raises(ValueError, match=r"w\.pth .* more than 1000 bytes"):
        read_checkpoint(tmp_path / "w.pth")


def test_objects_of_checkpoints_are_read(tmp_path):
    """Every opcode that torch.save writes is followed: bytes, sets, sizes, NumPy's numbers."""
    values = {"bytes": b"\x00\xff", "set": {1}, "size": torch.Size([2]), "long": 2**80}
    values |= {"dtype": torch.float32, "counter": Counter("aab"), "tuple": ((1, 2), "x", None)}
    torch.save(values | {"number": np.float64(0.5)}, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth")
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["pickle in a zip", "path traversal", "header of a huge tensor"])
def test_a_hostile_file_is_refused_wherever_weights_enter(refused, tmp_path, entry, name):
    path = write(name, tmp_path)
    line = refused(*(part.format(file=path) for part in ENTRIES[entry]))
    assert path.name in line
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["pickle in a zip", "path traversal"])
def test_a_hostile_checkpoint_in_the_folder_of_a_run_is_refused(refused, tmp_path, name):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    write(name, folder).rename(folder / "last.ckpt")
    line = refused("train", *QUICK, "hydra.run.dir=run", "resume=true")
    assert "last.ckpt" in line
    assert not (tmp_path / "trace").exists()


RESOLVES = "${oc.create:{_target_: os.mkdir, path: trace}}"
CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "a resolver": ({"mean": RESOLVES}, "would resolve"),
    "a resolver within": ({"options": [{"deep": RESOLVES}]}, "would resolve"),
    "a resolver in a key": ({RESOLVES: 1}, "would resolve"),
    "a pickle": ({"checkpoint_path": "w.pth"}, "would load checkpoint_path='w.pth'"),
    "a pickle by position": (
        {"_args_": ["resnet18", False, None, None, "w.pth"]},
        "arguments that it does not name",
    ),
    "a pickle for pretrained weights": (
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "w.pth"}},
        "would load pretrained_cfg_overlay",
    ),
    "a folder of timm's": ({"model_name": "local-dir:w"}, "would load 'local-dir:w'"),
    "a backbone of the hub": (
        {"_target_": "lightning_dist.models.segmentation.pspnet", "backbone": "hf-hub:a/b"},
        "would load 'hf-hub:a/b'",
    ),
    "a pickle of timm's": (
        {
            "_target_": "timm.models.load_state_dict",
            "path": "w.pth",
            "weights_only": False,
        },
        "would run 'timm.models.load_state_dict'",
    ),
    "a partial of other code": (
        {"loss": {"_target_": "os.mkdir", "_partial_": True}},
        "would run 'os.mkdir'",
    ),
    "a function by its name": (
        {"f": {"_target_": "hydra.utils.get_method", "path": "os.mkdir"}},
        "would run 'hydra.utils.get_method'",
    ),
    "a number for a target": ({"_target_": 3}, "would run 3"),
}


@pytest.mark.parametrize("verb", ["eval", "export"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_runs_or_loads_something_is_refused(refused, tmp_path, verb, name):
    student, message = CONFIGS[name]
    (tmp_path / "w.pth").write_bytes(saved({"a": Runs()}))
    torch.save(hostile_config(**student), tmp_path / "x.ckpt")
    line = refused(verb, "ckpt=x.ckpt")
    assert "x.ckpt" in line
    assert message in line
    assert "trust=true" in line
    assert not (tmp_path / "trace").exists()


def test_a_config_without_end_is_refused(refused, tmp_path):
    loop = hostile_config()
    loop[CONFIG_KEY]["module"]["student"]["self"] = loop[CONFIG_KEY]["module"]
    torch.save(loop, tmp_path / "loop.ckpt")
    assert "loop.ckpt is damaged" in (line := refused("export", "ckpt=loop.ckpt"))
    assert "nested" in line
    deep: dict = {}
    for _ in range(40):
        deep = {"deeper": deep}
    torch.save(hostile_config(options=deep), tmp_path / "deep.ckpt")
    assert "deep.ckpt is damaged: its config is nested" in refused("export", "ckpt=deep.ckpt")
    wide: list = []
    for _ in range(17):
        wide = [wide, wide]
    torch.save(hostile_config(options=wide), tmp_path / "wide.ckpt")
    assert "wide.ckpt is damaged: its config has more" in refused("export", "ckpt=wide.ckpt")


@pytest.mark.parametrize("options", [("ckpt_path=run/checkpoints/last.ckpt",), ("resume=true",)])
def test_a_checkpoint_that_is_a_folder_is_refused(refused, tmp_path, options):
    """Without the refusal, the strategy would unpickle the files in the folder."""
    folder = tmp_path / "run" / "checkpoints" / "last.ckpt"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs()))
    line = refused("train", *QUICK, "hydra.run.dir=run", *options)
    assert "last.ckpt is a folder" in line
    assert "trust=true" in line
    assert not (tmp_path / "trace").exists()


BROKEN: dict[str, tuple[Callable[[dict], object], str]] = {
    "no weights": (lambda c: c.pop("state_dict"), "has no weights"),
    "text for weights": (lambda c: c["state_dict"].update(a="x"), "has no weights"),
    "an empty config": (lambda c: c[CONFIG_KEY].clear(), "has no module or data or seed"),
    "a list for a config": (lambda c: c.update({CONFIG_KEY: [1]}), "has no module"),
    "a word for a seed": (lambda c: c[CONFIG_KEY].update(seed="abc"), "has no seed"),
    "a negative seed": (lambda c: c[CONFIG_KEY].update(seed=-1), "has no seed"),
    "a huge seed": (lambda c: c[CONFIG_KEY].update(seed=10**400), "has no seed"),
    "a number for names": (lambda c: c[CONFIG_KEY].update(class_names=7), "no names of classes"),
    "numbers for names": (lambda c: c[CONFIG_KEY].update(class_names=["a", 1]), "no names of"),
    "escapes in names": (lambda c: c[CONFIG_KEY].update(class_names=["\x1b[2J"]), "no names of"),
    "words for colours": (lambda c: c[CONFIG_KEY].update(class_colors=["red"]), "no colours of"),
    "other data": (lambda c: c[CONFIG_KEY]["data"].update(foo=1), "fit together"),
    "data of another kind": (
        lambda c: c[CONFIG_KEY].update(data={"_target_": "torch.nn.Identity"}),
        "no data module",
    ),
    "data for later": (lambda c: c[CONFIG_KEY]["data"].update(_partial_=True), "no data module"),
    "text for a number": (
        lambda c: c[CONFIG_KEY]["data"].update(global_batch_size="x"),
        "fit together",
    ),
    "names of 16 MB with escapes": (
        lambda c: c["state_dict"].update({"\x1b[2J" * 4_000_000: torch.ones(1)}),
        "do not fit together",
    ),
    "other shapes": (lambda c: None, "do not fit together"),
    "other arguments": (
        lambda c: c[CONFIG_KEY]["module"].update(foo=1),
        "do not fit together",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(refused, tmp_path, name):
    contents = hostile_config()
    if "data" in name or "number" in name:
        network = {"_target_": "lightning_dist.models.small.SmallCNN", "channels": [4]}
        contents[CONFIG_KEY]["module"]["student"] = network
        state = SmallCNN([4]).state_dict()
        contents["state_dict"] = {f"student.{name}": value for name, value in state.items()}
    change, message = BROKEN[name]
    change(contents)
    torch.save(contents, tmp_path / "broken.ckpt")
    line = refused("export", "ckpt=broken.ckpt")
    assert "broken.ckpt" in line
    assert message in line
    assert "\x1b" not in line
    assert len(line) < 5000


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': (4,), }}\n"
VIEWS = {
    "a header without end": "(" * 9000 + "\n",
    "a header of other keys": "{[]: 1}\n",
    "a column of text": HEADER.format("[('(images)', '<U2'), ('a', '<f2', (3,))]"),
    "a huge column": HEADER.format("[('(images)', '<f8'), ('a', '<f2', (10**21,))]"),
    "a column of no kind": HEADER.format("[('(images)', 3), 5]"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_hostile_view_of_a_cached_teacher_is_refused_by_name(tmp_path, name):
    header = VIEWS[name].encode()
    files = ViewFiles(tmp_path, rows=4)
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    files.path(0).write_bytes(start + header + b"\0" * 64)
    with pytest.raises(ValueError, match=r"view-000.npy is .*delete it, so that the"):
        RowFile(files.path(0), 4, ["(images)", "a"])


def test_a_name_with_a_colon_is_no_path_out_of_the_archive(tmp_path):
    torch.save(weights(), tmp_path / "run_12:30:00.pth")
    load_weights(SmallCNN([32, 64, 128]), tmp_path / "run_12:30:00.pth")


def test_a_whole_file_of_the_corpus_would_load(tmp_path):
    """The same files with harmless contents load, so the hostile contents cause the refusals."""
    path = tmp_path / "w.pth"
    path.write_bytes(repacked("archive/more"))
    load_weights(SmallCNN([32, 64, 128]), path)
    assert torch.load(path, weights_only=True).keys() == weights().keys()
