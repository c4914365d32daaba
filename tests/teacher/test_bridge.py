"""Tests of the bridge, which converts the teacher's input images and output classes."""

import time

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from lightning_dist import Teacher
from lightning_dist.teacher import InputBridge, match_classes
from normalisation import MEAN, OURS, STD, as_student, raw_images


class Records(nn.Module):
    """A network that stores and returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        return args, kwargs


def seen_by(bridge: InputBridge, *args, **kwargs):
    (seen, named) = Teacher(Records(), inputs=bridge)(*args, **kwargs)
    return (*seen, *named.values())


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_noise_is_resized_as_pillow_does(mode):
    """Bicubic interpolation of noise leaves 0..1; the bridge clips such values, as Pillow does."""
    pixels = 255 * torch.randint(0, 2, (3, 24, 24), dtype=torch.uint8)
    size, way = (31, 17), Image.Resampling[mode.upper()]
    expected = pil_to_tensor(to_pil_image(pixels).resize(size[::-1], way)) / 255
    bridge = InputBridge(MEAN, STD, **OURS, size=size, interpolation=mode)
    (seen,) = seen_by(bridge, as_student(pixels[None] / 255))
    seen = seen[0] * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    assert (seen - expected).abs().max() < 1.5 / 255


def test_values_beyond_black_and_white_are_not_clipped():
    bridge = InputBridge([0.0], [1.0], [0.0], [1.0], size=4)
    (seen,) = seen_by(bridge, torch.full((1, 1, 8, 8), 3.0))
    torch.testing.assert_close(seen, torch.full((1, 1, 4, 4), 3.0))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [13, (5, 6), 8])
def test_the_bridge_gives_what_the_teachers_own_transform_would(mode, size):
    raw = 0.3 + 0.4 * raw_images()  # Interpolated values stay within 0..1, so nothing is clipped.
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


def test_a_bridge_that_changes_nothing_returns_the_same_tensor_object():
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
        ({"mean": MEAN[:2]}, "a mean and a deviation above 0 for each channel"),
        ({"std": (0.2, 0.0, 0.2)}, "a deviation above 0 for each channel"),
        ({"mean": MEAN[:2], "std": STD[:2]}, "2 channels and the student 3"),
        ({"interpolation": "lanczos"}, "use 'bicubic' or 'bilinear'"),
    ],
)
def test_a_bridge_with_impossible_arguments_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InputBridge(**({"mean": MEAN, "std": STD} | OURS | arguments))


def test_a_call_without_an_image_is_refused():
    with pytest.raises(ValueError, match=r"no image \(N, 3, H, W\).*\(2, 1, 8, 8\).*student_mean"):
        seen_by(InputBridge(MEAN, STD, **OURS), torch.rand(2, 1, 8, 8))


# Names of classes


def test_class_names_find_their_partners(tmp_path):
    (tmp_path / "teacher.txt").write_text("tabby, tabby cat\nBEAGLE\n\npug dog\n")
    students = ["Pug_Dog", "tabby,  tabby cat", "beagle"]
    assert match_classes(students, tmp_path / "teacher.txt") == [2, 0, 1]


def test_class_names_without_a_partner_are_listed():
    with pytest.raises(ValueError, match=r"2 of the student's 3 .* teacher's 2: 'emu', 'yak'\."):
        match_classes(["emu", "pug", "yak"], ["beagle", "pug"])
    with pytest.raises(ValueError, match=r"'crane' at \[0, 2\]"):
        match_classes(["crane"], ["crane", "pug", "Crane"])


@pytest.mark.parametrize("own", [["a"], [f"b{i}" for i in range(100_000)]], ids=["equal", "other"])
def test_classes_of_a_file_are_compared_in_bounded_time(own):
    """A list of all places of each class would have 10^10 numbers."""
    names = ["a"] * 100_000
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"classes of one name|have no partner") as caught:
        match_classes(names, own * 100_000 if len(own) == 1 else own)
    assert time.process_time() - begin < 10
    assert len(str(caught.value)) < 5000
