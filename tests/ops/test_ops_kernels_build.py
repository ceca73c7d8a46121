"""Compiles the kernels with Triton and ptxas for real GPUs, at the sizes of real models. No GPU is needed."""

import os
import re
import subprocess
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter builds nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from evocomp.ops.context_clusters import triton as clusters  # noqa: E402
from evocomp.ops.ghm_bce import triton as ghm  # noqa: E402
from evocomp.ops.score_separation import triton as separation  # noqa: E402
from evocomp.ops.top_r_compact import triton as top_r  # noqa: E402
from evocomp.ops.vocabulary_argmax import triton as vocabulary  # noqa: E402

LAUNCH_OPTIONS = ("num_warps", "num_stages")
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Builder:
    """A stub kernel that compiles the kernel instead of launching it, and records the resources that it needs."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability, self.resources = kernel, capability, None

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        names = self.kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | options
        launch = {key: given.pop(key) for key in LAUNCH_OPTIONS if key in given}
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(names):
            value = given[name]
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif name.isupper() and name not in ("N", "V", "D", "R") or value == 1:
                signature[name], constants[name] = "constexpr", value  # like the JIT, treat 1 as a constant
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        built = triton.compile(source, GPUTarget("cuda", self.capability, 32), options=launch)
        self.resources = {"shared": built.metadata.shared, **_resources(built.asm["cubin"])}


def _resources(cubin):
    """Registers and stack bytes (spills) per thread, as reported by ptxas."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


def launch_vocabulary(dtype):
    vocabulary.vocabulary_argmax(torch.zeros(200, 4096, dtype=dtype), torch.zeros(400, 4096, dtype=dtype), None)


def launch_histogram(dtype):
    logits = torch.zeros(8, 576, dtype=dtype)
    ghm.ghm_histogram(logits, logits, logits > 0, 10)


def launch_loss(dtype, images=32):
    logits = torch.zeros(images, 2880, dtype=dtype)
    ghm._ghm_bce(logits, logits, logits > 0, None, 10, "non_empty")


def launch_loss_of_many(dtype):
    launch_loss(dtype, 64)


def launch_forward(dtype, width=4096):
    hidden = torch.zeros(2, 64, width, dtype=dtype)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    return separation._forward(hidden, hidden[0, 0], hidden[0, 0, :1], mask, mask)


def launch_backward(dtype, width=4096):
    hidden = torch.zeros(2, 64, width, dtype=dtype)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    logits, value, *saved = separation._forward(hidden, hidden[0, 0], hidden[0, 0, :1], mask, mask)
    separation._backward_op(logits, value, hidden, hidden[0, 0], mask, mask, *saved)


def launch_wide_forward(dtype):
    return launch_forward(dtype, 8192)


def launch_wide_backward(dtype):
    launch_backward(dtype, 5120)


def launch_index(dtype):
    scores = torch.zeros(2, 2880, dtype=dtype)
    top_r.top_r_index(scores, 160, scores > 0)


def launch_gather(dtype):
    embeddings = torch.zeros(2, 64, 4096, dtype=dtype)
    top_r.gather_embeddings(embeddings, torch.zeros(2, 32, dtype=torch.long))


def launch_clusters(dtype):
    clusters.context_clusters(torch.zeros(1, 2880, 64, dtype=dtype), torch.arange(339)[None, None], 301)


KERNELS = [
    (clusters, "_clusters_kernel", launch_clusters),
    (vocabulary, "_argmax_kernel", launch_vocabulary),
    (ghm, "_histogram_kernel", launch_histogram),
    (ghm, "_loss_kernel", launch_loss),
    (ghm, "_loss_kernel", launch_loss_of_many),
    (separation, "_forward_kernel", launch_forward),
    (separation, "_finish_kernel", launch_forward),
    (separation, "_backward_kernel", launch_backward),
    (separation, "_forward_kernel", launch_wide_forward),
    (separation, "_backward_kernel", launch_wide_backward),
    (top_r, "_index_kernel", launch_index),
    (top_r, "_gather_kernel", launch_gather),
]


def build(module, name, launch, dtype, capability, monkeypatch):
    for other in {kernel for owner, kernel, _ in KERNELS if owner is module}:
        stand_in = Builder(getattr(module, name), capability) if other == name else Idle()
        monkeypatch.setattr(module, other, stand_in)
    launch(dtype)
    return getattr(module, name).resources


class Idle:
    """A kernel other than the one under test."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.mark.parametrize("module,name,launch", KERNELS, ids=lambda x: getattr(x, "__name__", None))
@pytest.mark.parametrize(
    "dtype,capability",
    [
        pytest.param(torch.bfloat16, 90, id="bf16-sm90"),
        pytest.param(torch.bfloat16, 80, id="bf16-sm80", marks=pytest.mark.slow),
        pytest.param(torch.float32, 90, id="fp32-sm90", marks=pytest.mark.slow),
    ],
)
def test_builds_without_spills(module, name, launch, dtype, capability, monkeypatch):
    resources = build(module, name, launch, dtype, capability, monkeypatch)
    assert resources["STACK"] == 0, f"registers spill to memory: {resources}"
    assert resources["shared"] <= 99 * 1024, f"more shared memory than consumer GPUs have: {resources}"
    print(name, resources)
