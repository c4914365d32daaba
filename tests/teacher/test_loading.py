"""Tests of load_teacher: names of timm and torchvision, factories, weight files, and refusals."""

import pickle

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

from lightning_dist.files.card import CARD_KEY, Card
from lightning_dist.teacher.loading import load_teacher
from normalisation import MEAN, OURS, STD, as_student, raw_images


def a_network(num_classes: int = 3, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, num_classes))


def no_network() -> str:
    return "text"


@pytest.mark.parametrize("prefix", ["timm/", ""])
def test_a_timm_name_brings_its_normalisation_and_size(prefix):
    raw = raw_images(64, 64)
    name = "test_resnet.r160_in1k"
    teacher = load_teacher(prefix + name, pretrained=False, num_classes=7, **OURS)
    assert teacher(as_student(raw)).shape == (2, 7)
    seen = []
    teacher.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher(as_student(raw))
    config = timm.get_pretrained_cfg(name)
    own = v2.Compose(
        [
            v2.Resize(config.input_size[1:], v2.InterpolationMode(config.interpolation)),
            v2.Normalize(config.mean, config.std),
        ]
    )
    torch.testing.assert_close(seen[0], own(raw), rtol=1e-4, atol=1e-4)


def test_a_teacher_of_other_weights_than_the_librarys_says_whose_images_it_gets(tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "w.pth")
    for options, own in (({}, "random weights"), ({"weights": tmp_path / "w.pth"}, "w.pth")):
        teacher = load_teacher("test_resnet", pretrained=False, num_classes=7, **OURS, **options)
        assert f"from {own}, with the images of timm's test_resnet" in teacher.describe()


def test_a_timm_name_loads_the_librarys_weights(tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}}
    teacher = load_teacher("timm/test_resnet.r160_in1k", arguments=overlay)
    assert teacher.inputs is None
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the folder in which torchvision finds its weights without a download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_a_torchvision_name_loads_the_named_weights_and_their_transform(hub):
    entry = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    state = torchvision.models.squeezenet1_1().state_dict()
    torch.save(state, hub / entry.url.rsplit("/", 1)[1])
    teacher = load_teacher("torchvision/squeezenet1_1", pretrained="IMAGENET1K_V1", **OURS)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, state[name])
    raw = raw_images(64, 64)
    seen = []
    teacher.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert teacher(as_student(raw)).shape == (2, 1000)
    own = v2.Compose([v2.Resize((224, 224)), v2.Normalize(MEAN, STD)])
    torch.testing.assert_close(seen[0], own(raw), rtol=1e-4, atol=1e-4)


def test_torchvisions_weights_are_read_without_running_code(hub, tmp_path):
    class Runs:
        def __reduce__(self):
            return (tmp_path / "trace").mkdir, ()

    entry = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    torch.save({"weight": Runs()}, hub / entry.url.rsplit("/", 1)[1])
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_teacher("torchvision/squeezenet1_1")
    assert not (tmp_path / "trace").exists()


def test_a_torchvision_network_without_weights_downloads_no_backbone(hub, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("download"))
    name = "torchvision/lraspp_mobilenet_v3_large"
    teacher = load_teacher(name, pretrained=False, num_classes=5, class_map=[4, 0], **OURS)
    assert teacher.inputs.size is None  # Such a network takes images of any size.
    assert teacher(as_student(raw_images(32, 32)))["out"].shape == (2, 2, 32, 32)


@pytest.mark.parametrize(
    "source", [f"{__name__}:a_network", a_network, a_network()], ids=["name", "function", "network"]
)
def test_a_factory_or_network_takes_weights_from_a_file(tmp_path, source):
    trained = a_network()
    torch.save({"model": trained.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    teacher = load_teacher(source, weights=tmp_path / "weights.pth", dtype="float64")
    x = torch.rand(2, 4)
    torch.testing.assert_close(teacher(x), trained.double()(x.double()).detach())


def test_weights_from_a_file_replace_the_librarys(tmp_path, monkeypatch):
    download = "timm.models._builder.load_pretrained"
    monkeypatch.setattr(download, lambda *_, **__: pytest.fail("download"))
    trained = timm.create_model("test_resnet", num_classes=7)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "own.safetensors")
    teacher = load_teacher("test_resnet", weights=tmp_path / "own.safetensors", num_classes=7)
    assert torch.equal(teacher.network.fc.weight, trained.fc.weight)
    with pytest.raises(ValueError, match="set num_classes=7"):
        load_teacher("test_resnet", weights=tmp_path / "own.safetensors")


@pytest.mark.parametrize("source", ["test_resnet", "torchvision/squeezenet1_1"])
def test_a_file_with_a_card_expects_its_own_images_and_not_the_librarys(tmp_path, source):
    network = load_teacher(source, pretrained=False, num_classes=3).network
    card = Card(size=(48, 48), crop_mode="center", mean=(0.1,) * 3, std=(0.2,) * 3, origin="run")
    contents = {"state_dict": network.state_dict(), CARD_KEY: card.to_plain()}
    torch.save(contents, tmp_path / "last.ckpt")
    teacher = load_teacher(source, weights=tmp_path / "last.ckpt", num_classes=3, **OURS)
    assert teacher.inputs.size == (48, 48)
    raw, seen = raw_images(48, 48), []
    teacher.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher(as_student(raw))
    torch.testing.assert_close(seen[0], (raw - 0.1) / 0.2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("timm/resnet43", {}, "no timm network 'resnet43': did you mean .*'resnet34'"),
        ("resnet34.in1k_tv", {}, r"no timm weights 'resnet34.in1k_tv': .*'resnet34.tv_in1k'"),
        ("torchvision/resnt50", {}, "no torchvision network 'resnt50': did you mean 'resnet50'"),
        (
            "torchvision/resnet50",
            {"pretrained": "IMAGENET1K_V3"},
            "no weights of torchvision's resnet50 'IMAGENET1K_V3': .*'IMAGENET1K_V2'",
        ),
        (f"{__name__}:a_netwrok", {}, "no function of .* 'a_netwrok': did you mean 'a_network'"),
        ("no.such.module:f", {}, "'no.such.module:f': No module named 'no'"),
        (
            "resnet34.tv_in1k",
            {"num_classes": 10},
            "have 1000 classes and num_classes is 10.*class_map",
        ),
        ("torchvision/resnet50", {"num_classes": 10}, "have 1000 classes and num_classes is 10"),
        (a_network, OURS, "the normalisation of .* is unknown.*InputBridge"),
        (a_network, {"student_mean": MEAN}, "student_mean and student_std both"),
        (a_network(), {"num_classes": 3}, "num_classes cannot change a network that is built"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_advice(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(source, **arguments)


@pytest.mark.parametrize("source", [3, no_network])
def test_what_is_no_source_of_a_network_is_refused(source):
    with pytest.raises(TypeError, match=r"source is a int: give|teacher is a str: give"):
        load_teacher(source)
