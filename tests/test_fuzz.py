"""Tests with random inputs: a loss or a command succeeds, or fails with the expected error.

Each run of the tests draws new inputs. A failing test prints its inputs, and the line of code that
repeats them.
"""

import math
import string
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_dist.cli.errors import is_users
from lightning_dist.cli.run.settings import check_settings
from lightning_dist.functional import dist_loss, kd_loss

fuzz = settings(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

SIZES = st.integers(0, 5)
SHAPES = st.lists(SIZES, min_size=0, max_size=4)
FLOATS = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
DTYPES = FLOATS | st.sampled_from([torch.int64, torch.bool, torch.complex64])
SPECIAL = st.sampled_from([0.0, -0.0, 1e-45, 1e38, -1e38, math.inf, -math.inf, math.nan])


@st.composite
def logits(draw: Any, shape: list[int] | None = None) -> torch.Tensor:
    """Draw a tensor of any small shape and dtype, with some extreme values."""
    shape = draw(SHAPES) if shape is None else shape
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(draw(SIZES)))
    tensor = tensor * draw(st.sampled_from([0.0, 1.0, 1e-20, 1e4, 1e30]))
    if tensor.numel() and draw(st.booleans()):
        tensor.flatten()[draw(st.integers(0, tensor.numel() - 1))] = draw(SPECIAL)
    if draw(st.booleans()) and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.to(draw(DTYPES if draw(SIZES) == 0 else FLOATS))


@st.composite
def pairs(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a pair of tensors, mostly of equal shapes, because other shapes are refused."""
    first = draw(logits())
    same = draw(SIZES) > 0
    return first, draw(logits(list(first.shape) if same else None))


@settings(fuzz, max_examples=200)
@given(
    pair=pairs(),
    tau=st.sampled_from([1.0, 4.0, 0.1, 1e-6, 1e6, 0.0, -1.0, math.nan, math.inf]),
    beta=st.sampled_from([0.0, 1.0, -2.0]),
    activation=st.sampled_from(["softmax", "sigmoid", "identity", "relu", ""]),
    masked=st.sampled_from([None, "right", "short", "numbers"]),
)
def test_any_pair_of_tensors_gives_a_number_or_a_value_error(pair, tau, beta, activation, masked):
    student, teacher = pair
    student = student.requires_grad_(student.is_floating_point())
    mask = None
    if masked is not None and student.dim():
        mask = torch.ones((student.shape[0], *student.shape[2:]))
        mask = mask if masked == "numbers" else mask > 0
        mask = mask[1:] if masked == "short" else mask
    results = []
    for loss, options in (
        (dist_loss, {"beta": beta, "activation": activation, "mask": mask}),
        (kd_loss, {}),
    ):
        try:
            value = loss(student, teacher, tau=tau, **options)
        except ValueError:
            continue
        assert value.shape == ()
        assert value.dtype in (torch.float32, torch.float64)
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.shape == student.shape
        results.append((loss, value, gradient))
    ordinary = student.is_floating_point() and teacher.is_floating_point()
    if ordinary and all(x.isfinite().all() and x.abs().max() < 1e5 for x in pair if x.numel()):
        for loss, value, gradient in results:
            if loss is dist_loss and tau in (1.0, 4.0) and activation in ("softmax", "sigmoid"):
                assert value.isfinite()
                assert gradient.isfinite().all()


VALUES = (
    st.sampled_from(
        ["null", "true", "-1", "0", "1e9", "nan", "inf", "''", "[]", "{}", "[1,2]", "{a:1}"]
    )
    | st.sampled_from(["${seed}", "${nothing}", "${", "}", "???", "'", '"', "a=b", "a:b", "\\"])
    | st.text(string.printable, max_size=8)
    | st.text(max_size=4)
)
GROUPS = [
    "data",
    "student",
    "teacher",
    "distill",
    "optimizer",
    "scheduler",
    "experiment",
    "trainer",
]
SETTINGS = ["seed", "num_classes", "monitor", "resume", "test_checkpoint", "matmul_precision"]
NESTED = ["data.seed", "distill.loss.tau", "trainer.max_epochs", "module.student", "hydra.run.dir"]
KEYS = st.sampled_from(GROUPS + SETTINGS + NESTED) | st.text(
    string.ascii_letters + string.punctuation, max_size=10
)
SIGNS = st.sampled_from(["", "", "", "+", "++", "~"])


@st.composite
def overrides(draw: Any) -> str:
    sign, key = draw(SIGNS), draw(KEYS)
    return f"{sign}{key}" + ("" if sign == "~" and draw(st.booleans()) else f"={draw(VALUES)}")


@pytest.fixture(scope="module")
def configs():
    with initialize_config_module("lightning_dist.conf", version_base="1.3"):
        yield


@settings(fuzz, max_examples=100)
@given(given_overrides=st.lists(overrides(), min_size=1, max_size=3))
def test_any_command_line_composes_or_raises_a_users_error(configs, given_overrides):
    try:
        config = compose("train", given_overrides, return_hydra_config=True)
        check_settings(config)
        config.hydra.runtime.output_dir = "."
        OmegaConf.to_yaml(config)
    except Exception as error:
        if not is_users(error):  # The command prints a traceback for such an error.
            raise
