"""Teachers: what they see of the batch, in which classes they answer, and where they come from."""

import copy
import pickle
from collections import namedtuple

import lightning as L
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from lightning_dist import DistillationCallback, DistillModule, KDLoss, Teacher, Term
from lightning_dist.bridge import InputBridge, match_classes
from lightning_dist.ensemble import EnsembleTeacher
from lightning_dist.loading import load_teacher

OURS = {"student_mean": (0.5071, 0.4867, 0.4408), "student_std": (0.2675, 0.2565, 0.2761)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Output = namedtuple("Output", ["aux", "logits"])


class Records(nn.Module):
    """Answers with what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        return args, kwargs


class Answers(nn.Module):
    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer


def raw_images(*size: int) -> torch.Tensor:
    return torch.rand(2, 3, *(size or (8, 8)))


def as_student(raw: torch.Tensor) -> torch.Tensor:
    return v2.Normalize(OURS["student_mean"], OURS["student_std"])(raw)


def seen_by(bridge: InputBridge, *args, **kwargs):
    (seen, named) = Teacher(Records(), inputs=bridge)(*args, **kwargs)
    return (*seen, *named.values())


# The input bridge


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [13, (5, 6), 8])
def test_the_bridge_gives_what_the_teachers_own_transform_would(mode, size):
    raw = raw_images()
    bridge = InputBridge(MEAN, STD, **OURS, size=size, interpolation=mode)
    (seen,) = seen_by(bridge, as_student(raw))
    shape = [size, size] if isinstance(size, int) else size
    resize = v2.Resize(shape, v2.InterpolationMode(mode), antialias=True)
    expected = v2.Normalize(MEAN, STD)(resize(raw))
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_the_bridge_turns_rgb_in_0_to_1_into_bgr_in_0_to_255():
    raw = raw_images()
    blue_first = [104.00698793, 116.66876762, 122.67891434]
    bridge = InputBridge([m / 255 for m in blue_first], [1 / 255] * 3, **OURS, flip_channels=True)
    (seen,) = seen_by(bridge, as_student(raw))
    expected = v2.Normalize(blue_first, [1.0] * 3)(255 * raw[:, [2, 1, 0]])
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ([0.1307] * 3, [0.3081] * 3)])
def test_a_grey_student_image_is_repeated_for_a_teacher_of_three_channels(mean, std):
    raw = torch.rand(2, 1, 8, 8)
    bridge = InputBridge(mean, std, student_mean=[0.1307], student_std=[0.3081])
    (seen,) = seen_by(bridge, v2.Normalize([0.1307], [0.3081])(raw))
    expected = v2.Normalize(mean, std)(raw.expand(2, 3, 8, 8))
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def test_a_bridge_without_a_difference_hands_over_the_very_tensor():
    x = as_student(raw_images())
    bridge = InputBridge(*OURS.values(), **OURS, size=8)
    assert seen_by(bridge, x)[0] is x


def test_the_bridge_leaves_everything_but_images_alone():
    x = as_student(raw_images())
    others = (torch.arange(3), torch.rand(2, 3), torch.rand(2, 1, 8, 8), "text", None)
    bridge = InputBridge(MEAN, STD, **OURS)
    seen = seen_by(bridge, others, image={"pixels": x})
    assert all(a is b for a, b in zip(seen[0], others, strict=True))
    assert not torch.equal(seen[1]["pixels"], x)


def test_the_students_batch_stays_as_it_was():
    x = as_student(raw_images())
    before = x.clone()
    seen_by(InputBridge(MEAN, STD, **OURS, size=4, flip_channels=True), x)
    assert torch.equal(x, before)


def test_images_of_low_precision_are_bridged_in_float32():
    x = as_student(raw_images()).bfloat16()
    bridge = InputBridge(MEAN, STD, **OURS, size=5)
    torch.testing.assert_close(seen_by(bridge, x)[0], seen_by(bridge, x.float())[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": MEAN[:2]}, "one of each a channel"),
        ({"std": (0.2, 0.0, 0.2)}, "deviations above 0"),
        ({"mean": MEAN[:2], "std": STD[:2]}, "2 channels and the student 3"),
        ({"interpolation": "lanczos"}, "use 'bicubic' or 'bilinear'"),
    ],
)
def test_a_bridge_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InputBridge(**({"mean": MEAN, "std": STD} | OURS | arguments))


def test_a_call_without_an_image_is_refused():
    with pytest.raises(ValueError, match=r"no image \(N, 3, H, W\).*\(2, 1, 8, 8\).*student_mean"):
        seen_by(InputBridge(MEAN, STD, **OURS), torch.rand(2, 1, 8, 8))


# The class map


@pytest.mark.parametrize(
    ("wrap", "pick"),
    [
        (lambda x: x, lambda out: out),
        (lambda x: (x, "aux"), lambda out: out[0]),
        (lambda x: [x, "aux"], lambda out: out[0]),
        (lambda x: {"aux": 1, "logits": x}, lambda out: out["logits"]),
        (lambda x: {"out": x, "aux": 1}, lambda out: out["out"]),
        (lambda x: Output(1, x), lambda out: out.logits),
    ],
    ids=["tensor", "tuple", "list", "logits", "torchvision segmentation", "named tuple"],
)
@pytest.mark.parametrize("spatial", [(), (3, 2)])
def test_the_logits_are_gathered_into_the_students_classes(wrap, pick, spatial):
    logits = torch.rand(2, 5, *spatial)
    output = wrap(logits)
    mapped = Teacher(Answers(output), class_map=[4, 0, 0])(torch.rand(1))
    assert type(mapped) is type(output)
    expected = torch.stack([logits[:, 4], logits[:, 0], logits[:, 0]], dim=1)
    assert torch.equal(pick(mapped), expected)
    assert torch.equal(pick(output), logits)
    assert len(mapped) == len(output)


def test_an_object_with_logits_is_mapped_in_a_copy():
    class Holder:
        logits = torch.rand(2, 5)

    assert Teacher(Answers(Holder()), class_map=[3])(torch.rand(1)).logits.shape == (2, 1)
    assert Holder.logits.shape == (2, 5)


def test_a_class_map_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="index 5 and Linear 3 classes"):
        Teacher(nn.Linear(4, 3), class_map=[0, 5])(torch.rand(2, 4))
    with pytest.raises(ValueError, match="counted from 0"):
        Teacher(nn.Linear(4, 3), class_map=[0, -1])
    with pytest.raises(ValueError, match="output is a str without logits"):
        Teacher(Answers("text"), class_map=[0])(torch.rand(1))


def test_class_names_find_their_partners(tmp_path):
    (tmp_path / "teacher.txt").write_text("tabby, tabby cat\nBEAGLE\n\npug dog\n")
    students = ["Pug_Dog", "tabby,  tabby cat", "beagle"]
    assert match_classes(students, tmp_path / "teacher.txt") == [2, 0, 1]


def test_class_names_without_a_partner_are_listed():
    with pytest.raises(ValueError, match=r"2 of the student's 3 .* teacher's 2: 'emu', 'yak'\."):
        match_classes(["emu", "pug", "yak"], ["beagle", "pug"])
    with pytest.raises(ValueError, match=r"'crane' at \[0, 2\]"):
        match_classes(["crane"], ["crane", "pug", "Crane"])


# Ensembles


def test_the_softmax_of_an_ensemble_is_the_mean_of_its_teachers_probabilities():
    networks = [nn.Linear(4, 3).double() for _ in range(3)]
    x = torch.rand(5, 4).double()
    expected = sum(net(x).softmax(1) for net in networks) / 3
    torch.testing.assert_close(
        EnsembleTeacher(networks)(x).softmax(1), expected, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(EnsembleTeacher(networks)(x).exp(), expected, rtol=1e-12, atol=0)


def test_an_ensemble_takes_the_mean_of_logits():
    networks = {name: nn.Linear(4, 3) for name in "abc"}
    x = torch.rand(5, 4)
    expected = sum(net(x) for net in networks.values()) / 3
    torch.testing.assert_close(EnsembleTeacher(networks, mean="logits")(x), expected)


def test_each_teacher_of_an_ensemble_has_its_own_bridge_and_classes():
    raw = raw_images()
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(n, 4)) for n in (192, 48))
    ensemble = EnsembleTeacher(
        [
            Teacher(first, inputs=InputBridge(MEAN, STD, **OURS), class_map=[3, 1]),
            EnsembleTeacher(
                [Teacher(second, inputs=InputBridge(MEAN, STD, **OURS, size=4), class_map=[0, 2])]
            ),
        ]
    )
    theirs = v2.Normalize(MEAN, STD)
    one = first(theirs(raw))[:, [3, 1]].softmax(1)
    two = second(theirs(v2.Resize(4, v2.InterpolationMode.BICUBIC)(raw)))[:, [0, 2]].softmax(1)
    seen = ensemble(as_student(raw)).exp()
    torch.testing.assert_close(seen, (one + two) / 2, rtol=1e-5, atol=1e-6)


def test_an_ensemble_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no teachers"):
        EnsembleTeacher([])
    with pytest.raises(ValueError, match="'probabilities' or 'logits'"):
        EnsembleTeacher([nn.Linear(4, 3)], mean="median")
    odd = EnsembleTeacher([nn.Linear(4, 3), Teacher(nn.Linear(4, 2))])
    with pytest.raises(ValueError, match=r"teacher 1 .*\(5, 2\) and teacher 0 \(5, 3\).*class_map"):
        odd(torch.rand(5, 4))


# What holds for every teacher


def every_kind() -> list[Teacher]:
    return [
        Teacher(nn.Conv2d(3, 4, 3), channels_last=True, inputs=InputBridge(MEAN, STD, **OURS)),
        EnsembleTeacher([nn.Conv2d(3, 4, 3), Teacher(nn.Conv2d(3, 5, 3), class_map=[4, 1, 2, 3])]),
    ]


@pytest.mark.parametrize("teacher", every_kind(), ids=repr)
def test_a_teacher_stays_frozen_and_single(teacher):
    x = as_student(raw_images())
    module = DistillModule(nn.Conv2d(3, 4, 3), teacher)
    module.train()
    teacher.network.train()
    assert not teacher(x).requires_grad
    assert not any(m.training for m in teacher.network.modules())
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert sorted(module.state_dict()) == ["student.bias", "student.weight"]
    assert copy.deepcopy(module).teacher is teacher


@pytest.mark.parametrize("teacher", every_kind(), ids=repr)
def test_a_teacher_that_was_pickled_answers_the_same(teacher):
    x = as_student(raw_images())
    expected = teacher(x)
    copied = pickle.loads(pickle.dumps(teacher))
    assert torch.equal(copied(x), expected)
    assert torch.equal(copied.to("cpu")(x), expected)


def test_channels_last_reaches_the_network_and_its_images():
    formats = []
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    network.register_forward_pre_hook(
        lambda _, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    plain = copy.deepcopy(network)
    x = raw_images()
    teacher = Teacher(network, channels_last=True)
    torch.testing.assert_close(teacher(x), Teacher(plain)(x))
    assert formats == [True, False]
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_dtype_that_is_none_is_refused():
    with pytest.raises(ValueError, match="dtype is 'bf16': use a name such as 'bfloat16'"):
        Teacher(nn.Linear(4, 3), dtype="bf16")


def test_a_compiled_teacher_runs_compiled_unless_a_part_is_tapped(monkeypatch):
    calls = []

    def without_code_generation(network):
        compiled = real(network, backend="eager")
        return lambda *args: calls.append(args) or compiled(*args)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", without_code_generation)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    teacher = Teacher(network, compile=True)
    x = torch.rand(5, 4)
    torch.testing.assert_close(teacher(x), network(x).detach())
    assert len(calls) == 1
    assert torch.equal(pickle.loads(pickle.dumps(teacher))(x), teacher(x))
    assert len(calls) == 3
    heard = []
    handle = network[0].register_forward_hook(lambda *_: heard.append(1))
    teacher(x)
    assert (len(heard), len(calls)) == (1, 3)
    handle.remove()
    teacher(x)
    assert (len(heard), len(calls)) == (1, 4)


# In a run


class Trains(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))

    def training_step(self, batch, batch_idx):
        return 0.0 * self.net(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_a_run_distils_from_an_ensemble_in_its_own_view_and_classes(make_trainer, mean):
    raw = raw_images()
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(n, 4)) for n in (48, 192))
    teacher = EnsembleTeacher(
        [
            Teacher(first, inputs=InputBridge(MEAN, STD, **OURS, size=4), class_map=[3, 1]),
            Teacher(second, class_map=[0, 2]),
        ],
        mean=mean,
    )
    student = Trains()
    expected = copy.deepcopy(student.net)

    small = v2.Resize(4, v2.InterpolationMode.BICUBIC)(raw)
    theirs = [
        first(v2.Normalize(MEAN, STD)(small))[:, [3, 1]],
        second(as_student(raw))[:, [0, 2]],
    ]
    if mean == "logits":
        target = (theirs[0] + theirs[1]) / 2
    else:
        target = ((theirs[0].softmax(1) + theirs[1].softmax(1)) / 2).log()
    loss = 2 * KDLoss(2.0)(expected(as_student(raw)), target)
    gradients = torch.autograd.grad(loss, list(expected.parameters()))

    callback = DistillationCallback(teacher, loss=KDLoss(2.0), weight=2.0)
    loader = DataLoader(TensorDataset(as_student(raw)), batch_size=2)
    make_trainer(max_steps=1, callbacks=[callback]).fit(student, loader)
    for after, before, gradient in zip(
        student.net.parameters(), expected.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(after, before - gradient, rtol=1e-4, atol=1e-6)


def test_a_term_taps_a_part_of_one_teacher_of_an_ensemble(make_trainer):
    teacher = EnsembleTeacher([nn.Sequential(nn.Flatten(), nn.Linear(192, 2)) for _ in range(2)])
    heard = []

    def loss(ours, theirs):
        heard.append(theirs)
        return (ours - theirs).square().mean()

    x = raw_images()
    callback = DistillationCallback(teacher, terms={"tap": Term(loss, teacher="1.1")})
    loader = DataLoader(TensorDataset(x), batch_size=2)
    make_trainer(max_steps=1, callbacks=[callback]).fit(Trains(), loader)
    assert torch.equal(heard[0], teacher.teachers[1].network(x))


# The loader


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
    """Where torchvision finds its weights without a download."""
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
    assert teacher.inputs.size is None  # such a network takes any size
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
        (a_network, OURS, "does not tell its normalisation.*InputBridge"),
        (a_network, {"student_mean": MEAN}, "student_mean and student_std both"),
        (a_network(), {"num_classes": 3}, "num_classes cannot change a network that is built"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_mend(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(source, **arguments)


@pytest.mark.parametrize("source", [3, no_network])
def test_what_is_no_source_of_a_network_is_refused(source):
    with pytest.raises(TypeError, match=r"source is a int: give|teacher is a str: give"):
        load_teacher(source)


def test_hydra_builds_an_ensemble_with_bridges_and_class_names():
    config = OmegaConf.create(
        """
        mean: [0.5, 0.5, 0.5]
        std: [0.25, 0.25, 0.25]
        teacher:
          _target_: lightning_dist.ensemble.EnsembleTeacher
          teachers:
            - _target_: lightning_dist.loading.load_teacher
              source: timm/test_resnet.r160_in1k
              pretrained: false
              num_classes: 3
              student_mean: ${mean}
              student_std: ${std}
              class_map:
                _target_: lightning_dist.bridge.match_classes
                student_names: [dog, cat]
                teacher_names: [cat, cow, dog]
            - _target_: lightning_dist.teacher.Teacher
              network:
                _target_: timm.create_model
                model_name: test_resnet
                num_classes: 2
              inputs:
                _target_: lightning_dist.bridge.InputBridge
                mean: [0.485, 0.456, 0.406]
                std: [0.229, 0.224, 0.225]
                student_mean: ${mean}
                student_std: ${std}
                size: [32, 32]
        """
    )
    teacher = instantiate(config.teacher)
    first, second = teacher.teachers
    assert first.class_map == [2, 0]
    assert (first.inputs.size, second.inputs.size) == ((160, 160), (32, 32))
    assert teacher(as_student(raw_images())).shape == (2, 2)
    assert torch.equal(
        pickle.loads(pickle.dumps(teacher))(torch.ones(1, 3, 8, 8)), teacher(torch.ones(1, 3, 8, 8))
    )


def test_a_teacher_as_a_network_gives_what_the_teacher_gives():
    plain = Teacher(nn.Linear(4, 3))
    assert plain.as_network() is plain.network
    mapped = Teacher(nn.Linear(4, 3), class_map=[2, 0])
    inputs = torch.randn(5, 4)
    torch.testing.assert_close(mapped.as_network()(inputs), mapped(inputs))
    ensemble = EnsembleTeacher([nn.Linear(4, 3), nn.Linear(4, 3)])
    torch.testing.assert_close(ensemble.as_network()(inputs), ensemble(inputs))


def test_a_part_is_asked_frozen_and_with_its_inputs_as_they_are():
    bridge = InputBridge([0.0] * 3, [1.0] * 3, [0.5] * 3, [0.5] * 3)
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    teacher = Teacher(network, inputs=bridge)
    network.train()
    x = torch.randn(2, 2, 4, 4)
    output = teacher.ask("1", (x,), {})
    assert not output.requires_grad
    torch.testing.assert_close(output, x / (1 + 1e-5) ** 0.5)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(teacher.ask("", (images,), {}), teacher(images))
